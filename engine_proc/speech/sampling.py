"""Chooses a token per row of ruled logits, and tells how likely it was.

Engine process. Log-probabilities are those among the allowed tokens, before temperature and penalties: what the
fallback thresholds of Whisper were tuned on.
"""
from __future__ import annotations

import numpy as np
import torch

from engine_proc import sampler
from engine_proc.slots import Rows, Slots


def choose(logits: torch.Tensor, rows: Rows, slots: Slots, argmax: sampler.Argmax) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [R] and their log-probabilities float32 [R], NaN where the model gave no numbers.

    `argmax` gives both for rows whose forbidden tokens are minus infinity.
    """
    if rows.plain:
        return argmax(logits)
    random = np.flatnonzero(rows.temperature > 0)
    valid = ~torch.isnan(logits).any(dim=-1)
    adjusted = sampler.adjust(logits, rows, slots, keep=True)
    tokens = adjusted.argmax(dim=-1)
    if len(random):
        uniform = torch.from_numpy(sampler.uniforms(rows.seed[random], rows.choice[random], rows.position[random]))
        index = torch.from_numpy(random)
        tokens[index] = sampler.invert(sampler.weigh(adjusted[index], rows, random), uniform)
    slots.note(rows, tokens)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
    return tokens, torch.where(valid, logprobs, float("nan"))


def torch_argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of `SpeechNet.argmax`."""
    best, tokens = logits.max(dim=-1)
    return tokens, best - torch.logsumexp(logits, dim=-1)
