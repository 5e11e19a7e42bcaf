"""Recordings that are being transcribed: owned from acceptance to their one terminal event, whatever dies in between.

Part of the request table, which runs it. A recording lies in a spool file until its request is closed, so that it can be
submitted again; results come window by window, in any order, and are handed out in order. How far the tokenizer may run
ahead of the results is decided here (credit). Never reads the file.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from frontend.admission import Permit
from frontend.stages import Stages
from pipeline.errors import QuartetError
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    AbortReason,
    AudioCredit,
    Kind,
    Route,
    SubmitAudio,
    Transcribed,
    pack_ids,
    pack_rids,
)
from pipeline.params import SpeechParams
from pipeline.transport import Address, Sender

ALONE_AFTER = 2                      # engine deaths under a request, after which it runs alone
AHEAD = 24                           # windows of one recording that may be on their way


@dataclass(slots=True, kw_only=True)
class RecordingSpec:
    """A recording with every default filled in."""

    model: int
    path: str                                # its spool file, deleted with the request
    num_bytes: int
    params: SpeechParams
    deadline_ns: int = 0
    priority: int = 0


@dataclass(slots=True, eq=False)
class RecordingRequest:
    """One accepted request. `wake` is called whenever `take` may give more, and at the terminal event."""

    spec: RecordingSpec
    wake: Callable[[], None]
    permit: Permit | None
    arrival_ns: int
    windows: dict[int, Transcribed] = field(default_factory=dict)    # results, by number
    total: int = 0                           # windows; 0: the last one has not come
    num_taken: int = 0                       # handed out by `take`
    rid: int = 0                             # of its submission
    route: Route | None = None               # None: waits for a stage
    credit: int = 0                          # what its tokenizer was told
    again: bool = False                      # submitted before: never refused for load
    deaths: int = 0
    first_ns: int = 0                        # when the first result came
    error: QuartetError | None = None
    ended: AbortReason | None = None
    closed: bool = False

    @property
    def complete(self) -> bool:
        return 0 < self.total == len(self.windows)

    @property
    def done(self) -> bool:
        return self.error is not None or self.complete

    @property
    def language(self) -> str:
        """What is spoken; empty while nobody knows, and for models of one language."""
        return self.spec.params.language or next((w.language for w in self.windows.values() if w.language), "")

    @property
    def duration_s(self) -> float:
        """Of what has been heard so far."""
        return max((window.start_s + window.seconds for window in self.windows.values()), default=0.0)

    @property
    def tokens(self) -> int:
        return sum(window.tokens for window in self.windows.values())

    def take(self) -> list[Transcribed]:
        """The windows that follow those taken before, as far as they have come."""
        first = self.num_taken
        while self.num_taken in self.windows:
            self.num_taken += 1
        return [self.windows[number] for number in range(first, self.num_taken)]

    def results(self) -> list[Transcribed]:
        """All windows in order; for a request that ended well."""
        return [self.windows[number] for number in range(self.total)]

    @property
    def horizon(self) -> int:
        """The first window that may not be on its way yet."""
        number = self.num_taken
        while number in self.windows:
            number += 1
        return number + AHEAD


class Observer(Protocol):
    """Told about what is measured; see frontend.metrics."""

    def closed(self, request: RecordingRequest, reason: AbortReason | None) -> None: ...
    def resubmitted(self, why: str) -> None: ...
    def unknown(self, what: str) -> None: ...


class Recordings:
    """Every recording of this frontend that is not closed."""

    def __init__(self, rids: RidMaker, stages: Stages, sender: Sender, now_ns: Callable[[], int], observer: Observer,
                 tokenizer_load: Counter[int]) -> None:
        """`tokenizer_load`: bytes at each tokenizer, shared with the other requests."""
        self._rids, self._stages, self._sender, self._now_ns = rids, stages, sender, now_ns
        self._observer, self._tokenizer_load = observer, tokenizer_load
        self._engine_load: Counter[int] = Counter()          # recordings at each engine
        self._requests: set[RecordingRequest] = set()
        self._sent: dict[int, RecordingRequest] = {}         # by the id of the submission, unsent ones included
        self._alone: dict[int, int] = {}                     # engine -> the one submission that runs alone there

    def __len__(self) -> int:
        return len(self._requests)

    # ---- for handlers ----------------------------------------------------------------------------------------

    def open(self, spec: RecordingSpec, wake: Callable[[], None], permit: Permit | None = None) -> RecordingRequest:
        """Accept a recording and submit it; QuartetError where there is no room. Permit and file go along."""
        request = RecordingRequest(spec, wake, permit, self._now_ns())
        self._requests.add(request)
        if not self._submit(request) and self._stages.available(spec.model):
            request.error = QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")
            self.close(request, AbortReason.ERROR)
            raise request.error
        return request

    def close(self, request: RecordingRequest, reason: AbortReason = AbortReason.CLIENT_GONE) -> None:
        """Forget a request, abort what is unfinished of it, delete its file, release its permit. Idempotent."""
        if request.closed:
            return
        request.closed = True
        if not request.done:
            request.ended = request.ended or reason
        self._end(request, reason)
        self._requests.discard(request)
        with contextlib.suppress(OSError):
            os.unlink(request.spec.path)
        if request.permit is not None:
            request.permit.release()
        self._observer.closed(request, request.ended)

    def fail(self, request: RecordingRequest, error: QuartetError, reason: AbortReason) -> None:
        """The terminal event of a request that cannot be completed."""
        if not request.done:
            request.error, request.ended = error, reason
            self._end(request, reason)
            request.wake()

    def fail_all(self, error: QuartetError) -> None:
        for request in list(self._requests):
            self.fail(request, error, AbortReason.SHUTDOWN)

    # ---- from the stages -------------------------------------------------------------------------------------

    def knows(self, rid: int) -> bool:
        return rid in self._sent

    def on_transcribed(self, message: Transcribed) -> None:
        """What is said in one window. What is not ours any more is counted."""
        request = self._sent.get(message.rid)
        if request is None or message.index in request.windows:
            self._observer.unknown("transcribed")
            return
        request.windows[message.index] = message
        request.first_ns = request.first_ns or self._now_ns()
        if message.last:
            request.total = message.index + 1
        if request.complete:
            # An engine that was not given all windows does not know that this was the last one: tell it.
            self._end(request, AbortReason.STAGE_LOST)
        else:
            self._extend(request)
        request.wake()

    def on_failed(self, rid: int, error: QuartetError) -> bool:
        """End the request of submission `rid` with an error; False if there is none."""
        request = self._sent.get(rid)
        if request is None:
            return False
        if error.code == "server_overloaded" and request.again:
            self._drop(request)                              # waits here until the engine has room
            self._register(request)
        else:
            self.fail(request, error, AbortReason.ERROR)
        return True

    def stage_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        """What the predecessor of this process may have held is submitted again."""
        for request in list(self._sent.values()):
            route = request.route
            if route is None:
                continue
            if kind is Kind.ENGINE and route.engine == index and route.engine_epoch != epoch:
                request.deaths += 1
                self._again(request, "engine")
            # Windows are handed over in order: with the last one's result the tokenizer has nothing left to do.
            elif (kind is Kind.TOKENIZER and route.tokenizer == index and route.tokenizer_epoch != epoch
                    and not request.total):
                self._again(request, "tokenizer")

    def tick(self, grace_ns: int, timeout: QuartetError, failed: Callable[[int], bool], gone: QuartetError) -> None:
        """Deadlines, models that were given up, and what waits for a stage or for room in an outbox."""
        now = self._now_ns()
        for request in list(self._requests):
            deadline = request.spec.deadline_ns
            if deadline and now > deadline + (0 if request.route is None else grace_ns):
                self.fail(request, timeout, AbortReason.DEADLINE)
            elif failed(request.spec.model):
                self.fail(request, gone, AbortReason.STAGE_LOST)
            elif request.route is not None and not request.done:
                self._extend(request)
        self.flush()

    def flush(self) -> None:
        """Send what waits, oldest first."""
        for request in [r for r in self._sent.values() if r.route is None]:
            self._send(request)

    # ---- inside ----------------------------------------------------------------------------------------------

    def _submit(self, request: RecordingRequest) -> bool:
        """Register a request under a fresh id and send it; False when it has to wait."""
        self._register(request)
        return self._send(request)

    def _register(self, request: RecordingRequest) -> None:
        request.rid, request.route = self._rids.next(), None
        self._sent[request.rid] = request

    def _send(self, request: RecordingRequest) -> bool:
        spec = request.spec
        route = self._stages.pool_route(spec.model, self._engine_load, self._tokenizer_load)
        alone = request.deaths >= ALONE_AFTER
        if route is None or (alone and route.engine in self._alone):
            return False
        params = spec.params
        if request.windows:                                  # as it was recognised before
            params = dataclasses.replace(params, language=request.language or None)
        message = SubmitAudio(
            request.rid, route, spec.model, spec.path, params, request.horizon, pack_ids(sorted(request.windows)),
            spec.deadline_ns, spec.priority, alone)
        if not self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), message):
            return False
        request.route, request.credit = route, request.horizon
        self._engine_load[route.engine] += 1
        self._tokenizer_load[route.tokenizer] += spec.num_bytes
        if alone:
            self._alone[route.engine] = request.rid
        return True

    def _extend(self, request: RecordingRequest) -> None:
        """Let the tokenizer go on. What its outbox does not take is told later."""
        route, horizon = request.route, request.horizon
        if route is not None and horizon > request.credit and not request.total:
            message = AudioCredit(request.rid, route.tokenizer_epoch, horizon)
            if self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), message):
                request.credit = horizon

    def _drop(self, request: RecordingRequest) -> None:
        """Take a submission out of every index."""
        del self._sent[request.rid]
        route, request.route = request.route, None
        if route is not None:
            self._engine_load[route.engine] -= 1
            self._tokenizer_load[route.tokenizer] -= request.spec.num_bytes
            if self._alone.get(route.engine) == request.rid:
                del self._alone[route.engine]

    def _again(self, request: RecordingRequest, why: str) -> None:
        """Abort a submission and submit what is left of it under a fresh id."""
        self._abort(request, AbortReason.STAGE_LOST)
        self._drop(request)
        if request.deaths > ALONE_AFTER:
            self.fail(request, QuartetError("poisoned_request", "The engine died three times under this request; it is "
                                            "not tried again."), AbortReason.STAGE_LOST)
            return
        self._observer.resubmitted(why)
        request.again = True
        self._submit(request)

    def _end(self, request: RecordingRequest, reason: AbortReason) -> None:
        if request.rid in self._sent:
            if not request.complete or request.again:
                self._abort(request, reason)
            self._drop(request)

    def _abort(self, request: RecordingRequest, reason: AbortReason) -> None:
        route = request.route
        if route is not None:
            message = Abort(pack_rids([request.rid]), reason)
            self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), message)
            self._sender.send(Address(Kind.ENGINE, route.engine, "ctl"), message)

    def assert_invariants(self) -> None:
        """Every index agrees with every other one."""
        for request in self._requests:
            assert not request.closed and (request.rid in self._sent) != request.done
        for rid, request in self._sent.items():
            assert request.rid == rid and request in self._requests
            assert request.route is None or request.credit <= request.horizon
        engines = Counter(r.route.engine for r in self._sent.values() if r.route is not None)
        assert +self._engine_load == engines
        for engine, rid in self._alone.items():
            route = self._sent[rid].route
            assert route is not None and route.engine == engine
