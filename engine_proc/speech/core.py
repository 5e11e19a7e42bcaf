"""The speech engine's loop: windows in, encoded one by one, decoded together, segments out.

Engine process, main thread; implements `pipeline.transport.Logic`. Imports no torch: the runner is given. The scheduler
is the one for text: a window's attempt is a sequence. A request that ends is forgotten at once; its sequences are marked
and leave with the step that holds them. Must never block on a peer.
"""
from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable
from typing import Any, Protocol, cast

from prometheus_client import CollectorRegistry

from engine_proc.blocks import BlockPool
from engine_proc.failures import failure_of
from engine_proc.plan import Runner, StepPlan
from engine_proc.request_core import RequestCore
from engine_proc.scheduler import Scheduler
from engine_proc.speech.admission import SpeechLimits, check
from engine_proc.speech.align import Alignment
from engine_proc.speech.fallback import Ladder
from engine_proc.speech.request import SpeechRequest, Take, Window
from engine_proc.speech.segments import segments
from engine_proc.speech.stats import SpeechStats
from engine_proc.speech.vocabulary import Vocabulary
from engine_proc.speech.words import onset
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError
from pipeline.messages import Abort, Finish, Load, SpeechAdd, Transcribed, unpack_ids
from pipeline.schema import BadFrame
from pipeline.transport import Sender

RETRY_NS = 5_000_000             # how soon to plan again when nothing that waits could start
MAX_FAILED = 3                   # steps in a row, or encodings; then the process ends and its successor starts afresh
MAX_HELD = 256                   # windows with their features; more are left in the socket
DECODE_SHARE = 0.15              # time for decoding per time for encoding, while there is both to do: together is cheaper
log = logging.getLogger(__name__)


class WindowRunner(Runner, Protocol):
    """What the core asks of a speech runner beside steps."""

    vocabulary: Vocabulary

    @property
    def num_free(self) -> int: ...
    @property
    def num_lanes(self) -> int: ...

    def encode(self, windows: list[Window]) -> None: ...
    def let_go(self, window: Window) -> None: ...
    def align(self, window: Window, prompt: list[int], text: list[int], seconds: float) -> Alignment: ...


class SpeechCore(RequestCore[SpeechRequest]):
    """One engine process around one speech runner. `clock` gives monotonic nanoseconds."""

    stats: SpeechStats

    def __init__(self, config: ServerConfig, index: int, epoch: int, runner: WindowRunner, sender: Sender,
                 clock: Callable[[], int], registry: CollectorRegistry | None = None) -> None:
        model = config.models[config.engines()[index]]
        super().__init__(config, index, epoch, sender, clock)
        self.runner = runner
        self.vocabulary = runner.vocabulary
        pool = BlockPool(runner.num_blocks, runner.block_size, caching=False)    # a prefix depends on what was heard
        self.scheduler = Scheduler(model.engine, pool, self._start, runner.release)
        self.scheduler.by_priority = True
        self.limits = SpeechLimits(vocabulary=runner.vocabulary, vocab_size=runner.vocab_size,
                                   mels=int(runner.facts.get("mels", 0)), max_waiting=model.engine.max_waiting)
        self.ladder = Ladder(runner.vocabulary)
        self.stats = SpeechStats(registry or CollectorRegistry(), model.names[0], index, self.scheduler,
                                 runner.vocabulary.max_length)
        self.waiting: list[Window] = []                      # not encoded, in `order`
        self._debt_ns = 0.0                                  # time owed to decoding
        self._failed = 0

    # ---- messages ------------------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        self._retry_ns = None
        if isinstance(message, SpeechAdd):
            self._add(message)
        elif isinstance(message, Abort):
            self._abort(message)
        else:
            raise BadFrame(f"{type(message).__name__} is not for a speech engine")

    def _add(self, add: SpeechAdd) -> None:
        if not self._is_ours(add.rid, add.route):
            return
        request = self.requests.get(add.rid)
        try:
            check(add, self.limits, 0 if request is not None else len(self.requests))
        except QuartetError as error:
            self._refuse(add.rid, error)
            return
        if request is None:
            request = self._request(add)
            self._keep(request)
        given = add.window
        if given.index in request.seen:
            self.stats.drop("duplicate")
            return
        request.seen.add(given.index)
        if given.last:
            request.total = given.index + 1
        window = request.windows[given.index] = Window(request, given, given.features)
        if given.index and request.params.words:             # the first one begins with the recording, others in silence
            window.onset_s = onset(given.features, given.seconds)
        given.features = given.features[:0]
        insort(self.waiting, window, key=_order)

    def _request(self, add: SpeechAdd) -> SpeechRequest:
        params, vocabulary = add.params, self.vocabulary
        previous = vocabulary.encode(params.hotwords) + vocabulary.encode(params.prompt)
        return SpeechRequest(
            rid=add.rid, route=add.route, params=params, deadline_ns=add.deadline_ns, priority=add.priority,
            alone=add.alone, arrival=self._arrival, arrived_ns=self._clock(), previous=previous,
            language=params.language if vocabulary.multilingual else None, seen=set(unpack_ids(add.done)))

    # ---- the loop ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Encode windows or not, compute a step or not, then tell everyone."""
        now = self._clock()
        self._expire(now)
        for seq in self.scheduler.reap():
            self._left(cast(Take, seq))
        windows = self._next_windows()
        if windows:
            self._encode(windows)
        plan = self.scheduler.plan()
        if plan is not None:
            self._step(plan)
        else:
            self._debt_ns = 0.0
        now = self._clock()
        self._retry_ns = None if plan is not None or windows else now + RETRY_NS
        self._tell(now)

    def _next_windows(self) -> list[Window]:
        """The windows to encode now: the first ones whose language is known or that are to tell it."""
        scheduler, chosen = self.scheduler, list[Window]()
        busy = bool(scheduler.running or scheduler.waiting)
        if busy and self._debt_ns > 0:
            return chosen
        if any(cast(Take, seq).alone for seq in (*scheduler.running, *scheduler.waiting)):
            return chosen
        telling: set[int] = set()
        for window in self.waiting:
            if len(chosen) >= min(self.runner.num_free, self.runner.num_lanes):
                break
            request = window.request
            if request.alone and (busy or chosen):
                continue
            if request.language is None and self.vocabulary.multilingual:
                number = window.given.index if window.given else -1
                if request.rid in telling or request.detecting not in (-1, number):
                    continue
                telling.add(request.rid)
            chosen.append(window)
            if request.alone:
                break
        return chosen

    def _encode(self, windows: list[Window]) -> None:
        started = self._clock()
        for window in windows:
            if window in self.waiting:
                self.waiting.remove(window)
        try:
            self.runner.encode(windows)
        except Exception as error:
            if len(windows) > 1:                     # one by one, so that only the one that it is about fails
                for window in windows:
                    self.runner.let_go(window)
                for window in windows:
                    if not window.request.ended:
                        self._encode([window])
                return
            log.error("a window could not be encoded", exc_info=error)
            self._count_failure(error)
            self._fail(windows[0].request, failure_of(error))
            return
        self._failed = 0
        taken = self._clock() - started
        self._debt_ns += taken * DECODE_SHARE
        for window in windows:
            self._encoded(window, started, taken // len(windows))

    def _encoded(self, window: Window, started: int, taken: int) -> None:
        request = window.request
        assert window.given is not None
        window.features = None
        self.stats.encoded(window.given.seconds, taken / 1e9)
        request.started_ns = request.started_ns or started
        if request.language is None and self.vocabulary.multilingual:
            request.detecting = window.given.index
            self._try(window, self.ladder.detect(window))
        else:
            self._try(window, self.ladder.attempt(window))

    def _try(self, window: Window, take: Take) -> None:
        window.take = take
        self.scheduler.add(take)

    def _step(self, plan: StepPlan) -> None:
        started = self._clock()
        try:
            results = self.runner.collect(self.runner.launch(plan))
        except Exception as error:
            log.error("step %d failed with %d windows", plan.number, len(plan.items), exc_info=error)
            self.stats.step_errors.inc()
            for seq in self.scheduler.abandon(plan):
                self.scheduler.mark(seq, Finish.ERROR, failure_of(error))
            self._count_failure(error)
            return
        self._failed = 0
        generated = 0
        for seq, result in self.scheduler.collect(plan, results):
            generated += result.token is not None
            if seq.finish:
                self._left(cast(Take, seq))
        now = self._clock()
        self._debt_ns = max(0.0, self._debt_ns - (now - started))
        self.stats.step(plan.num_tokens, generated, 0)

    def _count_failure(self, error: Exception) -> None:
        self._failed += 1
        if self._failed >= MAX_FAILED:
            raise error

    def _start(self, seq: Any) -> None:
        """The scheduler's hook: `seq` gets blocks now."""
        self.runner.admit(seq)
        seq.started_ns = seq.started_ns or self._clock()

    def _left(self, take: Take) -> None:
        """A sequence has ended, one way or the other."""
        window = take.window
        assert window is not None
        request = window.request
        self.stats.finished(take, self._clock())
        if request.ended:
            self.runner.let_go(window)
        elif take.finish is Finish.ERROR:
            assert take.error is not None
            self._fail(request, take.error)
        elif take.finish is Finish.ABORT:
            self._end(request, "abort")
        elif take.detect:
            request.language = self.vocabulary.language_of(take.tokens[-1])
            self._try(window, self.ladder.attempt(window))
        else:
            window.tokens += take.num_output
            if self.ladder.judge(window, take):
                self._settle(window)
            else:
                self.stats.fallbacks.inc()
                self._try(window, self.ladder.attempt(window))

    def _settle(self, window: Window) -> None:
        """A window is done: tell its frontend what was said in it."""
        request, given, best = window.request, window.given, window.best
        assert given is not None
        try:
            alignment = None
            if best is not None and request.params.words:
                first = self.vocabulary.first_special
                text = [token for token in best.output if token < first]
                if text:
                    prompt = self.vocabulary.prompt([], request.language, request.params.task == "translate", False)
                    alignment = self.runner.align(window, prompt, text, given.seconds)
            found = [] if best is None else segments(window, best, self.vocabulary, alignment)
        except Exception as error:
            log.error("a window's words could not be aligned", exc_info=error)
            self._fail(request, failure_of(error))
            return
        self.runner.let_go(window)
        window.take = None
        del request.windows[given.index]
        self.outputs.put(Transcribed(
            self.index, self.epoch, request.rid, given.index, given.last, given.start_s, given.seconds,
            request.language or "", window.tokens, found))
        if request.done:
            self._end(request, "stop")

    def _end(self, request: SpeechRequest, reason: str) -> None:
        """Forget a request. Slots of windows that a sequence still reads go back when that has left."""
        request.ended = True
        del self.requests[request.rid]
        self._over.add(request.rid, self._clock())
        self.waiting = [window for window in self.waiting if window.request is not request]
        for window in request.windows.values():
            if window.take is not None and not window.take.finish:
                self.scheduler.mark(window.take, Finish.ABORT)
            else:
                self.runner.let_go(window)
        request.windows.clear()

    # ---- for the stage -------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.marked or (self._retry_ns is None and (
            scheduler.running or scheduler.waiting or self.waiting)))

    def accepting(self) -> bool:
        return len(self.waiting) < MAX_HELD

    def next_timer_ns(self) -> int | None:
        return self._next_timer_ns(waits=bool(self.scheduler.running or self.scheduler.waiting or self.waiting))

    def load(self) -> Load:
        scheduler = self.scheduler
        return Load(running=len(scheduler.running), waiting=scheduler.num_waiting + len(self.waiting),
                    waiting_tokens=0, kv_used=scheduler.pool.num_used, kv_total=scheduler.pool.num_blocks - 1)

    def assert_invariants(self) -> None:
        """Called by tests after each turn."""
        self.scheduler.assert_invariants()
        assert self.waiting == sorted(self.waiting, key=_order)
        for rid, request in self.requests.items():
            assert rid == request.rid and not request.ended
            for index, window in request.windows.items():
                assert index in request.seen and (window.audio < 0) == (window in self.waiting)
                assert window in self.waiting or (window.take is not None and not window.take.finish)


def _order(window: Window) -> tuple[int, int, int]:
    return window.order
