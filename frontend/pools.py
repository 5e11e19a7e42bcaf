"""Pooling requests: owned from acceptance to their one terminal event, whatever dies in between.

Part of the request table, which runs it; the sibling of frontend.submissions for requests whose answer is numbers. The
inputs of a request travel as submissions (one, or one for each replica that shares the work); after a death the inputs
that have no result yet are submitted again under a fresh id. Results are kept as they came, without a copy.
"""
from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from frontend.admission import Permit
from frontend.stages import Stages
from pipeline.errors import QuartetError
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    AbortReason,
    Kind,
    Pooled,
    PoolHanded,
    PoolText,
    Route,
    SubmitPool,
    pack_rids,
    unpack_ids,
)
from pipeline.params import PoolParams
from pipeline.schema import BadFrame
from pipeline.transport import Address, Sender

ALONE_AFTER = 2                      # engine deaths under inputs, after which they run alone
SHARE_INPUTS = 32                    # least inputs that are worth a replica of their own
MAX_RESULT_BYTES = 256 * 2**20       # of one request
SILENT_NS = 10 * 10**9               # missing from two censuses and silent for so long: submitted again
_INPUT = re.compile(r"input\[(\d+)\]")


@dataclass(slots=True, kw_only=True)
class PoolSpec:
    """A pooling request with every default filled in."""

    model: int
    inputs: list[PoolText]                   # `index` counts from 0
    params: PoolParams
    add_special: bool = True
    truncate: int | None = None
    truncate_left: bool = False
    longest: int = 0                         # tokens of an input that is computed in parts; 0: none is
    deadline_ns: int = 0
    priority: int = 0
    name_of: Callable[[int], str] = "input[{}]".format       # what the caller calls an input

    @property
    def num_bytes(self) -> int:
        return sum(map(size_of, self.inputs))


def size_of(text: PoolText) -> int:
    """What a tokenizer has to do for an input."""
    chat = len(text.chat.messages_json) if text.chat is not None else 0
    return len(text.text or "") + len(text.pair or "") + len(text.ids) + chat + 1


@dataclass(slots=True, eq=False)
class PoolSubmission:
    """Inputs on their way through the pipeline; `waiting` shrinks as results come."""

    rid: int
    request: PoolRequest
    waiting: set[int]
    route: Route | None = None               # None: waits for a stage
    handed: bool = False                     # the tokenizer has let go of it
    deaths: int = 0                          # engines that died under its inputs
    again: bool = False                      # submitted before: never refused for load
    num_bytes: int = 0                       # counted as its tokenizer's load
    num_inputs: int = 0                      # counted as its engine's load
    missing: int = 0                         # censuses in a row that did not list it
    heard_ns: int = 0

    @property
    def alone(self) -> bool:
        return self.deaths >= ALONE_AFTER

    def message(self, route: Route) -> SubmitPool:
        spec = self.request.spec
        inputs = spec.inputs if len(self.waiting) == len(spec.inputs) else [spec.inputs[i] for i in sorted(self.waiting)]
        return SubmitPool(self.rid, route, spec.model, inputs, spec.params, spec.add_special, spec.truncate,
                          spec.truncate_left, spec.deadline_ns, spec.priority, self.alone, spec.longest)


@dataclass(slots=True, eq=False)
class PoolRequest:
    """One accepted request. `wake` is called at its terminal event: every input has its rows, or `error` is set."""

    spec: PoolSpec
    wake: Callable[[], None]
    permit: Permit | None
    arrival_ns: int
    rows: list[np.ndarray | None] = field(default_factory=list)      # per input, float32 [rows, D]
    lengths: array[int] = field(default_factory=lambda: array("I"))  # tokens per input
    missing: int = 0                         # inputs without a result
    num_bytes: int = 0                       # of results
    error: QuartetError | None = None
    ended: AbortReason | None = None
    closed: bool = False
    submissions: set[int] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.error is not None or self.missing == 0

    @property
    def prompt_tokens(self) -> int:
        return sum(self.lengths)

    def results(self) -> list[np.ndarray]:
        """The rows of every input, in order; for a request that ended well."""
        return [rows for rows in self.rows if rows is not None]


class PoolObserver(Protocol):
    """Told about what is measured; see frontend.metrics."""

    def closed(self, request: PoolRequest, reason: AbortReason | None) -> None: ...
    def resubmitted(self, why: str) -> None: ...
    def unknown(self, what: str) -> None: ...


class Pools:
    """Every pooling request of this frontend that is not closed."""

    def __init__(self, rids: RidMaker, stages: Stages, sender: Sender, now_ns: Callable[[], int],
                 observer: PoolObserver, tokenizer_load: Counter[int]) -> None:
        """`tokenizer_load`: bytes at each tokenizer, shared with the other requests."""
        self._rids, self._stages, self._sender, self._now_ns = rids, stages, sender, now_ns
        self._observer, self._tokenizer_load = observer, tokenizer_load
        self._engine_load: Counter[int] = Counter()          # inputs at each engine
        self._requests: set[PoolRequest] = set()
        self._submissions: dict[int, PoolSubmission] = {}
        self._unsent: dict[int, PoolSubmission] = {}
        self._alone: dict[int, int] = {}                     # engine -> the one submission that runs alone there

    def __len__(self) -> int:
        return len(self._requests)

    # ---- for handlers ----------------------------------------------------------------------------------------

    def open(self, spec: PoolSpec, wake: Callable[[], None], permit: Permit | None = None) -> PoolRequest:
        """Accept a request and submit its inputs; QuartetError where there is no room. The permit goes along."""
        count = len(spec.inputs)
        request = PoolRequest(spec, wake, permit, self._now_ns(), [None] * count, array("I", bytes(4 * count)), count)
        self._requests.add(request)
        shares = max(1, min(self._stages.num_ready(spec.model), count // SHARE_INPUTS))
        for share in range(shares):
            if not self._submit(request, set(range(share, count, shares))) and self._stages.available(spec.model):
                request.error = QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")
                self.close(request, AbortReason.ERROR)
                raise request.error
        return request

    def close(self, request: PoolRequest, reason: AbortReason = AbortReason.CLIENT_GONE) -> None:
        """Forget a request, abort what is unfinished of it, release its permit. Idempotent."""
        if request.closed:
            return
        request.closed = True
        if not request.done:
            request.ended = request.ended or reason
        self._end(request, reason)
        self._requests.discard(request)
        if request.permit is not None:
            request.permit.release()
        self._observer.closed(request, request.ended)

    def fail(self, request: PoolRequest, error: QuartetError, reason: AbortReason) -> None:
        """The terminal event of a request that cannot be completed."""
        if not request.done:
            request.error, request.ended = _renamed(error, request.spec.name_of), reason
            self._end(request, reason)
            request.wake()

    def fail_all(self, error: QuartetError) -> None:
        for request in list(self._requests):
            self.fail(request, error, AbortReason.SHUTDOWN)

    # ---- from the stages -------------------------------------------------------------------------------------

    def knows(self, rid: int) -> bool:
        return rid in self._submissions

    def on_pooled(self, message: Pooled) -> None:
        """Results of some inputs. What is not ours any more is counted; what cannot be is a bad frame."""
        submission = self._submissions.get(message.rid)
        if submission is None:
            self._observer.unknown("pooled")
            return
        try:
            indices, lengths, rows = (unpack_ids(b) for b in (message.indices, message.lengths, message.rows))
        except ValueError:
            raise BadFrame("results of ragged numbers") from None
        data, request = message.data, submission.request
        if not len(indices) == len(lengths) == len(rows) or data.ndim != 2 or sum(rows) != len(data) \
                or data.dtype != np.float32:
            raise BadFrame("results that do not fit their indices")
        submission.missing, submission.heard_ns, start = 0, self._now_ns(), 0
        for index, length, count in zip(indices, lengths, rows):
            if index in submission.waiting:
                submission.waiting.discard(index)
                self._arrived(submission, size_of(request.spec.inputs[index]))
                request.rows[index], request.lengths[index] = data[start:start + count], length
                request.num_bytes += data.itemsize * data.shape[1] * count
                request.missing -= 1
            start += count
        if not submission.waiting:
            self._drop(submission)
        if request.num_bytes > MAX_RESULT_BYTES:
            self.fail(request, QuartetError("invalid_value", f"The answer would have more than {MAX_RESULT_BYTES >> 20} MiB"
                                            " of numbers: send fewer or shorter inputs.", "input"), AbortReason.ERROR)
        elif request.missing == 0:
            request.wake()

    def on_handed(self, message: PoolHanded) -> None:
        submission = self._submissions.get(message.rid)
        if submission is not None:
            submission.handed, submission.heard_ns = True, self._now_ns()

    def on_failed(self, rid: int, error: QuartetError) -> bool:
        """End the request of submission `rid` with an error; False if there is none."""
        submission = self._submissions.get(rid)
        if submission is None:
            return False
        if error.code == "server_overloaded" and submission.again:
            self._drop(submission)                           # waits here until the engine has room
            self._submit(submission.request, submission.waiting, send=False, before=submission)
        else:
            self.fail(submission.request, error, AbortReason.ERROR)
        return True

    def stage_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        """What the predecessor of this process may have held is submitted again."""
        for submission in list(self._submissions.values()):
            route = submission.route
            if route is None or submission.rid not in self._submissions:
                continue
            if kind is Kind.ENGINE and route.engine == index and route.engine_epoch != epoch:
                submission.deaths += 1
                self._again(submission, "engine")
            elif kind is Kind.TOKENIZER and route.tokenizer == index and route.tokenizer_epoch != epoch:
                self._again(submission, "tokenizer")

    def on_census(self, engine: int, epoch: int, held: set[int]) -> None:
        """Submit again what the engine should hold, does not, and has long been silent about."""
        now = self._now_ns()
        for submission in list(self._submissions.values()):
            route = submission.route
            if route is None or not submission.handed or (route.engine, route.engine_epoch) != (engine, epoch):
                continue
            submission.missing = 0 if submission.rid in held else submission.missing + 1
            if submission.missing >= 2 and now - submission.heard_ns >= SILENT_NS:
                self._again(submission, "census")

    def tick(self, grace_ns: int, timeout: QuartetError, failed: Callable[[int], bool], gone: QuartetError) -> None:
        """Deadlines, models that were given up, and what waits for a stage."""
        now = self._now_ns()
        for request in list(self._requests):
            deadline = request.spec.deadline_ns
            waits = any(rid in self._unsent for rid in request.submissions)     # no engine keeps its deadline
            if deadline and now > deadline + (0 if waits else grace_ns):
                self.fail(request, timeout, AbortReason.DEADLINE)
            elif failed(request.spec.model):
                self.fail(request, gone, AbortReason.STAGE_LOST)
        self.flush()

    def flush(self) -> None:
        """Send what waits, oldest first."""
        for submission in list(self._unsent.values()):
            if self._send(submission):
                del self._unsent[submission.rid]

    # ---- inside ----------------------------------------------------------------------------------------------

    def _submit(self, request: PoolRequest, waiting: set[int], *, send: bool = True,
                before: PoolSubmission | None = None) -> bool:
        """Register inputs under a fresh id and send them; False when they have to wait. `before`: what they were part of."""
        submission = PoolSubmission(self._rids.next(), request, waiting, heard_ns=self._now_ns())
        if before is not None:
            submission.deaths, submission.again = before.deaths, True
        self._submissions[submission.rid] = submission
        request.submissions.add(submission.rid)
        if send and self._send(submission):
            return True
        self._unsent[submission.rid] = submission
        return False

    def _send(self, submission: PoolSubmission) -> bool:
        spec = submission.request.spec
        route = self._stages.pool_route(spec.model, self._engine_load, self._tokenizer_load)
        if route is None or (submission.alone and route.engine in self._alone):
            return False
        if not self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), submission.message(route)):
            return False
        submission.route, submission.num_inputs = route, len(submission.waiting)
        submission.num_bytes = sum(size_of(spec.inputs[i]) for i in submission.waiting)
        self._engine_load[route.engine] += submission.num_inputs
        self._tokenizer_load[route.tokenizer] += submission.num_bytes
        if submission.alone:
            self._alone[route.engine] = submission.rid
        return True

    def _arrived(self, submission: PoolSubmission, num_bytes: int) -> None:
        assert submission.route is not None
        submission.num_inputs -= 1
        submission.num_bytes -= num_bytes
        self._engine_load[submission.route.engine] -= 1
        self._tokenizer_load[submission.route.tokenizer] -= num_bytes

    def _drop(self, submission: PoolSubmission) -> None:
        """Take a submission out of every index."""
        del self._submissions[submission.rid]
        self._unsent.pop(submission.rid, None)
        submission.request.submissions.discard(submission.rid)
        route = submission.route
        if route is not None:
            self._engine_load[route.engine] -= submission.num_inputs
            self._tokenizer_load[route.tokenizer] -= submission.num_bytes
            if self._alone.get(route.engine) == submission.rid:
                del self._alone[route.engine]

    def _again(self, submission: PoolSubmission, why: str) -> None:
        """Abort a submission and submit what is left of it under a fresh id."""
        request = submission.request
        self._abort(submission, AbortReason.STAGE_LOST)
        self._drop(submission)
        if submission.deaths > ALONE_AFTER:
            self.fail(request, QuartetError("poisoned_request", "The engine died three times under this request; it is "
                                            "not tried again."), AbortReason.STAGE_LOST)
            return
        self._observer.resubmitted(why)
        self._submit(request, submission.waiting, before=submission)

    def _end(self, request: PoolRequest, reason: AbortReason) -> None:
        for rid in list(request.submissions):
            self._abort(self._submissions[rid], reason)
            self._drop(self._submissions[rid])

    def _abort(self, submission: PoolSubmission, reason: AbortReason) -> None:
        route = submission.route
        if route is not None:
            message = Abort(pack_rids([submission.rid]), reason)
            if not submission.handed:
                self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), message)
            self._sender.send(Address(Kind.ENGINE, route.engine, "ctl"), message)

    def assert_invariants(self) -> None:
        """Every index agrees with every other one."""
        for request in self._requests:
            assert not request.closed
            assert request.missing == sum(rows is None for rows in request.rows)
            owed = [i for rid in request.submissions for i in self._submissions[rid].waiting]
            assert request.error is not None or sorted(owed) == [i for i, r in enumerate(request.rows) if r is None]
            assert not request.done or not request.submissions
        for rid, submission in self._submissions.items():
            assert submission.rid == rid and submission.waiting and rid in submission.request.submissions
            assert submission.request in self._requests
            assert (submission.route is None) == (rid in self._unsent)
            assert submission.route is None or submission.num_inputs == len(submission.waiting)
        assert set(self._unsent) <= set(self._submissions)
        for engine, rid in self._alone.items():
            found = self._submissions[rid]
            assert found.alone and found.route is not None and found.route.engine == engine


def _renamed(error: QuartetError, name_of: Callable[[int], str]) -> QuartetError:
    """The error in the caller's terms: the pipeline calls every input ``input[i]``."""
    def name(match: re.Match[str]) -> str:
        return name_of(int(match.group(1)))
    return QuartetError(error.code, _INPUT.sub(name, error.message),
                        None if error.param is None else _INPUT.sub(name, error.param))
