"""The one factory of ZeroMQ sockets: every option that keeps a socket bounded and non-blocking is set here.

The receiver binds, each sender connects its own PUSH socket. libzmq keeps what was queued towards a peer that died and
hands it to the successor, which drops it by the epoch in the message: recovery never relies on a socket's contents.
"""
from __future__ import annotations

import zmq

from pipeline.codec import MAX_HEADER

HWM = 4000                       # messages per pipe and direction
CONTROL_HWM = 20000              # control sockets: tiny messages
POLLIN = int(zmq.POLLIN)         # the operators of an enum take longer than the question itself
MAX_MESSAGE = 512 * 2**20        # bytes of one frame


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context for the main thread of one process. Never carried over a fork."""
    ctx = zmq.Context(io_threads=1)
    ctx.set(zmq.MAX_SOCKETS, 4096)
    return ctx


def _base(ctx: zmq.Context[zmq.Socket[bytes]], kind: int, hwm: int) -> zmq.Socket[bytes]:
    socket = ctx.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_MESSAGE, MAX_HEADER))
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    return socket


def pull(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, hwm: int = HWM) -> zmq.Socket[bytes]:
    """A bound inbox."""
    socket = _base(ctx, zmq.PULL, hwm)
    socket.bind(endpoint)
    return socket


def push(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, hwm: int = HWM) -> zmq.Socket[bytes]:
    """A connected outbox socket; the peer may bind later."""
    socket = _base(ctx, zmq.PUSH, hwm)
    socket.connect(endpoint)
    return socket


def publisher(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """A bound PUB for beacons: lossy by design."""
    socket = _base(ctx, zmq.PUB, 100)
    socket.bind(endpoint)
    return socket


def subscriber(ctx: zmq.Context[zmq.Socket[bytes]], endpoints: list[str]) -> zmq.Socket[bytes]:
    """A SUB connected to every publisher in `endpoints`."""
    socket = _base(ctx, zmq.SUB, 1000)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    for endpoint in endpoints:
        socket.connect(endpoint)
    return socket


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be read now. Cheaper than the exception of a read that finds none."""
    return bool(int(socket.get(zmq.EVENTS)) & POLLIN)
