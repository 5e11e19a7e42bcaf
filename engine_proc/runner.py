"""Runs plans: builds the batch, calls the model, samples, and tells the engine what each item gave.

Implements `plan.Runner` over any model that has `forward` and `logits`. Engine process, one thread. Must never keep a
sequence beyond a step, except for the sampler slot between `admit` and `release`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from engine_proc import sampler
from engine_proc.attention import PagedAttention
from engine_proc.batch import BatchBuilder, StepBatch
from engine_proc.decoder import ModelBatch
from engine_proc.device import Device, Fetch
from engine_proc.plan import ItemResult, StepPlan
from engine_proc.request import Sequence
from engine_proc.slots import Slots
from pipeline.config import EngineConfig
from pipeline.messages import Logprobs

SCORED_ROWS = 64            # prompt rows whose logits are held at once


class Model(Protocol):
    """A causal language model over packed batches."""

    vocab_size: int

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        """One row of state per wanted row."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab] from rows of state; may be changed in place."""


@dataclass(slots=True)
class Launched:
    """A step under way."""

    plan: StepPlan
    batch: StepBatch
    sampled: Fetch | None               # tokens, valid, and the four of Ranked where log-probabilities are wanted
    ranked_rows: np.ndarray
    scored: list[Fetch]                 # the four of Ranked, SCORED_ROWS rows each


class ModelRunner:
    """A model, its KV cache and its sampler slots on one device."""

    def __init__(self, model: Model, cache: PagedAttention, device: Device, config: EngineConfig, num_blocks: int,
                 max_model_len: int, facts: dict[str, Any]) -> None:
        self.depth = device.depth
        self.num_blocks, self.block_size = num_blocks, config.block_size
        self.vocab_size = model.vocab_size
        self.facts = facts
        self.model, self.cache, self.device = model, cache, device
        self._argmax: sampler.Argmax | None = getattr(model, "argmax", None)
        self.slots = Slots(config.max_num_seqs, model.vocab_size, max_model_len + 1, device.torch_device)
        self._builder = BatchBuilder(device, config.block_size, config.max_step_tokens, config.max_num_seqs,
                                     -(-max_model_len // config.block_size))

    def admit(self, seq: Sequence) -> None:
        """Give `seq` a sampler slot; QuartetError when one of its ids is outside of the vocabulary."""
        self.slots.admit(seq)

    def release(self, seq: Sequence) -> None:
        self.slots.release(seq)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        if plan.copies:
            self.cache.copy_blocks(plan.copies)
        batch = self._builder.build(plan)
        hidden = self.model.forward(batch.model, self.cache)
        sampled, ranked_rows = None, np.zeros(0, np.int64)
        count = len(batch.sampled)
        if count:
            rows = self.slots.gather(batch.slots, batch.position)
            result = sampler.sample(self.model.logits(hidden[:count]), rows, self.slots, self._argmax)
            ranked_rows = result.ranked_rows
            sampled = self.device.fetch([result.tokens, result.valid, *_tensors(result.ranked)])
        scored = []
        k = max((plan.items[number].seq.sampling.prompt_logprobs or 0 for number, _, _ in batch.scored), default=0)
        for first in range(0, len(batch.targets), SCORED_ROWS):
            targets = self.device.tensor(batch.targets[first:first + SCORED_ROWS])
            logits = self.model.logits(hidden[count + first:count + first + len(targets)])
            scored.append(self.device.fetch(_tensors(sampler.rank(logits, targets, k))))
        return Launched(plan, batch, sampled, ranked_rows, scored)

    def collect(self, handle: object) -> list[ItemResult]:
        assert isinstance(handle, Launched)
        batch, results = handle.batch, [ItemResult() for _ in handle.plan.items]
        if handle.sampled is not None:
            tokens, valid, *ranked = handle.sampled.wait()
            for number, token, fine in zip(batch.sampled, tokens.tolist(), valid.tolist()):
                if fine:
                    results[number].token = token
                else:
                    results[number].error = "numerical_error"
            for i, row in enumerate(handle.ranked_rows.tolist()):
                result, seq = results[batch.sampled[row]], handle.plan.items[batch.sampled[row]].seq
                if result.error is None:
                    result.logprobs = _record(ranked, i, i + 1, seq.sampling.logprobs or 0)
        if batch.scored:
            ranked = [np.concatenate(parts) for parts in zip(*(fetch.wait() for fetch in handle.scored))]
            for number, first, end in batch.scored:
                result, seq = results[number], handle.plan.items[number].seq
                if not np.isfinite(ranked[0][first:end]).all():
                    result.token, result.logprobs, result.error = None, None, "numerical_error"
                else:
                    result.prompt_logprobs = _record(ranked, first, end, seq.sampling.prompt_logprobs or 0)
        return results


def _tensors(ranked: sampler.Ranked | None) -> list[torch.Tensor]:
    return [] if ranked is None else [ranked.values, ranked.ranks, ranked.top_ids, ranked.top_values]


def _record(ranked: list[np.ndarray], first: int, end: int, k: int) -> Logprobs:
    """Rows first .. end - 1 as a wire record with k alternatives each."""
    values, ranks, top_ids, top_values = (part[first:end] for part in ranked)
    k = min(k, top_ids.shape[1])
    return Logprobs(
        k=k, values=values.astype(np.float32).tobytes(), ranks=ranks.astype(np.uint32).tobytes(),
        top_ids=top_ids[:, :k].astype(np.uint32).tobytes(), top_values=top_values[:, :k].astype(np.float32).tobytes())
