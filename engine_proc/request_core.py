"""What the engines of pooling and of speech share: whose messages are taken, aborts, deadlines, deaths of frontends, censuses.

Engine process, main thread; base of `engine_proc.pooling.core` and `engine_proc.speech.core`, whose loops are their own.
A request that ends is forgotten at once, and what still comes of it is dropped. Imports no torch; never blocks on a peer.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from prometheus_client import Counter

from engine_proc.admission import Tombstones
from engine_proc.frontends import aborted, by_frontend
from engine_proc.pooling.outputs import PoolOutputs
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError
from pipeline.ids import child, family, frontend_index, outlived
from pipeline.messages import Abort, Kind, Route
from pipeline.transport import Sender


class Held(Protocol):
    """A request as far as this file is concerned."""

    rid: int
    deadline_ns: int


class Drops(Protocol):
    """Where messages that come too late or to the wrong place are counted."""

    refused: Counter

    def drop(self, reason: str) -> None: ...


R = TypeVar("R", bound=Held)


class RequestCore(ABC, Generic[R]):
    """The requests of one engine process. `clock` gives monotonic nanoseconds."""

    stats: Drops

    def __init__(self, config: ServerConfig, index: int, epoch: int, sender: Sender, clock: Callable[[], int]) -> None:
        self.index, self.epoch, self._clock = index, epoch, clock
        self.outputs = PoolOutputs(index, epoch, sender)
        self.requests: dict[int, R] = {}                     # rid -> request that has not ended
        self._over = Tombstones(65_536)                      # submissions that ended: what comes of them is dropped
        self._frontends: dict[int, int] = {}                 # newest epoch known
        self._num_frontends = config.frontends
        self._census_ns = int(config.timeouts.census_s * 1e9)
        self._next_census_ns = clock() + self._census_ns
        self._next_deadline_ns: int | None = None            # of the requests held; may be that of one that ended
        self._retry_ns: int | None = None                    # nothing could be planned: try again then
        self._arrival = 0

    @abstractmethod
    def _end(self, request: R, reason: str) -> None:
        """Forget a request; `reason` is for statistics."""

    # ---- messages ------------------------------------------------------------------------------------------------

    def _is_ours(self, rid: int, route: Route) -> bool:
        """Whether work for `rid` is for this engine and for a request that has not ended; counted if not."""
        if ((route.engine, route.engine_epoch) != (self.index, self.epoch) or child(rid)
                or frontend_index(rid) >= self._num_frontends):
            self.stats.drop("misrouted")                     # meant for our predecessor
        elif self._orphaned(rid):
            self.stats.drop("frontend_gone")
        elif self._over.holds(rid, self._clock()):
            self.stats.drop("aborted")                       # or failed: the rest of a request that ended
        else:
            return True
        return False

    def _refuse(self, rid: int, error: QuartetError) -> None:
        """Work for `rid` that cannot be done ends its request, if there is one already."""
        self.stats.refused.inc()
        request = self.requests.get(rid)
        if request is None:
            self._over.add(rid, self._clock())
            self.outputs.fail(rid, error)
        else:
            self._fail(request, error)

    def _keep(self, request: R) -> None:
        """Hold a new request until it ends, at its deadline if not before."""
        self.requests[request.rid] = request
        self._arrival += 1
        if request.deadline_ns:
            self._next_deadline_ns = min(request.deadline_ns, self._next_deadline_ns or request.deadline_ns)

    def _abort(self, message: Abort) -> None:
        for rid in map(family, aborted(message)):
            request = self.requests.get(rid)
            if request is None:
                self._over.add(rid, self._clock())           # it may have overtaken its work
                self.stats.drop("unknown_abort")
            else:
                self._end(request, "abort")
                self.outputs.forget(rid)

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        if kind is not Kind.FRONTEND or epoch <= self._frontends.get(index, 0):
            return
        self._frontends[index] = epoch
        self._retry_ns = None
        self.outputs.peer_restarted(kind, index)
        for request in [r for r in self.requests.values() if self._orphaned(r.rid)]:
            self._end(request, "abort")

    def _orphaned(self, rid: int) -> bool:
        """Whether the frontend process that made `rid` is gone."""
        known = self._frontends.get(frontend_index(rid))
        return known is not None and outlived(rid, known)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _fail(self, request: R, error: QuartetError) -> None:
        self._end(request, "error")
        self.outputs.forget(request.rid)
        self.outputs.fail(request.rid, error)

    def _expire(self, now: int) -> None:
        """End what is past its deadline."""
        if self._next_deadline_ns is None or now < self._next_deadline_ns:
            return
        for request in list(self.requests.values()):
            if request.deadline_ns and request.deadline_ns <= now:
                self._fail(request, QuartetError("timeout", "The request did not end within its time limit."))
        self._next_deadline_ns = min((r.deadline_ns for r in self.requests.values() if r.deadline_ns), default=None)

    def _tell(self, now: int) -> None:
        """A census where one is due, and what waits for frontends."""
        if now >= self._next_census_ns:
            self._next_census_ns = now + self._census_ns
            for frontend, rids in enumerate(by_frontend(self.requests, self._num_frontends)):
                self.outputs.census(frontend, rids)
        self.outputs.flush(now)

    # ---- for the stage -------------------------------------------------------------------------------------------

    def _next_timer_ns(self, *, waits: bool) -> int:
        """`waits`: something is to be planned again at the retry time."""
        timers = (self._next_census_ns, self._next_deadline_ns, self._retry_ns if waits else None, self.outputs.retry_ns)
        return min(timer for timer in timers if timer is not None)
