"""What a tokenizer and its decoder worker say to each other over two pipes: msgpack behind a length of four bytes.

A job is a recording. `open` and `close` have no answer, `next` has exactly one: the next window, or why there is none.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import msgpack
import numpy as np

MAX_COMMAND = 16 * 1024              # bytes
MAX_ANSWER = 8 * 2**20
_LENGTH = struct.Struct("<I")


class BadAnswer(Exception):
    """The worker said something that is no answer: it is broken."""


@dataclass(slots=True)
class Command:
    job: int
    op: str                              # open | next | close
    path: str = ""                       # open: the recording
    model: str = ""                      # open: directory of the checkpoint, which says what its encoder takes
    max_seconds: float = 0.0             # open: longer recordings are refused
    skip: bool = False                   # next: without features


@dataclass(slots=True)
class WindowAnswer:
    job: int
    index: int
    last: bool
    start_s: float
    seconds: float
    features: np.ndarray | None          # float32


@dataclass(slots=True)
class NoWindow:
    """There is nothing (more) to decode, and a sentence for the caller that says why."""

    job: int
    reason: str


Answer = WindowAnswer | NoWindow


def pack_command(command: Command) -> bytes:
    body = msgpack.packb([command.job, command.op, command.path, command.model, command.max_seconds, command.skip])
    assert len(body) <= MAX_COMMAND
    return _LENGTH.pack(len(body)) + body


def read_command(stream: BinaryIO) -> Command | None:
    """Blocks for the next command; None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return Command(*msgpack.unpackb(stream.read(_LENGTH.unpack(head)[0])))


def write_window(stream: BinaryIO, job: int, index: int, last: bool, start_s: float, seconds: float,
                 features: np.ndarray | None) -> None:
    if features is None:
        shape, data = [], b""
    else:
        shape, data = list(features.shape), np.ascontiguousarray(features, np.float32).tobytes()
    _write(stream, [job, index, last, start_s, seconds, shape, data])


def write_bad(stream: BinaryIO, job: int, reason: str) -> None:
    _write(stream, [job, reason])


def _write(stream: BinaryIO, value: list[object]) -> None:
    body = msgpack.packb(value)
    stream.write(_LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()


class Answers:
    """Answers out of bytes as they arrive."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Answer]:
        """The answers that are complete now; BadAnswer for bytes that are none."""
        self._held += data
        found: list[Answer] = []
        while len(self._held) >= 4:
            size = _LENGTH.unpack_from(self._held)[0]
            if size > MAX_ANSWER:
                raise BadAnswer("too long")
            if len(self._held) < 4 + size:
                break
            found.append(_answer(bytes(memoryview(self._held)[4:4 + size])))
            del self._held[:4 + size]
        return found


def _answer(body: bytes) -> Answer:
    try:
        value = msgpack.unpackb(body, max_bin_len=MAX_ANSWER, max_str_len=4096, max_array_len=16)
        if len(value) == 2:
            return NoWindow(int(value[0]), str(value[1]))
        job, index, last, start_s, seconds, shape, data = value
        features = np.frombuffer(data, np.float32).reshape(shape) if shape else None
        return WindowAnswer(int(job), int(index), bool(last), float(start_s), float(seconds), features)
    except (ValueError, TypeError, msgpack.UnpackException):
        raise BadAnswer("not msgpack of the right shape") from None
