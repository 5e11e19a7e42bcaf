"""The life of a stage process: command line, parent watch, signals, sockets, and the loop that drives its logic.

`run` serves the tokenizer, the engine and the detokenizer; the frontend, which lives in an asyncio loop, uses `enter`
and wires its own sockets. A stage is crash-only: what escapes its per-request boundaries ends the process, and the
launcher starts the next epoch.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from prometheus_client import CollectorRegistry, Counter

from pipeline import codec, logs, sockets
from pipeline.beacon import BeaconPublisher, BeaconWatcher
from pipeline.config import ServerConfig, load
from pipeline.endpoints import endpoint, path_of
from pipeline.errors import StartError
from pipeline.messages import Kind, State
from pipeline.outbox import Outboxes
from pipeline.parent import die_with
from pipeline.schema import BadFrame
from pipeline.transport import Address, Logic, Sender, Status

MAX_MESSAGES_PER_TURN = 256
MAX_POLL_MS = 1000
FLUSH_POLL_MS = 5
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Context:
    """What a stage process has before its logic exists."""

    config: ServerConfig
    kind: Kind
    index: int
    epoch: int
    status: Status
    registry: CollectorRegistry
    zmq_context: zmq.Context[zmq.Socket[bytes]]
    outboxes: Outboxes
    publisher: BeaconPublisher
    bad_frames: Counter
    log_writer: logs.LogWriter
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def sender(self) -> Sender:
        return self.outboxes

    @property
    def name(self) -> str:
        return f"{self.kind.name.lower()}.{self.index}"

    def progress(self, phase: str, percent: int) -> None:
        """What the launcher shows while this stage starts."""
        self.status.phase, self.status.percent = phase, percent
        self.publisher.announce()

    def ready(self, facts_json: bytes = b"") -> None:
        self.status.facts_json = facts_json or self.status.facts_json
        self.status.state, self.status.phase, self.status.percent = State.READY, "ready", 100
        self.publisher.turned(False)
        self.publisher.announce()

    def inbox(self, name: str = "in", hwm: int = sockets.HWM) -> zmq.Socket[bytes]:
        """Bind one of this stage's receiving sockets."""
        return sockets.pull(self.zmq_context, endpoint(self.config, Address(self.kind, self.index, name)), hwm)

    def close(self) -> None:
        self.publisher.stop()
        self.outboxes.close()
        self.zmq_context.destroy(linger=0)
        for name in ("in", "ctl", "beacon"):
            with contextlib.suppress(OSError):
                os.unlink(path_of(self.config.run_dir, self.kind, self.index, name))
        self.log_writer.stop()


def die_with_parent(launcher_pid: int) -> None:
    """Ask the kernel to kill this process when its launcher dies, then check that it has not died already.

    `launcher_pid` 0: the stage was started by hand and outlives its shell's fate as any program does.
    """
    if launcher_pid:
        die_with(launcher_pid)


def enter(kind: Kind, argv: Sequence[str] | None = None, options: Sequence[str] = ()) -> Context:
    """Read the command line and the configuration, and start logging and beacons. Exits with one sentence on error.

    `options`: names of further command line options of this stage (``--listen-fd``), kept in `Context.extra`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {Path(sys.argv[0]).parent.name}", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the resolved configuration file")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--epoch", type=int, default=1, help="counts the starts of this stage")
    for option in options:
        parser.add_argument(f"--{option}", default="")
    args = parser.parse_args(argv)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # the launcher decides what Ctrl-C means
    try:
        config = load(args.config)
        die_with_parent(config.launcher_pid)
    except StartError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    writer = logs.setup(f"{kind.name.lower()}.{args.index}", config.log_dir, config.log_level)
    status, registry, ctx = Status(), CollectorRegistry(), sockets.context()
    publisher = BeaconPublisher(ctx, config, kind, args.index, args.epoch, status, registry)
    publisher.start()
    return Context(
        config=config, kind=kind, index=args.index, epoch=args.epoch, status=status, registry=registry, zmq_context=ctx,
        outboxes=Outboxes(lambda to: sockets.push(
            ctx, endpoint(config, to), sockets.CONTROL_HWM if to.name == "ctl" else sockets.HWM)),
        publisher=publisher, log_writer=writer,
        bad_frames=Counter("quartet:ipc_bad_frames", "Frames that were dropped because they are no valid message.",
                           ["socket"], registry=registry),
        extra={option: getattr(args, option.replace("-", "_")) for option in options})


def run(kind: Kind, build: Callable[[Context], Logic], argv: Sequence[str] | None = None) -> int:
    """Enter, build the logic (which may take long: it reports by `Context.progress`), and loop until SIGTERM."""
    context = enter(kind, argv)
    try:
        with Stage(context) as stage:
            logic = build(context)
            gc.collect()
            gc.freeze()                                   # the model's objects are never garbage: do not walk them
            context.ready()
            stage.loop(logic)
        return 0
    except StartError as error:
        log.error("cannot start: %s", error.message)
        print(error.message, file=sys.stderr)
        return error.exit_code
    except Exception:
        log.exception("the stage ends after an unexpected error")
        raise
    finally:
        context.close()


class Stage:
    """Inboxes, beacons of the peers and the wake-up of signals in one poller."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stopping = self._looping = False
        names = ["ctl", "in"] if context.kind is Kind.ENGINE else ["in"]
        self._inboxes = [(name, context.inbox(name, sockets.CONTROL_HWM if name == "ctl" else sockets.HWM))
                         for name in names]
        peers = [m for m in context.config.members() if m != (context.kind, context.index)]
        self._watcher = BeaconWatcher(context.zmq_context, context.config, peers, slow=True)
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._terminate)
        self._poller, self._poller_closed = zmq.Poller(), zmq.Poller()
        for poller in (self._poller, self._poller_closed):
            poller.register(self._watcher.socket, zmq.POLLIN)
            poller.register(self._wake_read.fileno(), zmq.POLLIN)
        for name, inbox in self._inboxes:
            self._poller.register(inbox, zmq.POLLIN)
            if name != "in":
                self._poller_closed.register(inbox, zmq.POLLIN)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self._wake_read.close()
        self._wake_write.close()
        self._watcher.close()
        for _name, inbox in self._inboxes:
            inbox.close(linger=0)

    def loop(self, logic: Logic) -> None:
        """Turn until SIGTERM: read a bounded number of messages, let the logic work, push what it sent."""
        publisher, outboxes = self._context.publisher, self._context.outboxes
        flushed = self._looping = True
        while not self._stopping:
            accepting = logic.accepting()
            busy = logic.has_work()
            poller = self._poller if accepting else self._poller_closed
            events = dict(poller.poll(0 if busy else self._timeout_ms(logic, flushed)))
            publisher.turned(busy or bool(events))
            if events:
                if self._wake_read.fileno() in events:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_read.recv(4096)
                if self._watcher.socket in events:
                    for beacon in self._watcher.drain():
                        logic.peer_restarted(Kind(beacon.kind), beacon.index, beacon.epoch)
                for socket_name, inbox in self._inboxes:
                    if inbox in events:
                        self._receive(socket_name, inbox, logic)
            logic.turn()
            publisher.load = logic.load()
            flushed = outboxes.flush()
            publisher.turned(logic.has_work())
        deadline = time.monotonic() + 0.2                 # last words; LINGER is 0
        while not outboxes.flush() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _timeout_ms(self, logic: Logic, flushed: bool) -> int:
        if not flushed:
            return FLUSH_POLL_MS
        timer = logic.next_timer_ns()
        if timer is None:
            return MAX_POLL_MS
        return max(0, min(MAX_POLL_MS, (timer - time.monotonic_ns() + 999_999) // 1_000_000))

    def _receive(self, name: str, inbox: zmq.Socket[bytes], logic: Logic) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            try:
                frames = inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                logic.handle(codec.decode(frames))
            except BadFrame:                              # also: a good message that this stage never receives
                self._context.bad_frames.labels(socket=name).inc()
                continue
            if (name == "in" and not logic.accepting()) or not sockets.readable(inbox):
                return

    def _terminate(self, *_: object) -> None:
        if not self._looping:
            os._exit(0)                                   # still loading: there is nothing to finish
        self._stopping = True
