"""The frontend's sockets in its asyncio loop: the inbox, the beacons, the outboxes' queues, and the table's clock.

The inbox's file descriptor is edge-triggered: it is drained to the end, in slices that let the loop turn, and looked at
ten times a second besides. Beacons are read then and only then, as each would wake the loop. Nothing here waits or blocks. Run
by the frontend.
"""
from __future__ import annotations

import asyncio
import logging
from typing import Any

import zmq

from frontend.metrics import FrontendMetrics
from frontend.stages import Stages
from frontend.table import RequestTable
from pipeline import codec, sockets
from pipeline.beacon import SEES_ALL, BeaconWatcher
from pipeline.messages import Admitted, Kind, Load
from pipeline.schema import BadFrame
from pipeline.stage import Context

SLICE = 128                      # messages between two turns of the loop
POLL_S = 0.1
log = logging.getLogger(__name__)


class Link:
    """Moves messages between the sockets and the table."""

    def __init__(self, context: Context, watcher: BeaconWatcher, stages: Stages, table: RequestTable,
                 metrics: FrontendMetrics) -> None:
        self._context, self._watcher, self._stages = context, watcher, stages
        self._table, self._metrics = table, metrics
        self._inbox = context.inbox()
        self._loop = asyncio.get_running_loop()
        self._soon = False
        self._due = self._loop.time()
        self._timer = self._loop.call_soon(self._poll)
        self._descriptor = self._inbox.FD
        self._loop.add_reader(self._descriptor, self._drain)

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._inbox.close(linger=0)
        self._watcher.close()

    def _poll(self) -> None:
        """The safety net of edge-triggered descriptors, and everything that goes by time."""
        now = self._loop.time()
        self._metrics.loop_lag.set(max(0.0, now - self._due))
        self._metrics.open_requests.set(len(self._table))
        self._beacons()
        self._drain()
        self._table.tick()
        self._context.outboxes.flush()
        self._context.publisher.load = Load(running=len(self._table))
        self._context.publisher.turned(len(self._table) > 0)
        self._due = now + POLL_S
        self._timer = self._loop.call_at(self._due, self._poll)

    def _drain(self) -> None:
        """Read a slice of the inbox; come back soon when there may be more."""
        self._soon = False
        messages = []
        for _ in range(SLICE):
            if not sockets.readable(self._inbox):
                break
            frames = self._inbox.recv_multipart(zmq.NOBLOCK)
            try:
                messages.append(codec.decode(frames))
            except BadFrame:
                self._bad_frame()
        # The prompt's ids come from the engine and the text from the detokenizer: ids first, whoever was faster.
        messages.sort(key=lambda message: not isinstance(message, Admitted))
        for message in messages:
            self._handle(message)
        if len(messages) == SLICE and not self._soon:
            self._soon = True
            self._loop.call_soon(self._drain)
        self._context.outboxes.flush()

    def _handle(self, message: Any) -> None:
        try:
            self._table.handle(message)
        except BadFrame:
            self._bad_frame()
        except Exception:                                    # one message's fault is not the others'
            log.exception("a %s could not be handled", type(message).__name__)

    def _beacons(self) -> None:
        changed = self._watcher.drain()
        self._stages.note()
        for beacon in changed:
            self._table.stage_restarted(Kind(beacon.kind), beacon.index, beacon.epoch)
        self._table.beacons_changed()
        status = self._context.status
        if not status.facts_json and self._stages.all_ready():
            status.facts_json = SEES_ALL
            self._context.publisher.announce()

    def _bad_frame(self) -> None:
        self._context.bad_frames.labels(socket="in").inc()


def watch(context: Context) -> BeaconWatcher:
    """Beacons of all stages, ourselves included (for /metrics), and of the launcher."""
    members = [*context.config.members(), (Kind.LAUNCHER, 0)]
    return BeaconWatcher(context.zmq_context, context.config, members, metrics=True)
