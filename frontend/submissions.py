"""Submissions: choices of a prompt on their way through the pipeline, by family id, with where each of them is.

Part of the request table. Chooses the processes of a submission, sends it, keeps it waiting while a stage is missing,
counts what is at which engine and tokenizer, and aborts. It never decides why something is submitted again.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from frontend.request import Choice, Prompt, Request, Submission
from frontend.stages import Stages
from pipeline.ids import RidMaker, child, family
from pipeline.messages import Abort, AbortReason, Kind, pack_rids
from pipeline.transport import Address, Sender

ALONE_AFTER = 2                  # engine deaths under a choice, after which it runs alone


class Submissions:
    """Every family id of this frontend that is still known."""

    def __init__(self, rids: RidMaker, stages: Stages, sender: Sender, now_ns: Callable[[], int]) -> None:
        self._rids, self._stages, self._sender, self._now_ns = rids, stages, sender, now_ns
        self._families: dict[int, Submission] = {}
        self._running: dict[int, tuple[Submission, Choice]] = {}      # by child id
        self._waiting: dict[int, Submission] = {}           # not sent: a stage is missing or its outbox is full
        self._alone: dict[int, int] = {}                    # engine -> the one family that runs alone there
        self.engine_load: Counter[int] = Counter()          # choices at each engine
        self.tokenizer_load: Counter[int] = Counter()       # bytes at each tokenizer, questions included

    def __iter__(self) -> Iterator[Submission]:
        """A snapshot: the loop may change what is known."""
        return iter(list(self._families.values()))

    def __contains__(self, submission: Submission) -> bool:
        return submission.family in self._families

    def get(self, rid: int) -> Submission | None:
        """The submission of a family or child id."""
        return self._families.get(family(rid))

    def find(self, rid: int) -> tuple[Submission, Choice] | None:
        """The running choice with this child id."""
        return self._running.get(rid)

    def waiting(self) -> list[Submission]:
        return list(self._waiting.values())

    def submit(self, request: Request, prompt: Prompt, choices: list[Choice]) -> bool:
        """Register `choices` under a fresh family and send them; False when they have to wait."""
        submission = Submission(self._rids.next(), request, prompt, list(choices))
        submission.alone = any(c.deaths >= ALONE_AFTER for c in choices)
        for j, choice in enumerate(choices):
            choice.rid, choice.missing, choice.heard_ns = submission.family + j, 0, self._now_ns()
            self._running[choice.rid] = submission, choice
            prompt.forget_logprobs(choice.number)
        self._families[submission.family] = submission
        request.families.add(submission.family)
        if self._send(submission):
            return True
        self._waiting[submission.family] = submission
        return False

    def flush(self) -> None:
        """Send what waits, oldest first, as far as it goes."""
        for submission in self.waiting():
            if self._send(submission):
                del self._waiting[submission.family]

    def _send(self, submission: Submission) -> bool:
        route = self._stages.route(submission.request.spec.model, submission.family, self.engine_load,
                                   self.tokenizer_load)
        if route is None or (submission.alone and route.engine in self._alone):
            return False
        if not self._sender.send(Address(Kind.TOKENIZER, route.tokenizer), submission.message(route)):
            return False
        submission.route, submission.num_bytes = route, submission.prompt.num_bytes
        self.engine_load[route.engine] += len(submission.live)
        self.tokenizer_load[route.tokenizer] += submission.num_bytes
        if submission.alone:
            self._alone[route.engine] = submission.family
        return True

    def drop(self, submission: Submission) -> None:
        """Take a submission out of every index."""
        del self._families[submission.family]
        for choice in submission.live:
            del self._running[choice.rid]
        self._waiting.pop(submission.family, None)
        submission.request.families.discard(submission.family)
        if submission.route is not None:
            self.leave_tokenizer(submission)
            self.engine_load[submission.route.engine] -= len(submission.live)
            if self._alone.get(submission.route.engine) == submission.family:
                del self._alone[submission.route.engine]

    def drop_all(self, request: Request) -> None:
        for number in list(request.families):
            self.drop(self._families[number])

    def remove(self, submission: Submission, choice: Choice) -> None:
        """Take one choice out; the family's id stays known while a sibling runs."""
        assert submission.route is not None
        submission.choices[child(choice.rid)] = None
        del self._running[choice.rid]
        self.engine_load[submission.route.engine] -= 1
        if not submission.live:
            self.drop(submission)

    def leave_tokenizer(self, submission: Submission) -> None:
        """The tokenizer has done its part of it."""
        if submission.route is not None and submission.num_bytes:
            self.tokenizer_load[submission.route.tokenizer] -= submission.num_bytes
            submission.num_bytes = 0

    def abort(self, submissions: list[Submission], reason: AbortReason) -> None:
        """Abort families at the engine, and at the tokenizer unless it has let go. What gets lost heals by census."""
        towards: dict[Address, list[int]] = {}
        for submission in submissions:
            route = submission.route
            if route is not None:
                if not submission.past_tokenizer:
                    towards.setdefault(Address(Kind.TOKENIZER, route.tokenizer), []).append(submission.family)
                towards.setdefault(Address(Kind.ENGINE, route.engine, "ctl"), []).append(submission.family)
        for to, rids in towards.items():
            self._sender.send(to, Abort(pack_rids(rids), reason))

    def abort_all(self, request: Request, reason: AbortReason) -> None:
        self.abort([self._families[f] for f in request.families], reason)

    def assert_invariants(self) -> None:
        """Every index agrees with every other one."""
        engines: Counter[int] = Counter()
        tokenizers: Counter[int] = Counter()
        for number, submission in self._families.items():
            assert submission.family == number and submission.live and number in submission.request.families
            assert (submission.route is None) == (number in self._waiting)
            for j, choice in enumerate(submission.choices):
                assert choice is None or (choice.rid == number + j and not choice.finished)
            if submission.route is not None:
                engines[submission.route.engine] += len(submission.live)
                tokenizers[submission.route.tokenizer] += submission.num_bytes
                assert not submission.past_tokenizer or not submission.num_bytes
        assert self._running == {c.rid: (s, c) for s in self._families.values() for c in s.live}
        assert set(self._waiting) <= set(self._families)
        assert +self.engine_load == +engines, (self.engine_load, engines)
        assert all(self.tokenizer_load[i] >= size for i, size in tokenizers.items())
        assert self._families or not any(self.engine_load.values())
        for engine, number in self._alone.items():
            submission = self._families[number]
            assert submission.alone and submission.route is not None and submission.route.engine == engine
