"""Beacons: what every stage says about itself once a second and on change, engines ten times, and how the others listen.

A daemon thread owns the PUB socket, so a beacon goes out however long the main loop's turn lasts; the age of the last
turn tells a hang from work. Only a new epoch is a death: silence or an old tick affect routing and readiness, nothing
else. A lost beacon heals itself with the next one. Each beacon wakes every process that hears it, beside the threads of an
engine's step: so only engines, whose load frontends go by, are fast, and who does not need that listens to the slow topic.
"""
from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import zmq
from prometheus_client import CollectorRegistry

from pipeline import codec, sockets
from pipeline.config import ServerConfig
from pipeline.endpoints import beacon_endpoint
from pipeline.messages import PROTOCOL, Beacon, Kind, Load, MetricFamily, Metrics, State
from pipeline.metrics import snapshot
from pipeline.schema import BadFrame
from pipeline.transport import Status

BEACON_TOPIC, METRICS_TOPIC = b"b", b"m"
SLOW_TOPIC = BEACON_TOPIC + b"s"  # changes, all while a stage is not ready, and one a second
SLOW_PERIOD_S = METRICS_PERIOD_S = 1.0
SEES_ALL = b'{"sees_all":true}'  # a frontend's facts from when it has heard that all the others are ready
FRESH_S = 3.0                     # a stage whose newest beacon is older than this is not counted as ready
M = TypeVar("M", Beacon, Metrics)


class BeaconPublisher:
    """Publishes for one stage. `turned`, `load` and `status` are written by the main thread only."""

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]], config: ServerConfig, kind: Kind, index: int, epoch: int,
                 status: Status, registry: CollectorRegistry) -> None:
        self.status = status
        self.load = Load()
        self._ctx, self._config, self._registry = ctx, config, registry
        self._kind, self._index, self._epoch = kind, index, epoch
        self._tick, self._tick_ns, self._pending = 0, time.monotonic_ns(), False
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="beacon", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def turned(self, pending: bool) -> None:
        """The main loop turned; `pending` says whether it has work to do now."""
        self._tick += 1
        self._tick_ns = time.monotonic_ns()
        self._pending = pending

    def announce(self) -> None:
        """Publish now: the status changed."""
        self._wake.set()

    def stop(self) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join(timeout=1.0)

    def beacon(self) -> Beacon:
        status = self.status
        return Beacon(
            protocol=PROTOCOL, kind=self._kind, index=self._index, epoch=self._epoch, pid=os.getpid(),
            state=status.state, phase=status.phase, percent=status.percent, tick=self._tick,
            tick_age_ms=max(0, time.monotonic_ns() - self._tick_ns) // 1_000_000, pending=self._pending,
            load=self.load, facts_json=status.facts_json)

    def _run(self) -> None:
        socket = sockets.publisher(self._ctx, beacon_endpoint(self._config, self._kind, self._index))
        next_metrics = next_slow = 0.0
        slow_s, fast_s = min(SLOW_PERIOD_S, self._config.timeouts.hang_s / 8), self._config.timeouts.beacon_s
        changed = True
        try:
            while not self._stop:
                now, topic = time.monotonic(), BEACON_TOPIC
                if changed or now >= next_slow or self.status.state != State.READY:
                    next_slow, topic = now + slow_s, SLOW_TOPIC
                socket.send_multipart([topic, *codec.encode(self.beacon())], zmq.NOBLOCK)
                if now >= next_metrics:
                    next_metrics = now + METRICS_PERIOD_S
                    metrics = Metrics(self._kind, self._index, self._epoch, snapshot(self._registry))
                    topic = METRICS_TOPIC + _name(self._kind, self._index)
                    socket.send_multipart([topic, *codec.encode(metrics)], zmq.NOBLOCK)
                slow = self.status.state == State.READY and self._kind is not Kind.ENGINE
                changed = self._wake.wait(max(fast_s, slow_s) if slow else fast_s)
                self._wake.clear()
        finally:
            socket.close(linger=0)


def _name(kind: Kind, index: int) -> bytes:
    return b"%d.%d" % (kind, index)


@dataclass(slots=True)
class Heard:
    """The newest beacon of one stage and when it arrived."""

    beacon: Beacon
    at_ns: int


class BeaconWatcher:
    """Listens to some stages. `drain` from one thread; `latest` is then up to date."""

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]], config: ServerConfig,
                 members: Iterable[tuple[Kind, int]], *, metrics: bool = False, slow: bool = False) -> None:
        """`slow`: hear of changes at once and of the rest once a second."""
        members = list(members)
        self.socket = sockets.subscriber(ctx, [beacon_endpoint(config, kind, index) for kind, index in members])
        self.socket.setsockopt(zmq.UNSUBSCRIBE, b"")
        self.socket.setsockopt(zmq.SUBSCRIBE, SLOW_TOPIC if slow else BEACON_TOPIC)
        if metrics:
            self.socket.setsockopt(zmq.SUBSCRIBE, METRICS_TOPIC)
        self.latest: dict[tuple[Kind, int], Heard] = {}
        self.bad_frames = 0
        self._members = frozenset(members)
        self._metrics = {METRICS_TOPIC + _name(*member): list[bytes]() for member in members}

    @property
    def metrics(self) -> dict[tuple[Kind, int], list[MetricFamily]]:
        """The newest metrics of each stage that sent any: read when somebody asks, which is seldom."""
        found = {}
        for frames in filter(None, self._metrics.values()):
            message = self._decode(frames, Metrics)
            if message is not None:
                found[Kind(message.kind), message.index] = message.families
        return found

    def drain(self, limit: int = 256) -> list[Beacon]:
        """Read what has arrived; the beacons among it that show a new epoch (the first sight of a stage included)."""
        changed = []
        for _ in range(limit):
            if not sockets.readable(self.socket):
                break
            topic, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            if topic in self._metrics:
                self._metrics[topic] = frames
                continue
            message = self._decode(frames, Beacon)
            if message is None:
                continue
            if message.protocol != PROTOCOL:
                self.bad_frames += 1
                continue
            key = (Kind(message.kind), message.index)
            known = self.latest.get(key)
            if known is not None and message.epoch < known.beacon.epoch:
                continue                                      # the last words of a predecessor
            if known is None or message.epoch > known.beacon.epoch:
                changed.append(message)
            self.latest[key] = Heard(message, time.monotonic_ns())
        return changed

    def _decode(self, frames: list[bytes], kind: type[M]) -> M | None:
        """The message in `frames` if it is of this kind and a member's."""
        with suppress(BadFrame):
            message = codec.decode(frames)
            if isinstance(message, kind) and (message.kind, message.index) in self._members:
                return message
        self.bad_frames += 1
        return None

    def epoch(self, kind: Kind, index: int) -> int | None:
        heard = self.latest.get((kind, index))
        return None if heard is None else heard.beacon.epoch

    def ready(self, kind: Kind, index: int) -> bool:
        """Whether the stage said READY lately."""
        heard = self.latest.get((kind, index))
        return (heard is not None and heard.beacon.state == State.READY
                and time.monotonic_ns() - heard.at_ns < FRESH_S * 1e9)

    def close(self) -> None:
        self.socket.close(linger=0)
