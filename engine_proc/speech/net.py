"""What the speech runner asks of a model: an encoder that fills a window's slot, a decoder over packed rows.

Engine process. Two families implement it: `whisper.py` with our own layers and caches, `hf_net.py` with those of
transformers. A slot holds what cross-attention reads of one window, from `encode` until somebody else gets the slot.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine_proc.decoder import ModelBatch


@dataclass(slots=True, kw_only=True)
class SpeechBatch:
    """One decoder step: packed rows as for text, and whose audio each sequence hears."""

    model: ModelBatch
    slots: torch.Tensor                 # int32 [S]


class SpeechNet(Protocol):
    """A sequence-to-sequence speech model."""

    vocab_size: int
    num_lanes: int                      # windows that are best encoded at once

    def encode(self, slots: list[int], inputs: list[np.ndarray]) -> None:
        """Compute the encoder states of up to `num_lanes` windows; keep what the decoder needs of them in `slots`."""

    def forward(self, batch: SpeechBatch) -> torch.Tensor:
        """Hidden states of the wanted rows, [R, width]."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab] of its own."""

    def attention_weights(self, slot: int, ids: list[int], heads: list[tuple[int, int]], frames: int) -> torch.Tensor:
        """Cross-attention of all tokens of one sequence: float32 probabilities [heads, tokens, frames]."""

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of finite-or-minus-infinity logits [R, V]: the best ids, int64 [R], and their log-probabilities (NaN where
        the row is no number)."""
