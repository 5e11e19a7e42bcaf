"""Runs plans: builds the batch, calls the model, samples, and tells the engine what each item gave.

Implements `plan.Runner` over any model that has `forward` and `logits`. Engine process, one thread. Must never keep a
sequence beyond a step, except for the sampler slot between `admit` and `release`.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from engine_proc import sampler
from engine_proc.attention import PagedAttention
from engine_proc.batch import BatchBuilder, StepBatch
from engine_proc.decoder import ModelBatch
from engine_proc.device import Device, Fetch, Work
from engine_proc.greedy import GreedySteps, results_of
from engine_proc.masks import Mask, masks, without_ends
from engine_proc.plan import Candidates, ItemResult, StepPlan
from engine_proc.request import Sequence
from engine_proc.slots import Rows, Slots
from pipeline.config import EngineConfig
from pipeline.errors import invalid
from pipeline.messages import Logprobs

SCORED_ROWS = 64            # prompt rows whose logits are held at once


class Model(Protocol):
    """A causal language model over packed batches."""

    vocab_size: int
    hidden_size: int                # width of the embeddings

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        """One row of state per wanted row."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab] from rows of state; may be changed in place."""


@dataclass(slots=True)
class Computed:
    """What the device made of a step."""

    sampled: Fetch | None               # tokens, valid, open, the four of Ranked and the three of Beams where wanted
    result: sampler.Sampled | None
    scored: list[Fetch]                 # the four of Ranked, SCORED_ROWS rows each


@dataclass(slots=True)
class Launched:
    """A step under way."""

    plan: StepPlan
    batch: StepBatch
    work: Work[Computed]


class ModelRunner:
    """A model, its KV cache and its sampler slots on one device."""

    def __init__(self, model: Model, cache: PagedAttention, device: Device, config: EngineConfig, num_blocks: int,
                 max_model_len: int, facts: dict[str, Any]) -> None:
        self.depth = device.depth
        self.num_blocks, self.block_size = num_blocks, config.block_size
        self.vocab_size = model.vocab_size
        self.context_cost: float = getattr(model, "context_cost", 0.0)
        self.facts = facts
        self.model, self.cache, self.device = model, cache, device
        self._mode = config.logprobs_mode
        self._argmax: sampler.Argmax | None = getattr(model, "argmax", None)
        self._mask: Mask | None = getattr(model, "mask", None)
        self.slots = Slots(config.max_num_seqs, model.vocab_size, max_model_len + 1, device.torch_device)
        self._builder = BatchBuilder(device, config.block_size, config.max_step_tokens, config.max_num_seqs,
                                     -(-max_model_len // config.block_size))
        # a step that is launched ahead does not know its tokens
        self.greedy = None if self.depth or not getattr(model, "binds", False) else GreedySteps(
            model, self.slots, config.block_size,  # type: ignore[arg-type]
            config.max_num_seqs, -(-max_model_len // config.block_size) + 1)

    def admit(self, seq: Sequence) -> None:
        """Give `seq` a sampler slot; QuartetError when one of its ids is outside of the vocabulary, or its embeddings are
        not the model's."""
        width = self.model.hidden_size
        if seq.embeds is not None and seq.embeds.shape[1] != width:
            raise invalid(f"'prompt_embeds' must have {width} columns, the hidden size of this model.", "prompt_embeds")
        self.slots.admit(seq)

    def release(self, seq: Sequence) -> None:
        self.slots.release(seq)

    def launch(self, plan: StepPlan) -> object:
        """All that is read from sequences is read here; what the device does may happen later."""
        if self.greedy is not None:
            calls = self.greedy.prepare(plan)
            if calls is not None:
                calls.layers()
                calls.head()
                return results_of(calls.batch)
            self.greedy.forget()
        batch = self._builder.build(plan)
        rows: Rows | None = None
        if batch.sampled:
            rows = self.slots.gather(batch.slots, batch.position)
            seqs = [plan.items[number].seq for number in batch.sampled]
            if any(seq.constraint is not None for seq in seqs):
                rows.masks = masks(seqs, self.vocab_size)
                rows.banned = without_ends(seqs, rows.banned, self.vocab_size)
                rows.simple = rows.simple and not rows.banned
        return Launched(plan, batch, self.device.submit(partial(self._compute, plan, batch, rows)))

    @torch.inference_mode()
    def _compute(self, plan: StepPlan, batch: StepBatch, rows: Rows | None) -> Computed:
        """The device's part of a step; the steps' parts run in order."""
        if plan.copies:
            self.cache.copy_blocks(plan.copies)
        if batch.unknown is not None:
            where, slots = self.device.tensor(batch.unknown)
            batch.model.ids[where] = self.slots.latest[slots]
        hidden = self.model.forward(batch.model, self.cache)
        sampled: Fetch | None = None
        result: sampler.Sampled | None = None
        count = len(batch.sampled)
        if rows is not None:
            result = sampler.sample(self.model.logits(hidden[:count]), rows, self.slots, self._argmax, self._mode,
                                    self._mask)
            if self.depth:
                self.slots.latest[self.device.tensor(batch.slots)] = result.tokens
            sampled = self.device.fetch([
                result.tokens, result.valid, *([] if result.open is None else [result.open]), *_tensors(result.ranked),
                *([] if result.beams is None else [result.beams.ids, result.beams.scores, result.beams.values])])
        scored = []
        k = max((plan.items[number].seq.sampling.prompt_logprobs or 0 for number, _, _ in batch.scored), default=0)
        for first in range(0, len(batch.targets), SCORED_ROWS):
            targets = self.device.tensor(batch.targets[first:first + SCORED_ROWS])
            logits = self.model.logits(hidden[count + first:count + first + len(targets)])
            scored.append(self.device.fetch(_tensors(sampler.rank(logits, targets, k))))
        return Computed(sampled, result, scored)

    def collect(self, handle: object) -> list[ItemResult]:
        if isinstance(handle, list):                # of a greedy step, which is over
            return handle
        assert isinstance(handle, Launched)
        batch, results, done = handle.batch, [ItemResult() for _ in handle.plan.items], handle.work.wait()
        if done.sampled is not None:
            self._take_sampled(handle, done, results)
        if batch.scored:
            ranked = [np.concatenate(parts) for parts in zip(*(fetch.wait() for fetch in done.scored))]
            for number, first, end in batch.scored:
                result, seq = results[number], handle.plan.items[number].seq
                if not np.isfinite(ranked[0][first:end]).all():
                    result.token, result.logprobs, result.error = None, None, "numerical_error"
                else:
                    result.prompt_logprobs = _record(ranked, first, end, seq.sampling.prompt_logprobs or 0)
        return results

    def _take_sampled(self, handle: Launched, done: Computed, results: list[ItemResult]) -> None:
        """Tokens, log-probabilities and candidates of the sampled rows."""
        assert done.sampled is not None and done.result is not None
        items, result = [handle.plan.items[number] for number in handle.batch.sampled], done.result
        mine = [results[number] for number in handle.batch.sampled]
        tokens, valid, *rest = done.sampled.wait()
        is_open = np.ones(len(mine), bool) if result.open is None else rest.pop(0)
        for each, token, fine, some in zip(mine, tokens.tolist(), valid.tolist(), is_open.tolist()):
            if fine and some:
                each.token = token
            else:
                each.error = "no_token_left" if fine else "numerical_error"
        if result.ranked is not None:
            ranked, width = rest[:4], result.ranked.num_extra
            for i, row in enumerate(result.ranked_rows.tolist()):
                if mine[row].error is None:
                    sampling = items[row].seq.sampling
                    mine[row].logprobs = _record(ranked, i, i + 1, sampling.logprobs or 0,
                                                 len(sampling.logprob_ids) // 4, width)
        if result.beams is not None:
            found = rest[-3:]
            searched = [row for row, item in enumerate(items) if item.seq.sampling.beam is not None]
            for i, row in enumerate(searched):
                if mine[row].error is None:
                    mine[row].candidates = Candidates(*(part[i] for part in found))


def _tensors(ranked: sampler.Ranked | None) -> list[torch.Tensor]:
    return [] if ranked is None else [ranked.values, ranked.ranks, ranked.top_ids, ranked.top_values]


def _record(ranked: list[np.ndarray], first: int, end: int, k: int, extra: int = 0, width: int = 0) -> Logprobs:
    """Rows first .. end - 1 as a wire record: k alternatives each, and the first `extra` of the last `width` columns."""
    values, ranks, top_ids, top_values = (part[first:end] for part in ranked)
    best = top_ids.shape[1] - width
    k = min(k, best)
    if extra:
        top_ids, top_values = (np.concatenate([part[:, :k], part[:, best:best + extra]], axis=1)
                               for part in (top_ids, top_values))
        k += extra
    return Logprobs(
        k=k, values=values.astype(np.float32).tobytes(), ranks=ranks.astype(np.uint32).tobytes(),
        top_ids=top_ids[:, :k].astype(np.uint32).tobytes(), top_values=top_values[:, :k].astype(np.float32).tobytes())
