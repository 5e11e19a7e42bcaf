"""Bounded, non-blocking senders: one PUSH socket per destination, with a small queue behind it.

`send` never waits. What the socket does not take is queued up to a number of messages and bytes; past that the
message is refused and the caller decides (429, pause prefill, drop a stuck peer). Used from one thread only.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from pipeline import codec
from pipeline.transport import Address

MAX_QUEUED = 1000
MAX_QUEUED_BYTES = 64 * 2**20
COPY_BELOW = 64 * 1024            # larger frames go out without a copy; their buffers must not change


class Outbox:
    """The way to one receiving socket."""

    __slots__ = ("_socket", "_queue", "_bytes")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._queue: deque[list[bytes | memoryview]] = deque()
        self._bytes = 0

    def send(self, frames: list[bytes | memoryview]) -> bool:
        if not self._queue and self._try(frames):
            return True
        size = sum(len(f) for f in frames)
        if len(self._queue) >= MAX_QUEUED or self._bytes + size > MAX_QUEUED_BYTES:
            return False
        self._queue.append(frames)
        self._bytes += size
        return True

    def flush(self) -> bool:
        """Send what is queued; True when nothing is left."""
        while self._queue:
            if not self._try(self._queue[0]):
                return False
            self._bytes -= sum(len(f) for f in self._queue.popleft())
        return True

    def pressure(self) -> float:
        return max(len(self._queue) / MAX_QUEUED, self._bytes / MAX_QUEUED_BYTES)

    def close(self) -> None:
        self._socket.close(linger=0)

    def _try(self, frames: list[bytes | memoryview]) -> bool:
        try:
            if len(frames) == 1:
                self._socket.send(frames[0], zmq.NOBLOCK, copy=len(frames[0]) < COPY_BELOW)
            else:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < COPY_BELOW)
        except zmq.Again:
            return False
        return True


class Outboxes:
    """Every destination of one process; implements `transport.Sender`. Sockets are connected at first use."""

    def __init__(self, connect: Callable[[Address], zmq.Socket[bytes]]) -> None:
        self._connect = connect
        self._boxes: dict[Address, Outbox] = {}

    def send(self, to: Address, message: Any) -> bool:
        box = self._boxes.get(to)
        if box is None:
            box = self._boxes[to] = Outbox(self._connect(to))
        return box.send(codec.encode(message))

    def pressure(self, to: Address) -> float:
        box = self._boxes.get(to)
        return 0.0 if box is None else box.pressure()

    def flush(self) -> bool:
        """Try every queue once; True when all are empty."""
        return not [box for box in self._boxes.values() if not box.flush()]

    def close(self) -> None:
        for box in self._boxes.values():
            box.close()
        self._boxes.clear()
