"""Recordings on their way to the engines: which windows were asked of the decoder worker, and who waits for credit.

Run by the tokenizer's loop, which calls `turn` and `next_timer_ns`; never blocks. A window is asked for when the frontend
has granted it, so that an hour of sound is never in memory. When the worker dies, the recording that it was at is refused
and the others are opened again, up to where they were.
"""
from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.config import ModelConfig
from pipeline.errors import QuartetError
from pipeline.messages import AudioWindow, Kind, Route, SpeechAdd, SubmitAudio, unpack_ids
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tokenizer_proc.audio.process import DecoderProcess, WorkerDied
from tokenizer_proc.audio.protocol import Command, NoWindow, WindowAnswer

POLL_NS = 3_000_000                  # how often the worker's pipe is looked at while an answer is due
COMMAND_NS = 90 * 10**9              # the worker is killed when one command takes longer
MAX_RECORDINGS = 1024
MAX_OPEN = 64                        # of them in the worker at once: each holds up to a minute of sound there
log = logging.getLogger(__name__)
Send = Callable[[Address, SpeechAdd, int], None]
Fail = Callable[[int, QuartetError], None]


@dataclass(slots=True)
class Recording:
    submit: SubmitAudio
    job: int
    credit: int
    done: frozenset[int]
    taken: int = 0                       # windows that were answered
    asked: bool = False                  # for window number `taken`
    opened: bool = False                 # in the worker that lives now
    behind: int = field(default=0)       # windows that a new worker has to pass over first


class Recordings:
    """Everything that this tokenizer holds of speech requests."""

    def __init__(self, models: tuple[ModelConfig, ...], max_seconds: float, send: Send, fail: Fail,
                 start: Callable[[], DecoderProcess] = DecoderProcess) -> None:
        self._models, self._max_seconds, self._send, self._fail, self._start = models, max_seconds, send, fail, start
        self._held: dict[int, Recording] = {}                # rid -> recording
        self._jobs: dict[int, Recording] = {}
        self._next_job = 0
        self._worker: DecoderProcess | None = None
        self._due: deque[int] = deque()                      # jobs whose answers are to come, in this order
        self._head_ns = 0                                    # since when the first of them is worked on

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, rid: int) -> bool:
        return rid in self._held

    def rids(self) -> list[int]:
        return list(self._held)

    def routes(self) -> list[tuple[int, Route]]:
        return [(rid, r.submit.route) for rid, r in self._held.items()]

    # ---- from the frontend -----------------------------------------------------------------------------------

    def submit(self, message: SubmitAudio) -> None:
        """BadFrame for what no frontend sends."""
        if len(self._held) >= MAX_RECORDINGS:
            self._fail(message.rid, QuartetError("server_overloaded", "Too many recordings are being decoded; retry soon."))
            return
        try:
            done = frozenset(unpack_ids(message.done))
        except ValueError:
            raise BadFrame("ragged numbers of windows") from None
        recording = Recording(message, self._next_job, message.credit, done)
        self._next_job += 1
        self._held[message.rid] = self._jobs[recording.job] = recording

    def grant(self, rid: int, credit: int) -> None:
        recording = self._held.get(rid)
        if recording is not None:
            recording.credit = max(recording.credit, credit)

    def forget(self, rid: int) -> bool:
        """Whether there was such a recording."""
        recording = self._held.pop(rid, None)
        if recording is None:
            return False
        del self._jobs[recording.job]
        if recording.opened and self._worker is not None:
            with contextlib.suppress(WorkerDied):            # whoever asks it next finds out
                self._worker.send(Command(recording.job, "close"))
        return True

    # ---- the loop --------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start the worker ahead of the first recording: its libraries take seconds to load."""
        self._worker = self._worker or self._start()

    def next_timer_ns(self) -> int | None:
        return time.monotonic_ns() + POLL_NS if self._due or self._idle() else None

    def _idle(self) -> bool:
        """Whether a recording could be asked for a window and is not: its worker has just died."""
        return any(not r.asked and r.taken < r.credit for r in self._held.values())

    def turn(self) -> None:
        """Take answers, ask for windows."""
        now = time.monotonic_ns()
        if self._due and self._worker is not None:
            try:
                for answer in self._worker.poll():
                    self._head_ns = now
                    self._answered(answer)
                if self._due and now - self._head_ns > COMMAND_NS:
                    raise WorkerDied("it hangs")
            except WorkerDied as error:
                self._died(str(error))
        room = MAX_OPEN - sum(r.opened for r in self._held.values())
        for recording in [r for r in self._held.values() if not r.asked and r.taken < r.credit]:
            if recording.opened or room > 0:
                room -= not recording.opened
                self._ask(recording)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # ---- inside ----------------------------------------------------------------------------------------------

    def _ask(self, recording: Recording) -> None:
        submit = recording.submit
        if submit.deadline_ns and time.monotonic_ns() > submit.deadline_ns:
            self._refuse(recording, QuartetError("timeout", "The request waited longer than its deadline allows."))
            return
        try:
            self._worker = self._worker or self._start()
            if not recording.opened:
                path = self._models[submit.model].path
                self._worker.send(Command(recording.job, "open", submit.path, path, self._max_seconds))
                recording.opened, recording.behind = True, recording.taken
            skip = recording.behind > 0 or recording.taken in recording.done
            self._worker.send(Command(recording.job, "next", skip=skip))
        except WorkerDied as error:
            self._died(str(error))                           # the next turn tries again
            return
        recording.asked = True
        if not self._due:
            self._head_ns = time.monotonic_ns()
        self._due.append(recording.job)

    def _answered(self, answer: WindowAnswer | NoWindow) -> None:
        if not self._due or self._due.popleft() != answer.job:
            raise WorkerDied("it answers what was not asked")
        recording = self._jobs.get(answer.job)
        if recording is None:
            return                                           # aborted meanwhile
        recording.asked = False
        if isinstance(answer, NoWindow):
            self._refuse(recording, QuartetError("invalid_value", answer.reason, "file"))
            return
        if recording.behind:
            recording.behind -= 1
            return
        recording.taken += 1
        if answer.features is not None:
            submit, features = recording.submit, answer.features
            window = AudioWindow(answer.index, answer.last, answer.start_s, answer.seconds, features)
            self._send(Address(Kind.ENGINE, submit.route.engine),
                       SpeechAdd(submit.rid, submit.route, submit.params, window, submit.done, submit.deadline_ns,
                                 submit.priority, submit.alone), features.nbytes + 500)
        if answer.last:
            self._held.pop(recording.submit.rid)
            del self._jobs[recording.job]

    def _refuse(self, recording: Recording, error: QuartetError) -> None:
        self.forget(recording.submit.rid)
        self._fail(recording.submit.rid, error)

    def _died(self, why: str) -> None:
        """The recording that it was at is to blame; the others go on in another worker."""
        log.warning("the decoder worker is replaced: %s", why)
        self.close()
        blamed = self._jobs.get(self._due[0]) if self._due else None
        self._due.clear()
        for recording in self._held.values():
            recording.opened = recording.asked = False
        if blamed is not None:
            self._refuse(blamed, QuartetError("invalid_value", "The audio file is damaged: it cannot be decoded.", "file"))

    def assert_invariants(self) -> None:
        """Called by tests."""
        assert {r.job for r in self._held.values()} == set(self._jobs)
        assert sum(r.asked for r in self._held.values()) <= len(self._due)
