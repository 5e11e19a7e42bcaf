"""One pooling request as the engine sees it: inputs that wait, and counts of those that are under way. No torch here.

A request comes in slices, and its results leave in slices; nothing of an input is kept once its result is handed over.
"""
from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field

import numpy as np

from pipeline.messages import PoolAdd, PoolInput, unpack_ids
from pipeline.params import PoolParams


@dataclass(slots=True, eq=False)
class PoolSum:
    """An input that is computed in parts: the mean of their vectors, weighted by their tokens."""

    missing: int                             # parts without a result
    tokens: int = 0                          # of those that have one
    total: np.ndarray | None = None          # float64 [1, D]

    def add(self, rows: np.ndarray, tokens: int) -> None:
        weighted = rows.astype(np.float64) * tokens
        self.total = weighted if self.total is None else self.total + weighted
        self.tokens += tokens
        self.missing -= 1

    @property
    def mean(self) -> np.ndarray:
        """float32 [1, D]"""
        assert self.total is not None and not self.missing
        return (self.total / self.tokens).astype(np.float32)


@dataclass(slots=True, eq=False)
class PoolItem:
    """One input of a request, or a part of one."""

    request: PoolRequest
    index: int
    ids: bytes                               # uint32
    type_ids: bytes                          # uint8 per id, or empty
    failed: bool = False                     # a batch with it failed as a whole: it is tried again by itself
    skip: int = 0                            # ids at the beginning that are not pooled
    sum: PoolSum | None = None               # of a part: what becomes of its input

    def __len__(self) -> int:
        return len(self.ids) >> 2

    @property
    def params(self) -> PoolParams:
        """What is to be computed; of a part the vector as it is."""
        given = self.request.params
        return given if self.sum is None else PoolParams(given.task, False, 0)

    @property
    def alone(self) -> bool:
        return self.failed or self.request.alone


@dataclass(slots=True, eq=False)
class PoolRequest:
    """The inputs of one submission. Owned by the core; `waiting` is the scheduler's."""

    rid: int
    params: PoolParams
    total: int                               # inputs over all slices; 0: not told
    deadline_ns: int
    priority: int
    alone: bool
    arrival: int
    arrived_ns: int
    served_ns: int                           # when an input of it was last planned; at first its arrival
    waiting: list[PoolItem] = field(default_factory=list)     # by length, the longest last
    waiting_tokens: int = 0
    seen: set[int] = field(default_factory=set)               # indices of the inputs that came
    num_items: int = 0                       # inputs and parts of inputs that came
    num_in_flight: int = 0                   # of those
    num_computed: int = 0                    # of those
    num_done: int = 0                        # inputs
    num_tokens: int = 0                      # of all inputs that came
    started_ns: int = 0
    ended: bool = False                      # results that still come are dropped

    @classmethod
    def of(cls, add: PoolAdd, arrival: int, now: int) -> PoolRequest:
        return cls(rid=add.rid, params=add.params, total=add.total, deadline_ns=add.deadline_ns,
                   priority=add.priority, alone=add.alone, arrival=arrival, arrived_ns=now, served_ns=now)

    def add(self, given: PoolInput) -> bool:
        """Queue an input; False when its index came before."""
        if given.index in self.seen:
            return False
        self.seen.add(given.index)
        self.num_tokens += len(given.ids) >> 2
        lengths = unpack_ids(given.parts)
        if not lengths:
            self._new(PoolItem(self, given.index, given.ids, given.type_ids, skip=given.skip))
            return True
        whole, start = PoolSum(len(lengths)), 0
        for length in lengths:
            self._new(PoolItem(self, given.index, given.ids[4 * start:4 * (start + length)], b"", sum=whole))
            start += length
        return True

    def _new(self, item: PoolItem) -> None:
        self.num_items += 1
        self.put(item)

    def put(self, item: PoolItem) -> None:
        insort(self.waiting, item, key=len)
        self.waiting_tokens += len(item)

    def take(self, room: int) -> PoolItem | None:
        """The longest waiting input of at most `room` tokens."""
        place = bisect_right(self.waiting, room, key=len)
        if not place:
            return None
        item = self.waiting.pop(place - 1)
        self.waiting_tokens -= len(item)
        return item

    @property
    def remaining(self) -> int:
        """Tokens to compute before it is done, those of inputs that have not come yet guessed by the mean."""
        missing = max(0, self.total - len(self.seen))
        return self.waiting_tokens + (missing * self.num_tokens // len(self.seen) if missing and self.seen else 0)

    @property
    def done(self) -> bool:
        """Whether every input that came, and that will come, has its result."""
        return self.num_done >= len(self.seen) and (not self.total or self.num_done >= self.total)
