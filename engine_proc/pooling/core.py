"""The pooling engine's loop: slices of inputs in, one batch at a time through scheduler and runner, slices out.

Engine process, main thread; implements `pipeline.transport.Logic`, so that tests drive it in one process. Imports no
torch: the runner is given. A request that ends (abort, deadline, error) is forgotten at once; what a batch in flight
still computes for it is dropped. Must never block on a peer.
"""
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from engine_proc.admission import Tombstones
from engine_proc.pooling.admission import PoolLimits, check
from engine_proc.pooling.outputs import PoolOutputs
from engine_proc.pooling.plan import PoolBatch, PoolResult, PoolRunner
from engine_proc.pooling.request import PoolRequest
from engine_proc.pooling.scheduler import PoolScheduler
from engine_proc.pooling.stats import PoolStats
from pipeline.config import ServerConfig
from pipeline.errors import CATALOGUE, QuartetError
from pipeline.ids import child, family, frontend_epoch, frontend_index, short_epoch
from pipeline.messages import Abort, Kind, Load, PoolAdd, PoolAdds, unpack_rids
from pipeline.schema import BadFrame
from pipeline.transport import Sender

RETRY_NS = 5_000_000             # how soon to plan again when what waits may not run
MAX_FAILED_INPUTS = 8            # in a row, each by itself; then the process ends and its successor starts afresh
MAX_WAITING_BYTES = 256 * 2**20  # of inputs; more is left in the socket
log = logging.getLogger(__name__)


class PoolingCore:
    """One engine process around one pooling runner. `clock` gives monotonic nanoseconds."""

    def __init__(self, config: ServerConfig, index: int, epoch: int, runner: PoolRunner, sender: Sender,
                 clock: Callable[[], int], registry: CollectorRegistry | None = None) -> None:
        model = config.models[config.engines()[index]]
        self.index, self.epoch, self.runner, self._clock = index, epoch, runner, clock
        self.scheduler = PoolScheduler(model.engine, runner.padded)
        self.limits = PoolLimits.of(runner, model.max_model_len, model.engine.max_waiting, model.max_embed_len)
        self.outputs = PoolOutputs(index, epoch, sender)
        self.requests: dict[int, PoolRequest] = {}           # rid -> request that has not ended
        self._in_flight: deque[tuple[PoolBatch, object, int]] = deque()      # with the time of its launch
        self.stats = PoolStats(registry or CollectorRegistry(), model.names[0], index,
                               lambda: self.num_running, lambda: self.scheduler.num_waiting)
        self._over = Tombstones(65_536)                      # submissions that ended: what comes of them is dropped
        self._frontends: dict[int, int] = {}                 # newest epoch known
        self._num_frontends = config.frontends
        self._census_ns = int(config.timeouts.census_s * 1e9)
        self._next_census_ns = clock() + self._census_ns
        self._next_deadline_ns: int | None = None            # of the requests held; may be that of one that ended
        self._retry_ns: int | None = None                    # nothing could be planned: try again then
        self._arrival = 0
        self._failed_inputs = 0

    @property
    def num_running(self) -> int:
        return sum(len(batch.items) for batch, _, _ in self._in_flight)

    # ---- messages ------------------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        self._retry_ns = None
        if isinstance(message, PoolAdds):
            for add in message.items:
                self._add(add)
        elif isinstance(message, Abort):
            try:
                rids = unpack_rids(message.rids)
            except ValueError:
                raise BadFrame("an abort of ragged ids") from None
            for rid in rids:
                self._abort(rid)
        else:
            raise BadFrame(f"{type(message).__name__} is not for a pooling engine")

    def _add(self, add: PoolAdd) -> None:
        rid, now = add.rid, self._clock()
        if ((add.route.engine, add.route.engine_epoch) != (self.index, self.epoch) or child(rid)
                or frontend_index(rid) >= self._num_frontends):
            return self.stats.drop("misrouted")              # meant for our predecessor
        if self._orphaned(rid):
            return self.stats.drop("frontend_gone")
        if self._over.holds(rid, now):
            return self.stats.drop("aborted")                # or failed: the rest of a request that ended
        request = self.requests.get(rid)
        try:
            check(add, self.limits, 0 if request is not None else len(self.requests))
        except QuartetError as error:
            self.stats.refused.inc()
            if request is None:
                self._over.add(rid, now)
                self.outputs.fail(rid, error)
            else:
                self._fail(request, error)
            return None
        if request is None:
            request = self.requests[rid] = PoolRequest.of(add, self._arrival, now)
            self._arrival += 1
            if add.deadline_ns:
                self._next_deadline_ns = min(add.deadline_ns, self._next_deadline_ns or add.deadline_ns)
        for given in add.inputs:
            if not request.add(given):
                self.stats.drop("duplicate")
        self.scheduler.add(request)
        if request.done:                                     # a slice without inputs
            self._end(request, "stop")
        return None

    def _abort(self, rid: int) -> None:
        request = self.requests.get(family(rid))
        if request is None:
            self._over.add(family(rid), self._clock())       # it may have overtaken its slices
            self.stats.drop("unknown_abort")
        else:
            self._end(request, "abort")
            self.outputs.forget(request.rid)

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        if kind is not Kind.FRONTEND or epoch <= self._frontends.get(index, 0):
            return
        self._frontends[index] = epoch
        self._retry_ns = None
        self.outputs.peer_restarted(kind, index)
        for request in [r for r in self.requests.values() if self._orphaned(r.rid)]:
            self._end(request, "abort")

    def _orphaned(self, rid: int) -> bool:
        """Whether the frontend process that made `rid` is gone. A newer one than we know of is not."""
        known = self._frontends.get(frontend_index(rid))
        return known is not None and 0 < short_epoch(known - frontend_epoch(rid)) < 2048

    # ---- the loop ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Plan and launch a batch, or collect the oldest; then tell everyone."""
        now = self._clock()
        if self._next_deadline_ns is not None and now >= self._next_deadline_ns:
            self._expire(now)
        batch = self.scheduler.plan(now, self._held())
        if batch is not None:
            self._launch(batch, now)
        moved = False
        if self._in_flight and (batch is None or len(self._in_flight) > self.runner.depth):
            self._collect()
            moved = True
        now = self._clock()
        self._retry_ns = None if batch is not None or moved else now + RETRY_NS
        if now >= self._next_census_ns:
            self._census(now)
        self.outputs.flush(now)

    def _held(self) -> list[int]:
        """Requests of frontends that do not take what they have got."""
        held_up = self.outputs.held_up
        return [rid for rid in self.scheduler.requests if frontend_index(rid) in held_up] if held_up else []

    def _launch(self, batch: PoolBatch, now: int) -> None:
        try:
            handle = self.runner.launch(batch)
        except Exception as error:
            self._batch_failed(batch, error)
        else:
            self._in_flight.append((batch, handle, now))

    def _collect(self) -> None:
        batch, handle, launched_ns = self._in_flight.popleft()
        try:
            results = self.runner.collect(handle)
            assert len(results) == len(batch.items)
        except Exception as error:
            self._batch_failed(batch, error)
            return
        self._failed_inputs = 0
        now = self._clock()
        self.stats.batch(len(batch.items), batch.num_tokens, (now - launched_ns) / 1e9)
        slices: dict[int, list[tuple[int, int, np.ndarray]]] = {}
        for item, result in zip(batch.items, results):
            request, tokens = item.request, len(item)
            request.num_in_flight -= 1
            if request.ended:
                continue
            request.num_computed += 1
            rows = result.rows
            if rows is None or not np.isfinite(rows).all():
                slices.pop(request.rid, None)
                self._fail(request, _item_error(result, item.index))
                continue
            if item.sum is not None:
                item.sum.add(rows, tokens)
                if item.sum.missing:
                    continue
                rows, tokens = self.runner.finish(item.sum.mean, request.params), item.sum.tokens
            request.num_done += 1
            slices.setdefault(request.rid, []).append((item.index, tokens, rows))
        for rid, slice in slices.items():
            self.outputs.emit(rid, slice)
            request = self.requests[rid]
            if request.done:
                self._end(request, "stop")

    def _batch_failed(self, batch: PoolBatch, error: Exception) -> None:
        """The runner itself failed: each input is tried again by itself, and who fails so ends its request."""
        self.stats.batch_errors.inc()
        log.error("batch %d failed with %d inputs", batch.number, len(batch.items), exc_info=error)
        single = len(batch.items) == 1
        self._failed_inputs += single
        if self._failed_inputs >= MAX_FAILED_INPUTS:
            raise error
        for item in batch.items:
            request = item.request
            request.num_in_flight -= 1
            if request.ended:
                continue
            if not single:
                item.failed = True
                request.put(item)
                self.scheduler.add(request)
            elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                self._fail(request, QuartetError("out_of_memory", "The server ran out of memory under this request."))
            else:
                self._fail(request, QuartetError("internal_error", "The engine could not compute this request."))

    def _fail(self, request: PoolRequest, error: QuartetError) -> None:
        self._end(request, "error")
        self.outputs.forget(request.rid)
        self.outputs.fail(request.rid, error)

    def _end(self, request: PoolRequest, reason: str) -> None:
        """Forget a request. One that ended well and did not tell its total may have slices yet to come."""
        now = self._clock()
        request.ended = True
        del self.requests[request.rid]
        self.scheduler.remove(request)
        if request.total or reason != "stop":
            self._over.add(request.rid, now)
        self.stats.finished(request, reason, now)

    def _expire(self, now: int) -> None:
        for request in list(self.requests.values()):
            if request.deadline_ns and request.deadline_ns <= now:
                self._fail(request, QuartetError("timeout", "The request did not end within its time limit."))
        self._next_deadline_ns = min((r.deadline_ns for r in self.requests.values() if r.deadline_ns), default=None)

    def _census(self, now: int) -> None:
        self._next_census_ns = now + self._census_ns
        held: list[list[int]] = [[] for _ in range(self._num_frontends)]
        for rid in self.requests:
            held[frontend_index(rid)].append(rid)
        for frontend, rids in enumerate(held):
            self.outputs.census(frontend, rids)

    # ---- for the stage -------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._in_flight or (self._retry_ns is None and self.scheduler.requests))

    def accepting(self) -> bool:
        return 4 * self.scheduler.waiting_tokens < MAX_WAITING_BYTES

    def next_timer_ns(self) -> int | None:
        timers = [self._next_census_ns]
        if self._next_deadline_ns is not None:
            timers.append(self._next_deadline_ns)
        if self._retry_ns is not None and self.scheduler.requests:
            timers.append(self._retry_ns)
        if self.outputs.retry_ns is not None:
            timers.append(self.outputs.retry_ns)
        return min(timers)

    def load(self) -> Load:
        return Load(running=self.num_running, waiting=self.scheduler.num_waiting,
                    waiting_tokens=self.scheduler.waiting_tokens)

    def assert_invariants(self) -> None:
        """Called by tests after each turn."""
        self.scheduler.assert_invariants()
        assert set(self.scheduler.requests) <= set(self.requests)
        for rid, request in self.requests.items():
            assert rid == request.rid and not request.ended
            assert request.num_items == len(request.waiting) + request.num_in_flight + request.num_computed
            assert request.num_done <= len(request.seen) <= request.num_items
            assert bool(request.waiting) == (rid in self.scheduler.requests)


def _item_error(result: PoolResult, index: int) -> QuartetError:
    if result.error in (None, "numerical_error"):
        return QuartetError("numerical_error", f"The model gave no valid numbers for input {index}.")
    code = result.error if result.error in CATALOGUE else "internal_error"
    return QuartetError(code or "internal_error", f"The engine could not compute input {index}.")
