"""Decides which inputs a batch holds: short requests first, nobody starved, long inputs beside inputs of their length.

Engine process, no torch. The order is the shortest remaining request first, so that a single query waits for the batch
under way and for nothing else, however many inputs others have queued. A request that has not been served for
`STARVED_NS` gets a share of each batch. Must never mix a request that runs alone with others.
"""
from __future__ import annotations

from collections.abc import Iterable

from engine_proc.pooling.plan import PoolBatch
from engine_proc.pooling.request import PoolItem, PoolRequest
from pipeline.config import EngineConfig

STARVED_NS = 10**9
STARVED_SHARE = 4             # a starved request gets this part of a batch: one in so many
WASTE_SHARE = 4               # where batches are padded: one in so many places may be padding ...
WASTE_TOKENS = 64             # ... or so many places


class PoolScheduler:
    """The requests that have inputs waiting. `budget`: tokens of a batch; a longer input goes by itself."""

    def __init__(self, config: EngineConfig, padded: bool = False) -> None:
        self.budget, self.max_items = config.max_step_tokens, config.max_num_seqs
        self.by_priority = config.scheduling_policy == "priority"
        self.padded = padded
        self.requests: dict[int, PoolRequest] = {}       # rid -> request with waiting inputs
        self.num_batches = 0

    @property
    def num_waiting(self) -> int:
        return sum(len(request.waiting) for request in self.requests.values())

    @property
    def waiting_tokens(self) -> int:
        return sum(request.waiting_tokens for request in self.requests.values())

    def add(self, request: PoolRequest) -> None:
        """Inputs of `request` wait (again)."""
        if not self.by_priority:
            request.priority = 0
        if request.waiting:
            self.requests[request.rid] = request

    def remove(self, request: PoolRequest) -> None:
        """Forget what waits of `request`; idempotent."""
        self.requests.pop(request.rid, None)
        request.waiting.clear()
        request.waiting_tokens = 0

    def plan(self, now: int, held: Iterable[int] = ()) -> PoolBatch | None:
        """The next batch, or None. Requests in `held` (rids) may not run now."""
        if not self.requests:
            return None
        barred = frozenset(held)
        queue = sorted((r for r in self.requests.values() if r.rid not in barred), key=_order)
        if not queue:
            return None
        items = self._fill(queue, now)
        for item in items:
            request = item.request
            request.num_in_flight += 1
            request.served_ns = now
            request.started_ns = request.started_ns or now
            if not request.waiting:
                self.requests.pop(request.rid, None)
        self.num_batches += 1
        return PoolBatch(number=self.num_batches, items=items)

    def _fill(self, queue: list[PoolRequest], now: int) -> list[PoolItem]:
        batch = _Batch(self.budget, self.max_items, self.padded)
        head = queue[0]
        starved = [r for r in queue if r.priority == head.priority and now - r.served_ns >= STARVED_NS]
        if starved:
            oldest = min(starved, key=lambda r: (r.served_ns, r.arrival))
            if oldest is not head:
                if oldest.alone:
                    queue = [oldest]
                else:
                    share = _Batch(self.budget // STARVED_SHARE, self.max_items, self.padded)
                    share.fill(oldest)
                    batch.adopt(share)
        for request in queue:
            if batch.closed or not batch.fill(request, first=request is queue[0]):
                break
        return batch.items

    def assert_invariants(self) -> None:
        for rid, request in self.requests.items():
            assert rid == request.rid and request.waiting and not request.ended
            assert request.waiting_tokens == sum(map(len, request.waiting))
            assert [len(i) for i in request.waiting] == sorted(len(i) for i in request.waiting)


class _Batch:
    """A batch in the making."""

    def __init__(self, budget: int, max_items: int, padded: bool) -> None:
        self.items: list[PoolItem] = []
        self.closed = False                              # holds an input that must be by itself
        self._budget, self._max_items, self._padded = budget, max_items, padded
        self._tokens = self._longest = 0

    def adopt(self, other: _Batch) -> None:
        self.items, self.closed = other.items, other.closed
        self._tokens, self._longest = other._tokens, other._longest

    def fill(self, request: PoolRequest, first: bool = False) -> bool:
        """Take what fits of `request`; of the first in the queue one input at least. False: the batch is full."""
        while request.waiting and not self.closed:
            if len(self.items) >= self._max_items:
                return False
            forced = not self.items or (first and all(item.request is not request for item in self.items))
            item = request.take(2**32 if not self.items else self._room())
            if item is None and forced and not request.alone:
                item = request.take(len(request.waiting[0]))      # beside the share of a starved request
            if item is None:
                return True                                       # a shorter input of another may fit
            if item.alone and self.items:
                request.put(item)
                return True
            self.items.append(item)
            self._tokens += len(item)
            self._longest = max(self._longest, len(item))
            self.closed = item.alone
        return True

    def _room(self) -> int:
        """The longest input that may join the batch."""
        if not self._padded:
            return self._budget - self._tokens
        count = len(self.items) + 1
        room = self._budget // count if self._longest * count <= self._budget else 0
        if room <= self._longest:
            return room
        spare = max(WASTE_TOKENS, self._budget // WASTE_SHARE)    # places that a longer one would leave empty
        return max(self._longest, min(room, (self._tokens + spare) // max(1, count - 1)))


def _order(request: PoolRequest) -> tuple[int, int, int]:
    return request.priority, request.remaining, request.arrival
