"""The launcher: owns the process table, the epochs and the listening sockets of one server, in the foreground.

Starts every stage, shows progress and the banner, restarts what dies, replaces what hangs, drains on SIGTERM, and ends
with a documented exit code. Never touches a request. When to do what is pipeline.supervise's logic.
"""
from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from prometheus_client import CollectorRegistry, Counter

from pipeline import banner, sockets
from pipeline.beacon import SEES_ALL, BeaconPublisher, BeaconWatcher
from pipeline.config import POOLING_TASKS, ServerConfig, save
from pipeline.errors import StartError
from pipeline.exits import CONFIG, CRASH_LOOP, MEMORY, MODEL_LOAD, OK
from pipeline.listen import Listeners
from pipeline.messages import Kind, State
from pipeline.procs import Child, describe_exit, environment, reap_strangers, stage_command
from pipeline.signals import Signals
from pipeline.supervise import Life, S, Verdict, given_up_with, judge
from pipeline.terminal import Terminal
from pipeline.transport import Status

Command = Callable[[Kind, Path, int, int, int | None], list[str]]
START_CODES = (CONFIG, MODEL_LOAD, MEMORY)   # a stage that ends with one of these while starting ends the server
STOP_GRACE_S = 5.0                           # for a stage that is told to stop and has no requests to finish
QUICK_GRACE_S = 1.5                          # where nothing is worth waiting for
ABORT_GRACE_S = 5.0                          # for the stack dump of a hung stage
TICK_MS = 1000
BLIND_TICK_MS = 100                          # where the kernel gives no pidfds
POOLING_NICE = 5                             # embeddings wait for chats, but a chat without pause leaves them a quarter
STOOD_STILL_NS = 3 * S                       # a turn of our own loop that took longer: we were stopped ourselves


@dataclass(slots=True)
class Step:
    """One step of a stop: these kinds are told to end and have `grace_s` to do so."""

    kinds: tuple[Kind, ...]
    grace_s: float
    deadline_ns: int | None = None           # set when the step begins


class Launcher:
    """Runs the stages of `config` until a signal or a failure; `run` may be called once."""

    def __init__(self, config: ServerConfig, config_path: Path, listeners: Listeners, terminal: Terminal,
                 signals: Signals, command: Command = stage_command,
                 reload: Callable[[ServerConfig], ServerConfig] | None = None) -> None:
        """`reload` gives what of the configuration changes on SIGHUP; StartError where it cannot be read."""
        self._config, self._config_path = config, config_path
        self._listeners, self._terminal, self._signals, self._command = listeners, terminal, signals, command
        self._reload = reload
        self._lives = {member: Life(*member, max_deaths=config.timeouts.crash_deaths) for member in config.members()}
        self._children: dict[tuple[Kind, int], Child] = {}
        self._phases: dict[tuple[Kind, int], str] = {}
        self._was_ready = False
        self._steps: deque[Step] = deque()   # empty: not stopping
        self._failure: StartError | None = None
        self._status, self._registry = Status(), CollectorRegistry()
        self._restarts = Counter("quartet:stage_restarts", "Starts of a stage process after its death.", ["stage"],
                                 registry=self._registry)
        self._resumed_ns = self._turned_ns = time.monotonic_ns()

    def run(self) -> int:
        """Serve until told to stop; the exit code, or StartError with the sentence. Nothing of ours is left running."""
        ctx = sockets.context()
        self._watcher = BeaconWatcher(ctx, self._config, self._lives, slow=True)
        self._publisher = BeaconPublisher(ctx, self._config, Kind.LAUNCHER, 0, 1, self._status, self._registry)
        self._publisher.start()
        try:
            for life in self._lives.values():
                self._start(life)
            while not (self._steps and self._stopped()):
                self._turn()
        finally:
            for child in self._children.values():
                child.destroy()
            self._publisher.stop()
            self._watcher.close()
            ctx.destroy(linger=0)
        if self._failure is not None:
            raise self._failure
        return OK

    # ---- one turn ----------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._wait()
        now = time.monotonic_ns()
        if now - self._turned_ns > STOOD_STILL_NS:
            self._resumed_ns = now
        self._turned_ns = now
        self._publisher.turned(False)
        while self._watcher.drain():
            pass
        for number in self._signals.take():
            self._on_signal(number)
        for member in list(self._children):
            code = self._children[member].ended()
            if code is not None:
                self._on_death(self._lives[member], code, now)
        reap_strangers({child.pid for child in self._children.values()})
        self._watch_beacons(now)
        for life in self._lives.values():
            if life.restart_ns is not None and life.restart_ns <= now and not self._told_to_stop(life.kind):
                self._start(life)
        for child in self._children.values():
            child.trim()

    def _wait(self) -> None:
        """Until a child ends, a signal arrives, something is due, or, while the server starts, a beacon arrives."""
        poller = zmq.Poller()
        poller.register(self._signals.fd, zmq.POLLIN)
        if not self._all_ready():
            poller.register(self._watcher.socket, zmq.POLLIN)
        for child in self._children.values():
            if child.pidfd >= 0:
                poller.register(child.pidfd, zmq.POLLIN)
        now = time.monotonic_ns()
        due = [life.restart_ns for life in self._lives.values() if life.restart_ns is not None]
        due += [step.deadline_ns for step in list(self._steps)[:1] if step.deadline_ns is not None]
        tick_ms = TICK_MS if all(child.pidfd >= 0 for child in self._children.values()) else BLIND_TICK_MS
        wait_ms = min([tick_ms, *((when - now) // 1_000_000 + 1 for when in due)])
        poller.poll(max(0, wait_ms))
        self._signals.clear()

    # ---- stages ------------------------------------------------------------------------------------------------

    def _start(self, life: Life) -> None:
        life.started(time.monotonic_ns())
        frontend = life.kind is Kind.FRONTEND
        fd = self._listeners.fd(life.index) if frontend else None
        engine = life.kind is Kind.ENGINE
        self._children[life.kind, life.index] = Child(
            self._command(life.kind, self._config_path, life.index, life.epoch, fd),
            environment=environment(one_thread=not engine, shared=len(self._config.engines()) > 1),
            nice=POOLING_NICE if engine and self._gives_way(life.index) else 0,
            output=Path(self._config.log_dir) / f"{life.name}.out", pass_fds=() if fd is None else (fd,))

    def _gives_way(self, engine: int) -> bool:
        """Whether an engine is one of those that must not disturb the streams of a chat model."""
        models, engines = self._config.models, self._config.engines()
        return (engine < len(engines) and models[engines[engine]].task in POOLING_TASKS
                and any(model.task == "generate" for model in models))

    def _title(self, life: Life) -> str:
        """What the terminal calls a process."""
        engines = self._config.engines()
        if life.kind is not Kind.ENGINE or len(self._config.models) == 1:
            return life.name
        return f"{life.name} ({self._config.models[engines[life.index]].names[0]})"

    def _on_death(self, life: Life, code: int, now: int) -> None:
        child = self._children.pop((life.kind, life.index))
        if life.failed or self._told_to_stop(life.kind):
            return
        words = child.last_words()
        if not self._was_ready and code in START_CODES:
            sentence = words[-1] if words else f"{life.name} could not start ({describe_exit(code)})."
            self._fail(StartError(code, sentence))
            return
        again = life.died(now)
        how = describe_exit(code) + (", perhaps for lack of memory" if code == -signal.SIGKILL
                                     and life.condemned_ns is None and life.ready_ns is None else "")
        if again:
            self._restarts.labels(stage=life.kind.name.lower()).inc()
            self._terminal.line(f"{self._title(life)} ended ({how}) and is started again.")
            return
        said = f"; it said: {words[-1]}" if words else "."
        members = given_up_with(self._config, life.kind, life.index)
        for member in members:
            self._lives[member].give_up()
        if all(other.failed for other in self._lives.values() if other.kind is life.kind):
            self._fail(StartError(
                CRASH_LOOP, f"{life.name} died {len(life.deaths)} times within 60 seconds ({how}){said}"))
            return
        self._terminal.line(f"{self._title(life)} died too often ({how}): its model is given up{said}")
        for member in members:
            if member in self._children:
                self._children[member].signal(signal.SIGTERM)
        engines = self._config.engines()
        failed = {engines[other.index] for other in self._lives.values() if other.failed and other.kind is Kind.ENGINE}
        self._status.facts_json = json.dumps({"failed_models": sorted(failed)}).encode()
        self._publisher.announce()

    def _watch_beacons(self, now: int) -> None:
        """Show progress, notice readiness, and deal with whoever makes none."""
        for member, child in self._children.items():
            life, heard = self._lives[member], self._watcher.latest.get(member)
            beacon = heard.beacon if heard is not None else None
            if beacon is not None and beacon.epoch == life.epoch:
                if life.ready_ns is None and beacon.state != State.STARTING:
                    life.ready_ns = now
                    if self._was_ready and not self._steps:
                        self._terminal.line(f"{self._title(life)} is ready again.")
                elif beacon.state == State.STARTING and life.kind is Kind.ENGINE and not self._was_ready:
                    if beacon.phase not in (self._phases.get(member), "ready"):
                        self._phases[member] = beacon.phase
                        self._terminal.progress(f"{self._title(life)}: {beacon.phase}")
            if self._told_to_stop(life.kind):
                continue
            if life.condemned_ns is not None:
                if now - life.condemned_ns > ABORT_GRACE_S * S:
                    child.kill()
                continue
            verdict = judge(life, beacon, heard.at_ns if heard is not None else 0, now, self._resumed_ns,
                            self._config.timeouts)
            if verdict is not Verdict.FINE:
                life.condemned_ns = now
                self._terminal.line(f"{self._title(life)} {verdict.value}: it is replaced.")
                child.signal(signal.SIGABRT if verdict is Verdict.HUNG else signal.SIGKILL)
        if not self._was_ready and not self._steps and self._all_ready():
            self._was_ready = True
            self._status.state, self._status.phase, self._status.percent = State.READY, "ready", 100
            self._publisher.announce()
            facts = {index: banner.facts_of(heard.beacon.facts_json)
                     for (kind, index), heard in self._watcher.latest.items() if kind is Kind.ENGINE}
            seconds = (time.monotonic_ns() - self._config.started_ns) / S
            for text in banner.lines(self._config, self._listeners, facts, seconds):
                self._terminal.line(text)

    def _all_ready(self) -> bool:
        """Every stage, and the frontends know it: a request that comes now is answered."""
        latest = self._watcher.latest
        return all(life.ready_ns is not None for life in self._lives.values() if not life.failed) and all(
            latest[member].beacon.facts_json == SEES_ALL for member in self._lives if member[0] is Kind.FRONTEND)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            if self._reload is not None:
                try:
                    self._config = self._reload(self._config)
                    save(self._config, self._config_path)
                except StartError as error:
                    self._terminal.line(f"SIGHUP: the configuration stays as it is: {error.message}")
            for (kind, _), child in self._children.items():
                if kind is Kind.FRONTEND:
                    child.signal(signal.SIGHUP)
        elif self._steps:
            self._steps = deque([Step(tuple(Kind), 0.0)])
        elif not self._was_ready:
            self._steps = deque([Step(tuple(Kind), QUICK_GRACE_S)])
        else:
            seconds = self._config.timeouts.shutdown_s
            self._terminal.line(f"Stopping: running requests have up to {seconds:g} s (a second signal stops at once).")
            self._steps = deque([
                Step((Kind.FRONTEND,), seconds + STOP_GRACE_S), Step((Kind.TOKENIZER,), STOP_GRACE_S),
                Step((Kind.ENGINE,), STOP_GRACE_S), Step((Kind.DETOKENIZER,), STOP_GRACE_S)])

    def _fail(self, error: StartError) -> None:
        """End everything because of `error`; the first one counts."""
        if self._failure is None:
            self._failure = error
            self._steps = deque([Step(tuple(Kind), QUICK_GRACE_S)])

    def _told_to_stop(self, kind: Kind) -> bool:
        """Whether the stop has come to this kind: its ends are expected and nothing of it is started again."""
        return bool(self._steps) and not any(kind in step.kinds and step.deadline_ns is None for step in self._steps)

    def _stopped(self) -> bool:
        """Drive the stop by what is due; whether it is over."""
        while self._steps:
            step, now = self._steps[0], time.monotonic_ns()
            waiting = [child for (kind, _), child in self._children.items() if kind in step.kinds]
            if step.deadline_ns is None:
                step.deadline_ns = now + int(step.grace_s * S)
                for child in waiting if step.grace_s else ():
                    child.signal(signal.SIGTERM)
            if waiting and now < step.deadline_ns:
                return False
            for child in waiting:
                child.kill()
            if waiting:
                step.deadline_ns = now + S
                return False
            if len(self._steps) == 1:
                return True
            self._steps.popleft()
        return True
