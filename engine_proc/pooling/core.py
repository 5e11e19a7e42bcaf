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

from engine_proc.failures import failure_of
from engine_proc.pooling.admission import PoolLimits, check
from engine_proc.pooling.plan import PoolBatch, PoolResult, PoolRunner
from engine_proc.pooling.request import PoolRequest
from engine_proc.pooling.scheduler import PoolScheduler
from engine_proc.pooling.stats import PoolStats
from engine_proc.request_core import RequestCore
from pipeline.config import ServerConfig
from pipeline.errors import CATALOGUE, QuartetError
from pipeline.ids import frontend_index
from pipeline.messages import Abort, Load, PoolAdd, PoolAdds
from pipeline.schema import BadFrame
from pipeline.transport import Sender

RETRY_NS = 5_000_000             # how soon to plan again when what waits may not run
MAX_FAILED_INPUTS = 8            # in a row, each by itself; then the process ends and its successor starts afresh
MAX_WAITING_BYTES = 256 * 2**20  # of inputs; more is left in the socket
log = logging.getLogger(__name__)


class PoolingCore(RequestCore[PoolRequest]):
    """One engine process around one pooling runner. `clock` gives monotonic nanoseconds."""

    stats: PoolStats

    def __init__(self, config: ServerConfig, index: int, epoch: int, runner: PoolRunner, sender: Sender,
                 clock: Callable[[], int], registry: CollectorRegistry | None = None) -> None:
        model = config.models[config.engines()[index]]
        super().__init__(config, index, epoch, sender, clock)
        self.runner = runner
        self.scheduler = PoolScheduler(model.engine, runner.padded)
        self.limits = PoolLimits.of(runner, model.max_model_len, model.engine.max_waiting, model.max_embed_len)
        self._in_flight: deque[tuple[PoolBatch, object, int]] = deque()      # with the time of its launch
        self.stats = PoolStats(registry or CollectorRegistry(), model.names[0], index,
                               lambda: self.num_running, lambda: self.scheduler.num_waiting)
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
            self._abort(message)
        else:
            raise BadFrame(f"{type(message).__name__} is not for a pooling engine")

    def _add(self, add: PoolAdd) -> None:
        rid = add.rid
        if not self._is_ours(rid, add.route):
            return
        request = self.requests.get(rid)
        try:
            check(add, self.limits, 0 if request is not None else len(self.requests))
        except QuartetError as error:
            self._refuse(rid, error)
            return
        if request is None:
            request = PoolRequest.of(add, self._arrival, self._clock())
            self._keep(request)
        for given in add.inputs:
            if not request.add(given):
                self.stats.drop("duplicate")
        self.scheduler.add(request)
        if request.done:                                     # a slice without inputs
            self._end(request, "stop")

    # ---- the loop ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Plan and launch a batch, or collect the oldest; then tell everyone."""
        now = self._clock()
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
        self._tell(now)

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
            else:
                self._fail(request, failure_of(error))

    def _end(self, request: PoolRequest, reason: str) -> None:
        """Forget a request. One that ended well and did not tell its total may have slices yet to come."""
        now = self._clock()
        request.ended = True
        del self.requests[request.rid]
        self.scheduler.remove(request)
        if request.total or reason != "stop":
            self._over.add(request.rid, now)
        self.stats.finished(request, reason, now)

    # ---- for the stage -------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._in_flight or (self._retry_ns is None and self.scheduler.requests))

    def accepting(self) -> bool:
        return 4 * self.scheduler.waiting_tokens < MAX_WAITING_BYTES

    def next_timer_ns(self) -> int | None:
        return self._next_timer_ns(waits=bool(self.scheduler.requests))

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
