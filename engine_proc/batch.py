"""Turns a step's plan into the tensors of a model batch: packed ids, positions, KV slots, block tables, wanted rows.

NumPy arrays are filled in buffers that live as long as the runner, then seen as tensors; the only loop is the one over
the plan's items. Engine process; never changes a sequence.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.attention import AttentionBatch
from engine_proc.decoder import ModelBatch
from engine_proc.device import Device
from engine_proc.plan import PlanItem, StepPlan


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """A plan as the runner computes it. The first rows of the model's output are sampled, the rest are scored."""

    model: ModelBatch
    sampled: list[int]                  # numbers of the items that get a token, in order
    slots: np.ndarray                   # int64 [len(sampled)]: their sampler slots
    position: np.ndarray                # int64 [len(sampled)]: index of the new token among the output
    scored: list[tuple[int, int, int]]  # (item, first, end): its rows among the scored ones
    targets: np.ndarray                 # int64 [scored rows]: the prompt token that follows each
    unknown: np.ndarray | None = None   # int64 [2, n]: rows whose ids a step in flight samples, and their slots


class Buffers:
    """The host's side of one step. They grow to the largest step seen."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self.tokens = np.zeros((3, max_tokens), np.int64)               # ids, positions, slots
        self.query_start = np.zeros(max_seqs + 1, np.int32)
        self.context_len = np.zeros(max_seqs, np.int32)
        self.tables = np.zeros((max_seqs, max_blocks), np.int32)

    def reserve(self, tokens: int, seqs: int, blocks: int) -> None:
        if tokens > self.tokens.shape[1]:
            self.tokens = np.zeros((3, tokens), np.int64)
        if seqs > len(self.context_len) or blocks > self.tables.shape[1]:
            seqs, blocks = max(seqs, len(self.context_len)), max(blocks, self.tables.shape[1])
            self.query_start = np.zeros(seqs + 1, np.int32)
            self.context_len = np.zeros(seqs, np.int32)
            self.tables = np.zeros((seqs, blocks), np.int32)


class BatchBuilder:
    """Owns the buffers: a set for each step that may be in flight, and one for the step that is being built."""

    def __init__(self, device: Device, block_size: int, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self.device, self.block_size = device, block_size
        self._sets = [Buffers(max_tokens, max_seqs, max_blocks) for _ in range(device.depth + 1)]

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan. Its arrays are valid until it is collected, which is before `depth` + 1 further calls."""
        items = plan.items
        size, total = len(items), plan.num_tokens
        buffers = self._sets[plan.number % len(self._sets)]
        buffers.reserve(total, size, max(len(item.seq.block_table) for item in items))
        ids, positions, slots = buffers.tokens[:, :total]
        query_start, context_len = buffers.query_start[:size + 1], buffers.context_len[:size]
        width = max(-(-(item.start + item.count) // self.block_size) for item in items)
        tables = buffers.tables[:size, :width]
        tables[:] = 0
        unknown: list[tuple[int, int]] = []
        row = num_decodes = 0
        given = False
        for number, item in enumerate(items):
            seq, end = item.seq, item.start + item.count
            assert end <= len(seq.block_table) * self.block_size
            if item.count == 1:
                num_decodes += num_decodes == number
                if end <= len(seq.tokens):
                    ids[row] = seq.tokens[item.start]
                else:                           # the token that the step ahead of this one samples
                    ids[row] = 0
                    unknown.append((row, seq.slot))
            else:
                assert end <= len(seq.tokens)
                ids[row:row + item.count] = seq.tokens[item.start:end]
            given |= seq.embeds is not None
            query_start[number] = row
            context_len[number] = end
            used = -(-end // self.block_size)
            tables[number, :used] = seq.block_table[:used]
            row += item.count
        query_start[size] = row
        embeds = self._take_embeds(items, ids, query_start) if given else None
        owner = np.arange(size)
        if total == size:                       # nothing but single tokens
            np.subtract(context_len, 1, out=positions, casting="unsafe")
        else:
            owner = np.repeat(owner, np.diff(query_start))
            positions[:] = np.arange(total) - (query_start[1:] - context_len)[owner]
        block, offset = np.divmod(positions, self.block_size)
        np.multiply(tables[owner, block], self.block_size, out=slots, casting="unsafe")
        slots += offset
        tensor = self.device.tensor
        attention = AttentionBatch(
            query_start=tensor(query_start), context_len=tensor(context_len), block_tables=tensor(tables),
            slots=tensor(slots), num_decodes=num_decodes, host_query_start=query_start, host_context_len=context_len)
        model = ModelBatch(ids=tensor(ids), positions=tensor(positions), rows=tensor(ids[:0]), attention=attention,
                           embeds=embeds)
        batch = self._wanted(items, model, query_start)
        if unknown:
            batch.unknown = np.array(unknown, np.int64).T
        return batch

    def _wanted(self, items: list[PlanItem], model: ModelBatch, query_start: np.ndarray) -> StepBatch:
        sampled = [number for number, item in enumerate(items) if item.sample]
        rows = [query_start[1:][sampled].astype(np.int64) - 1]
        scored: list[tuple[int, int, int]] = []
        targets: list[np.ndarray] = []
        first = 0
        for number, item in enumerate(items):
            if not item.prompt_logprobs:
                continue
            count = min(item.start + item.count, item.seq.num_prompt - 1) - item.start
            if count > 0:
                scored.append((number, first, first + count))
                first += count
                rows.append(np.arange(count) + int(query_start[number]))
                targets.append(np.array(item.seq.tokens[item.start + 1:item.start + 1 + count], np.int64))
        model.rows = self.device.tensor(np.concatenate(rows))
        return StepBatch(
            model=model, sampled=sampled, scored=scored,
            slots=np.array([items[number].seq.slot for number in sampled], np.int64),
            position=np.array([items[number].start + items[number].count - items[number].seq.num_prompt
                               for number in sampled], np.int64),
            targets=np.concatenate(targets) if targets else np.zeros(0, np.int64))

    def _take_embeds(self, items: list[PlanItem], ids: np.ndarray, query_start: np.ndarray) -> torch.Tensor | None:
        """Rows that requests brought, where the step computes some: float32 [T, hidden]; their ids become -1."""
        rows: np.ndarray | None = None
        for number, item in enumerate(items):
            given = item.seq.embeds
            if given is not None and item.start < len(given):
                if rows is None:
                    rows = np.zeros((len(ids), given.shape[1]), np.float32)
                first, some = int(query_start[number]), given[item.start:item.start + item.count]
                rows[first:first + len(some)] = some
                ids[first:first + len(some)] = -1
        return None if rows is None else self.device.tensor(rows)
