"""Steps in which every sequence goes on by its best token and nothing else is wanted: most steps of a busy server.

Their batch changes little from one to the next, so its arrays, the model's results and the calls into C are made once for
a set of sequences and only the numbers that move are written. What does not fit this (prompts, samplers, grammars, log-
probabilities, embeddings) is the runner's ordinary path; both give the same bits. Engine process. Must never keep what a
step computed beyond the next one.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite
from typing import Protocol

import numpy as np

from engine_proc.plan import ItemResult, PlanItem, StepPlan
from engine_proc.request import Sequence
from engine_proc.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of R single tokens: int32 arrays that the model reads in each call, and those that it fills."""

    ids: np.ndarray                     # [R]
    positions: np.ndarray               # [R]
    slots: np.ndarray                   # [R]
    context_lens: np.ndarray            # [R]
    tables: np.ndarray                  # [R, max_blocks]
    hidden: np.ndarray                  # float32 [R, hidden]
    tokens: np.ndarray                  # int32 [R]: the best
    best: np.ndarray                    # float32 [R]: its logit; NaN where the row holds one

    @classmethod
    def room(cls, rows: int, blocks: int, hidden: int) -> Batch:
        """Arrays for up to so many rows."""
        ids, positions, slots, context_lens, tokens = (np.zeros(rows, np.int32) for _ in range(5))
        return cls(ids=ids, positions=positions, slots=slots, context_lens=context_lens,
                   tables=np.zeros((rows, blocks), np.int32), hidden=np.empty((rows, hidden), np.float32),
                   tokens=tokens, best=np.zeros(rows, np.float32))

    def first(self, rows: int) -> Batch:
        return Batch(**{field.name: getattr(self, field.name)[:rows] for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Calls:
    """What the model does with a batch, in this order."""

    batch: Batch
    layers: Callable[[], None]
    head: Callable[[], None]            # of the logits only the best is kept


class Model(Protocol):
    hidden_size: int

    def bind(self, batch: Batch) -> Calls: ...


class GreedySteps:
    """Prepared steps of one model over the arrays of up to `max_seqs` sequences."""

    def __init__(self, model: Model, slots: Slots, block_size: int, max_seqs: int, max_blocks: int) -> None:
        self._model, self._slots, self._block_size = model, slots, block_size
        self._room = room = Batch.room(max_seqs, max_blocks, model.hidden_size)
        # Between two steps the caches are cold, and NumPy would touch more code than this.
        self._views = tuple(array.data for array in (room.ids, room.positions, room.slots, room.context_lens))
        self._seqs: list[Sequence] = []                 # of the step before this one, and of each
        self._starts: list[int] = []                    # the position
        self._preemptions: list[int] = []               # and how often it had lost its blocks
        self._calls: dict[int, Calls] = {}              # by the number of sequences

    def forget(self) -> None:
        """A step went another way."""
        self._seqs = []

    def prepare(self, plan: StepPlan) -> Calls | None:
        """The calls of this step, or None when it is not one of those."""
        items = plan.items
        if plan.copies:
            return None
        if not self._goes_on(items) and not self._start(items):
            return None
        size, count = self._block_size, len(items)
        calls = self._calls.get(count)
        if calls is None:
            calls = self._calls[count] = self._model.bind(self._room.first(count))
        batch = calls.batch
        ids, positions, where, lens = self._views
        for row, item in enumerate(items):
            seq, start = item.seq, item.start
            number, offset = divmod(start, size)
            block = seq.block_table[number]
            ids[row], positions[row], where[row], lens[row] = seq.tokens[start], start, block * size + offset, start + 1
            if not offset:                              # its first token in a block
                batch.tables[row, number] = block
        return calls

    def _goes_on(self, items: list[PlanItem]) -> bool:
        """Whether this is the step before, one token on."""
        if len(items) != len(self._seqs):
            return False
        starts = [item.start for item in items]
        for item, seq, start, preemptions in zip(items, self._seqs, self._starts, self._preemptions):
            if (item.seq is not seq or item.count != 1 or not item.sample or item.start != start + 1
                    or seq.preemptions != preemptions):
                return False
        self._starts = starts
        return True

    def _start(self, items: list[PlanItem]) -> bool:
        """Take up the sequences of a step, if it is one of those."""
        self._seqs = []
        plain = self._slots.plain
        for item in items:
            seq = item.seq
            if (item.count != 1 or not item.sample or item.prompt_logprobs or seq.constraint is not None
                    or seq.embeds is not None or not plain(seq.slot)):
                return False
        size = self._block_size
        for row, item in enumerate(items):
            used = item.start // size + 1
            self._room.tables[row, :used] = item.seq.block_table[:used]
        self._seqs = [item.seq for item in items]
        self._starts = [item.start for item in items]
        self._preemptions = [seq.preemptions for seq in self._seqs]
        return True


def results_of(batch: Batch) -> list[ItemResult]:
    """What a step gave."""
    return [ItemResult(token=token) if isfinite(value) else ItemResult(error="numerical_error")
            for token, value in zip(batch.tokens.tolist(), batch.best.tolist())]
