"""The request table: owner of every accepted request until its one terminal event.

Pure logic for the frontend's one thread: no sanic, no zmq; clock, ids, stages and sender are given. It survives the
death of any other stage by one mechanism (`_again`): what is left of a submission is aborted under its old id and
submitted under a fresh one, with the output so far as history. It never blocks and never refuses a continuation.
"""
from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from frontend.admission import Permit
from frontend.pools import PoolRequest, Pools, PoolSpec
from frontend.queries import Queries, Query, QueryMessage
from frontend.recordings import RecordingRequest, Recordings, RecordingSpec
from frontend.request import Choice, Prompt, Request, Spec, Submission
from frontend.stages import Stages
from frontend.submissions import ALONE_AFTER, Submissions
from pipeline.errors import CATALOGUE, QuartetError
from pipeline.families.parts import Part, skip_spans
from pipeline.ids import RidMaker, child
from pipeline.logprobs import cut_logprobs, size_of
from pipeline.messages import (
    TEXT_ROW,
    Abort,
    AbortReason,
    Admitted,
    AdmittedItem,
    Census,
    Deltas,
    DetokenizeAnswer,
    Failed,
    FailedItem,
    Finish,
    Kind,
    Logprobs,
    Pooled,
    PoolHanded,
    Route,
    TextDelta,
    TokenizeAnswer,
    Transcribed,
    Usage,
    pack_rids,
    unpack_ids,
    unpack_rids,
)
from pipeline.schema import BadFrame
from pipeline.transport import Address, Sender

SILENT_S = 10.0                  # a choice missing from two censuses is submitted again when silent for so long
MAX_GAPS = 5                     # times that output of one choice may get lost before it is given up
NO_SPANS: Sequence[tuple[int, int]] = ()
DEADLINE_GRACE_S = 2.0           # the engine keeps the deadline; the table is the backstop


class Observer(Protocol):
    """Told about what is measured; see frontend.metrics."""

    def first_token(self, request: Request, seconds: float) -> None: ...
    def next_token(self, request: Request, seconds: float) -> None: ...
    def closed(self, request: Request | PoolRequest | RecordingRequest, reason: AbortReason | None) -> None: ...
    def resubmitted(self, why: str) -> None: ...
    def unknown(self, what: str) -> None: ...


class RequestTable:
    """Everything that this frontend has accepted and not closed."""

    def __init__(self, rids: RidMaker, stages: Stages, sender: Sender, now_ns: Callable[[], int],
                 observer: Observer) -> None:
        self._stages, self._sender, self._now_ns, self._observer = stages, sender, now_ns, observer
        self.draining = False
        self._requests: set[Request] = set()
        self._submissions = Submissions(rids, stages, sender, now_ns)
        self.queries = Queries(rids, stages, sender, self._submissions.tokenizer_load, now_ns)
        self.pools = Pools(rids, stages, sender, now_ns, observer, self._submissions.tokenizer_load)
        self.recordings = Recordings(rids, stages, sender, now_ns, observer, self._submissions.tokenizer_load)
        self._handlers: dict[type, Callable[[Any], None]] = {
            Deltas: self._on_deltas, Admitted: self._on_admitted, Failed: self._on_failed, Census: self._on_census,
            TokenizeAnswer: self.queries.answered, DetokenizeAnswer: self.queries.answered,
            Pooled: self.pools.on_pooled, PoolHanded: self.pools.on_handed,
            Transcribed: self.recordings.on_transcribed}

    def __len__(self) -> int:
        return len(self._requests) + len(self.queries) + len(self.pools) + len(self.recordings)

    # ---- for readers -----------------------------------------------------------------------------------------

    def open(self, spec: Spec, wake: Callable[[], None], permit: Permit | None = None) -> Request:
        """Accept a request: register it, then submit its prompts. QuartetError where it cannot be accepted.

        `wake` is called whenever `Request.take` may give more, and at the terminal event. The permit is the table's
        from here on, also when this raises.
        """
        request = Request(spec, wake, permit, self._now_ns())
        self._requests.add(request)
        try:
            self._check_open(spec.model)
            for p, prompt in enumerate(spec.prompts):
                choices = request.choices[p * spec.n:(p + 1) * spec.n]
                if not self._submissions.submit(request, prompt, choices) and self._stages.available(spec.model):
                    raise QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")
        except QuartetError as error:
            request.error = error
            self.close(request, AbortReason.ERROR)
            raise
        return request

    def pool(self, spec: PoolSpec, wake: Callable[[], None], permit: Permit | None = None) -> PoolRequest:
        """Accept a pooling request; `wake` is called at its terminal event. Close it with `pools.close`."""
        try:
            self._check_open(spec.model)
        except QuartetError:
            if permit is not None:
                permit.release()
            raise
        return self.pools.open(spec, wake, permit)

    def record(self, spec: RecordingSpec, wake: Callable[[], None], permit: Permit | None = None) -> RecordingRequest:
        """Accept a recording; `wake` is called when `take` may give more. Close it with `recordings.close`.

        QuartetError leaves the file to the caller.
        """
        try:
            self._check_open(spec.model)
        except QuartetError:
            if permit is not None:
                permit.release()
            raise
        return self.recordings.open(spec, wake, permit)

    def query(self, make: QueryMessage, wake: Callable[[], None], deadline_ns: int) -> Query:
        """Ask a tokenizer; `make` builds the message from a fresh id and the tokenizer's epoch."""
        if self.draining:
            raise _draining()
        return self.queries.open(make, wake, deadline_ns)

    def close(self, request: Request, reason: AbortReason = AbortReason.CLIENT_GONE) -> None:
        """Forget a request, abort what is unfinished of it everywhere, release its permit. Idempotent."""
        if request.closed:
            return
        request.closed = True
        if request.ended is None and (not request.done or reason is AbortReason.SLOW_CLIENT):
            request.ended = reason
        self._submissions.abort_all(request, reason)
        self._submissions.drop_all(request)
        self._requests.discard(request)
        if request.permit is not None:
            request.permit.release()
        self._observer.closed(request, request.ended)

    def fail_all(self, error: QuartetError) -> None:
        """End every request with `error`: the drain is over."""
        for request in list(self._requests):
            self._fail(request, error, AbortReason.SHUTDOWN)
        self.queries.fail_all(error)
        self.pools.fail_all(error)
        self.recordings.fail_all(error)

    # ---- from the stages -------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        """One message of the inbox; BadFrame for a type that a frontend never receives."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise BadFrame(f"{type(message).__name__} is not for a frontend")
        handler(message)

    def stage_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        """A stage has a new epoch: what its predecessor held is submitted again."""
        if kind is Kind.TOKENIZER:
            self.queries.tokenizer_restarted(index, epoch)
        self.pools.stage_restarted(kind, index, epoch)
        self.recordings.stage_restarted(kind, index, epoch)
        lost = [s for s in self._submissions if s.route is not None and _held_by(s, s.route, kind, index, epoch)]
        if kind is Kind.ENGINE:
            for submission in lost:
                for choice in submission.live if submission.past_tokenizer else ():
                    choice.deaths += 1
        self._again(lost, kind.name.lower())

    def beacons_changed(self) -> None:
        """Beacons have arrived: a stage that was waited for may be ready."""
        self._submissions.flush()
        self.pools.flush()
        self.recordings.flush()

    def tick(self) -> None:
        """Called about ten times a second: deadlines, models that were given up, and what waits for a stage."""
        now = self._now_ns()
        failed = {model for model in {r.spec.model for r in self._requests} if self._stages.failed(model)}
        for request in [r for r in self._requests if not r.done]:
            if request.spec.deadline_ns and now > request.spec.deadline_ns + DEADLINE_GRACE_S * 1e9:
                self._fail(request, _timeout(), AbortReason.DEADLINE)
            elif request.spec.model in failed:
                self._fail(request, _unavailable(), AbortReason.STAGE_LOST)
        for submission in self._submissions.waiting():       # no engine keeps the deadline of these
            if submission.request.spec.deadline_ns and now > submission.request.spec.deadline_ns:
                self._fail(submission.request, _timeout(), AbortReason.DEADLINE)
        self.queries.tick()
        for others in (self.pools, self.recordings):
            others.tick(int(DEADLINE_GRACE_S * 1e9), _timeout(), self._stages.failed, _unavailable())
        self._submissions.flush()

    def _check_open(self, model: int) -> None:
        if self.draining:
            raise _draining()
        if self._stages.failed(model):
            raise _unavailable()
        if not self._stages.ever_ready(model):
            raise QuartetError("engine_unavailable", "The model is still being loaded; retry soon.")

    # ---- survival --------------------------------------------------------------------------------------------

    def _again(self, submissions: Iterable[Submission], why: str) -> None:
        """Abort submissions under their old ids and submit what is left of them under fresh ones."""
        submissions = list(submissions)
        self._submissions.abort(submissions, AbortReason.STAGE_LOST)
        for submission in submissions:
            if submission in self._submissions:             # a sibling's failure may have ended the request
                self._submissions.drop(submission)
                self._resubmit(submission.request, submission.prompt, submission.live, submission.past_tokenizer, why)

    def _resubmit(self, request: Request, prompt: Prompt, choices: list[Choice], begun: bool, why: str) -> None:
        """Submit unfinished choices again: together while no engine had them, else each with its history."""
        if any(c.deaths > ALONE_AFTER for c in choices):
            self._fail(request, QuartetError(
                "poisoned_request", "The engine died three times under this request; it is not tried again."),
                AbortReason.STAGE_LOST)
            return
        self._observer.resubmitted(why)
        for group in [[c] for c in choices] if begun else [choices]:
            self._submissions.submit(request, prompt, group)

    def _gap(self, submission: Submission, choice: Choice) -> None:
        """Output was lost on the way: the same as a dead detokenizer, for this choice.

        The id of child 0 is the family's, so that it cannot be aborted without its siblings: they go along.
        """
        choice.gaps += 1
        if choice.gaps > MAX_GAPS:
            self._fail(choice.request, _internal(), AbortReason.ERROR)
            return
        submission.heard = True
        self._submissions.leave_tokenizer(submission)
        if child(choice.rid) == 0:
            self._again([submission], "gap")
            return
        assert submission.route is not None
        self._sender.send(_control(submission.route.engine), Abort(pack_rids([choice.rid]), AbortReason.STAGE_LOST))
        self._take_out(submission, choice, "gap")

    def _take_out(self, submission: Submission, choice: Choice, why: str) -> None:
        """Submit one choice again and leave its siblings where they are."""
        self._submissions.remove(submission, choice)
        self._resubmit(choice.request, choice.prompt, [choice], True, why)

    def _fail(self, request: Request, error: QuartetError, reason: AbortReason) -> None:
        """The terminal event of a request that cannot be completed."""
        if request.done:
            return
        request.error, request.ended = error, reason
        self._submissions.abort_all(request, reason)
        self._submissions.drop_all(request)
        request.wake()

    # ---- messages --------------------------------------------------------------------------------------------

    def _on_deltas(self, message: Deltas) -> None:
        find, now = self._submissions.find, self._now_ns()
        rows, ids, text = _rows(message)
        id_ = char = 0
        for rid, offset, start, ids_end, text_end in rows:
            found, new_ids, new_text = find(rid), ids[id_:ids_end], text[char:text_end]
            id_, char = ids_end, text_end
            if found is not None and offset == found[1].chars and start == len(found[1].ids):
                self._grow(*found, new_text, new_ids, None, NO_SPANS, now)
                found[1].request.touched(found[1])
            else:
                self._on_delta(TextDelta(rid, offset, new_text, start, new_ids.tobytes()), found, now)
        for delta in message.items:
            self._on_delta(delta, find(delta.rid), now)

    def _on_delta(self, delta: TextDelta, found: tuple[Submission, Choice] | None, now: int) -> None:
        if found is None:
            self._observer.unknown("delta")
            return
        try:
            self._take_delta(delta, *found, now)
        except ValueError:
            self._gap(*found)

    def _take_delta(self, delta: TextDelta, submission: Submission, choice: Choice, now: int) -> None:
        """ValueError for what does not follow what the choice has, or is no whole."""
        request, buffer = choice.request, choice.buffer
        ids, text, logprobs, spans = unpack_ids(delta.ids), delta.text, delta.logprobs, NO_SPANS
        known, shown = len(choice.ids) - delta.start, choice.chars - delta.offset
        if known < 0 or shown < 0:
            raise ValueError("a gap")
        if logprobs is not None and size_of(logprobs) != len(ids):
            raise ValueError("log-probabilities that do not belong to the ids")
        if delta.prompt_logprobs is not None:
            size_of(delta.prompt_logprobs)
        if delta.spans:
            spans = _spans(delta, shown)
        if known or shown:                                   # what came before is cut
            ids, text = ids[known:], text[shown:]
            logprobs = None if logprobs is None else cut_logprobs(logprobs, known)
        if delta.usage is not None or delta.prompt_text is not None or delta.prompt_logprobs is not None:
            self._take_prompt(choice.prompt, choice, delta.prompt_text, delta.prompt_logprobs, delta.usage)
        self._grow(submission, choice, text, ids, logprobs, spans, now)
        if delta.reasoning_tokens > buffer.reasoning_tokens:
            buffer.reasoning_tokens = delta.reasoning_tokens
        buffer.open_call = delta.open_call
        if delta.finish:
            if delta.finish in (Finish.ABORT, Finish.ERROR):
                self._on_engine_gave_up(request, delta.finish, now)
                return
            buffer.end(Finish(delta.finish), delta.stop)
            request.unfinished -= 1
            self._submissions.remove(submission, choice)
        request.touched(choice)

    def _grow(self, submission: Submission, choice: Choice, text: str, ids: array[int], logprobs: Logprobs | None,
              spans: Sequence[tuple[int, int]], now: int) -> None:
        """Text and ids that follow what the choice has."""
        submission.heard, choice.heard_ns, choice.missing = True, now, 0
        if submission.num_bytes:
            self._submissions.leave_tokenizer(submission)
        choice.chars += len(text)
        choice.buffer.add(text, logprobs if ids else None, spans)
        if ids:
            choice.ids.extend(ids)
            self._time_tokens(choice.request, choice, len(ids), now)

    def _take_prompt(self, prompt: Prompt, choice: Choice, text: str | None, logprobs: Logprobs | None,
                     usage: Usage | None) -> None:
        """What is known about the prompt is taken once, whoever computes it again."""
        if usage is not None and usage.prompt_tokens and not prompt.counted:
            prompt.counted = True
            prompt.prompt_tokens, prompt.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        if text is not None and prompt.echo is None:
            prompt.echo = text
        if logprobs is not None and prompt.teller in (-1, choice.number) and not prompt.logprobs_complete:
            prompt.teller = choice.number
            prompt.logprobs.append(logprobs)
            prompt.num_logprobs += size_of(logprobs)

    def _time_tokens(self, request: Request, choice: Choice, count: int, now: int) -> None:
        if choice.last_token_ns:
            self._observer.next_token(request, (now - choice.last_token_ns) / 1e9 / count)
        elif not request.first_token_ns:
            request.first_token_ns = now
            self._observer.first_token(request, (now - request.arrival_ns) / 1e9)
        choice.last_token_ns = now

    def _on_engine_gave_up(self, request: Request, finish: int, now: int) -> None:
        """The engine ended a choice that nobody here aborted: its deadline, or something went wrong in it."""
        late = request.spec.deadline_ns and now >= request.spec.deadline_ns
        if finish == Finish.ABORT and late:
            self._fail(request, _timeout(), AbortReason.DEADLINE)
        else:
            self._fail(request, _internal(), AbortReason.ERROR)

    def _on_admitted(self, message: Admitted) -> None:
        for item in message.items:
            submission = self._submissions.get(item.rid)
            if submission is None:
                self._observer.unknown("admitted")
            elif len(item.ids) % 4 == 0:
                self._admit(submission, item)

    def _admit(self, submission: Submission, item: AdmittedItem) -> None:
        prompt, now = submission.prompt, self._now_ns()
        submission.admitted = True
        self._submissions.leave_tokenizer(submission)
        if not prompt.admitted:
            prompt.text = prompt.chat = prompt.suffix = None
            prompt.ids, prompt.admitted = item.ids, True
            prompt.prompt_tokens = prompt.prompt_tokens or len(item.ids) // 4
        for choice in submission.live:
            choice.heard_ns = now
        if submission.request.spec.want_prompt_ids:
            submission.request.wake()

    def _on_failed(self, message: Failed) -> None:
        for item in message.items:
            submission = self._submissions.get(item.rid)
            if submission is not None and (child(item.rid) == 0 or self._submissions.find(item.rid) is not None):
                self._fail(submission.request, _error_of(item), AbortReason.ERROR)
            elif not any(take(item.rid, _error_of(item)) for take in (
                    self.queries.failed, self.pools.on_failed, self.recordings.on_failed)):
                self._observer.unknown("failed")

    def _on_census(self, message: Census) -> None:
        """Abort what the engine holds and we do not know; submit again what we are owed and it does not hold."""
        if message.engine >= self._stages.num_engines:
            raise BadFrame("a census of no engine of ours")
        try:
            held = set(unpack_rids(message.rids))
        except ValueError:
            raise BadFrame("a census of ragged ids") from None
        orphans = [rid for rid in held if self._submissions.get(rid) is None
                   and not (self.pools.knows(rid) or self.recordings.knows(rid))]
        if orphans:
            self._sender.send(_control(message.engine), Abort(pack_rids(orphans), AbortReason.ORPHAN))
        self.pools.on_census(message.engine, message.engine_epoch, held)
        now = self._now_ns()
        for submission in self._submissions:
            route = submission.route
            if (route is None or not submission.past_tokenizer
                    or (route.engine, route.engine_epoch) != (message.engine, message.engine_epoch)):
                continue
            for choice in submission.live:
                choice.missing = 0 if choice.rid in held else choice.missing + 1
                if choice.missing >= 2 and now - choice.heard_ns >= SILENT_S * 1e9:
                    self._take_out(submission, choice, "census")

    def assert_invariants(self) -> None:
        """Every index agrees with every other one."""
        self._submissions.assert_invariants()
        self.pools.assert_invariants()
        self.recordings.assert_invariants()
        families = {s.family for s in self._submissions}
        for request in self._requests:
            assert not request.closed and request.families <= families
            running = sum(not c.finished for c in request.choices)
            assert request.unfinished == running
            assert not request.done or not request.families
            held = sum(len(s.live) for s in self._submissions if s.request is request)
            assert request.done or held == running
        assert {s.request for s in self._submissions} <= self._requests


def _rows(message: Deltas) -> tuple[Iterable[tuple[int, ...]], array[int], str]:
    """The rows of a message, and all their ids and text; BadFrame where these do not end where the last row does."""
    try:
        rows, ids, text = TEXT_ROW.iter_unpack(message.rows), unpack_ids(message.ids), message.text
    except (struct.error, ValueError):
        raise BadFrame("half a row") from None
    ends = TEXT_ROW.unpack_from(message.rows, len(message.rows) - TEXT_ROW.size)[3:] if message.rows else (0, 0)
    if ends != (len(ids), len(text)):
        raise BadFrame("rows that do not cover their ids and text")
    return rows, ids, text


def _spans(delta: TextDelta, shown: int) -> list[tuple[int, int]]:
    """The spans of a delta's text behind its first `shown` characters; ValueError for what fits no text."""
    spans = [(span.kind, span.chars) for span in delta.spans]
    if sum(size for _, size in spans) != len(delta.text) or max(spans)[0] > Part.ARGUMENTS:
        raise ValueError("spans that do not cover the text")
    return skip_spans(spans, shown)


def _control(engine: int) -> Address:
    return Address(Kind.ENGINE, engine, "ctl")


def _held_by(submission: Submission, route: Route, kind: Kind, index: int, epoch: int) -> bool:
    """Whether a process that is gone now held (part of) a submission."""
    if kind is Kind.TOKENIZER:
        return not submission.past_tokenizer and route.tokenizer == index and route.tokenizer_epoch != epoch
    if kind is Kind.ENGINE:
        return route.engine == index and route.engine_epoch != epoch
    return kind is Kind.DETOKENIZER and route.detok == index and route.detok_epoch != epoch


def _error_of(item: FailedItem) -> QuartetError:
    if item.code not in CATALOGUE:
        return _internal()
    return QuartetError(item.code, item.message, item.param)


def _internal() -> QuartetError:
    return QuartetError("internal_error", "The request could not be completed.")


def _timeout() -> QuartetError:
    return QuartetError("timeout", "The request did not end within its time limit.")


def _unavailable() -> QuartetError:
    return QuartetError("engine_unavailable", "The model cannot be served at the moment.")


def _draining() -> QuartetError:
    return QuartetError("draining", "The server is shutting down.")
