"""Messages to ZeroMQ frames and back: msgpack with limits, closed types, arrays as extra zero-copy frames.

The first frame is the header ``[type, field, ...]``; further frames are array bodies. Any deviation is a `BadFrame`,
which the receiver drops and counts; nothing that arrives can name a class or make us allocate beyond the limits.
A `Codec` knows one registry: the stages' (this module's `encode` and `decode`) or the in-cluster client's
(pipeline.edge).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from pipeline.messages import RECORDS, REGISTRY
from pipeline.schema import DTYPES, BadFrame, reader, writer

MAX_HEADER = 64 * 2**20
MAX_FRAMES = 64
_DTYPE_CODE = {name: code for code, name in enumerate(DTYPES)}


class Codec:
    """Encodes and decodes the messages of one closed registry."""

    def __init__(self, registry: Mapping[int, type], records: Sequence[type], max_header: int = MAX_HEADER) -> None:
        self._read: dict[int, Callable[[Any, list[memoryview]], Any]] = {n: reader(cls) for n, cls in registry.items()}
        self._number: dict[type, int] = {cls: number for number, cls in registry.items()}
        self._write: dict[type, Callable[[Any], tuple[Any, ...]]] = {
            cls: writer(cls) for cls in (*registry.values(), *records)}
        self._max_header = max_header

    def encode(self, message: Any) -> list[bytes | memoryview]:
        """Frames of one message. Arrays are not copied: do not change them until they are sent."""
        frames: list[bytes | memoryview] = [b""]
        writers = self._write

        def default(value: Any) -> Any:
            write = writers.get(type(value))
            if write is not None:
                return write(value)
            if isinstance(value, np.ndarray):
                name = "bfloat16_bits" if value.dtype == np.uint16 else value.dtype.name
                body = np.ascontiguousarray(value)
                frames.append(body.data.cast("B") if body.size else b"")
                return [_DTYPE_CODE[name], list(value.shape), len(frames) - 2]
            raise TypeError(f"{type(value).__name__} has no wire form")

        cls = type(message)
        frames[0] = msgpack.packb((self._number[cls], *writers[cls](message)), default=default, use_bin_type=True)
        return frames

    def decode(self, frames: Sequence[bytes | memoryview]) -> Any:
        """The message in `frames`, or BadFrame."""
        if not 1 <= len(frames) <= MAX_FRAMES + 1:
            raise BadFrame("wrong number of frames")
        header = frames[0]
        size = len(header)
        if not 0 < size <= self._max_header:
            raise BadFrame("header of a wrong size")
        try:
            value = msgpack.unpackb(
                header, raw=False, use_list=True, strict_map_key=True, max_str_len=size, max_bin_len=size,
                max_array_len=size, max_map_len=0, max_ext_len=0)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadFrame(type(error).__name__) from None
        if type(value) is not list or not value or type(value[0]) is not int:
            raise BadFrame("no message")
        read = self._read.get(value[0])
        if read is None:
            raise BadFrame("unknown type")
        return read(value[1:], [memoryview(f) for f in frames[1:]])


_STAGES = Codec(REGISTRY, RECORDS)
encode, decode = _STAGES.encode, _STAGES.decode
