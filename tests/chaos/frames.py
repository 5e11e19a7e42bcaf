"""Frames that no stage should take seriously: random, truncated, nested, mutated, misdirected, outdated, replayed.

`Garbage` makes them endlessly and reproducibly from a seed. No socket here.
"""
from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from pipeline import codec
from pipeline.ids import RidMaker
from pipeline.messages import (
    REGISTRY,
    TEXT_ROW,
    TOKEN_ROW,
    Abort,
    Add,
    Adds,
    Admitted,
    AdmittedItem,
    Census,
    Deltas,
    DetokenizeQuery,
    Failed,
    FailedItem,
    Finish,
    Open,
    Route,
    StepOut,
    StopHit,
    Submit,
    TextDelta,
    TokenizeQuery,
    TokenOut,
    Usage,
    pack_ids,
    pack_rids,
)
from pipeline.params import DetokSpec, SamplingParams
from pipeline.schema import Range

Frames = list[bytes]
EXTREMES = (0, 1, -1, 127, 255, 256, 65_535, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, -(2**63))
ODD: tuple[Any, ...] = (None, True, "", "text", "\x00" * 50, b"", b"\xff" * 7, [], [[]], 1.5, float("nan"), float("inf"),
                        -1, 2**64 - 1, [None] * 20)
FINISHED = 1                          # counters of ids that a frontend of epoch 1 has used up long before


class Garbage:
    """Frames for a server whose stages have index 0 and epoch 1."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._makers: list[Callable[[], Frames]] = [
            self.noise, self.truncated, self.nested, self.flipped, self.odd_value, self.misshapen, self.any_message,
            self.outdated, self.replayed, self.many_frames]

    def frames(self) -> Frames:
        return self.rng.choice(self._makers)()

    # ---- what is no message --------------------------------------------------------------------------------------

    def noise(self) -> Frames:
        return [self.rng.randbytes(self.rng.choice((0, 1, 2, 8, 100, 5000)))]

    def truncated(self) -> Frames:
        data = self.any_message()[0]
        return [data[:self.rng.randrange(len(data))]] if self.rng.random() < 0.5 else [data + self.rng.randbytes(3)]

    def nested(self) -> Frames:
        depth = self.rng.choice((10, 500, 2000, 100_000))
        kind = self.rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01"))
        return [b"\x92\x01" + kind * depth + b"\x00"]

    def flipped(self) -> Frames:
        data = bytearray(self.any_message()[0])
        for _ in range(self.rng.randrange(1, 4)):
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        return [bytes(data)]

    def misshapen(self) -> Frames:
        """Claims of a gigabyte, maps, extensions, unknown types, no list at all."""
        return [self.rng.choice((
            b"\x92\x08\xdd\xff\xff\xff\xff", b"\x92\x0a\xc6\x40\x00\x00\x00abc", b"\x92\x01\xdb\xff\xff\xff\xffab",
            b"\xdf\xff\xff\xff\xff", b"\xc9\x00\x00\x00\x04\x05abcd", b"\x81\x01\x02", b"\xc1", b"\x90", b"\x91\xc0",
            b"\x91\xcd\xff\xff", b"\x91\x00", b"\x93\x06\xc4\x05abcde\x00", msgpack.packb([15, 1, [0, [2**31, 2**31], 0]]),
            msgpack.packb(["Submit", 1]), msgpack.packb({"type": 1})))]

    def odd_value(self) -> Frames:
        """A message in which one value, at any depth, is of a wrong type or out of its range."""
        value = msgpack.unpackb(self.any_message()[0], strict_map_key=False)
        here: Any = value
        while True:
            place = self.rng.randrange(len(here))
            if type(here[place]) is not list or not here[place] or self.rng.random() < 0.3:
                break
            here = here[place]
        here[place] = self.rng.choice(ODD)
        return [msgpack.packb(value)]

    def many_frames(self) -> Frames:
        head = self.any_message()[0]
        return [head, *(self.rng.randbytes(20) for _ in range(self.rng.choice((1, 3, 64, 65, 100))))]

    # ---- messages that are well formed ---------------------------------------------------------------------------

    def any_message(self) -> Frames:
        """Any type with random contents: for most sockets the wrong one."""
        return _bytes(self._value(self.rng.choice(list(REGISTRY.values()))))

    def outdated(self) -> Frames:
        """Right in everything but the epoch of sender or receiver."""
        rng, rid = self.rng, self._rid()
        epoch = rng.choice((0, 2, 3, 1000, 2**32 - 1))
        ids = pack_ids([1000, 1001])
        route = Route(0, epoch, 0, epoch, 0, epoch)
        return _bytes(rng.choice((
            StepOut(0, epoch, 1, [Open(rid, DetokSpec(), ids, b"")], [TokenOut(rid, 0, ids)]),
            StepOut(0, 1, epoch, [Open(rid, DetokSpec(), ids, b"")], [TokenOut(rid, 0, ids)]),
            StepOut(rng.randrange(65536), 1, 1, [Open(rid, DetokSpec(stop=["a"]), ids, b"")], [TokenOut(rid, 0, ids)]),
            Deltas(0, epoch, [TextDelta(rid, 0, "not yours", 0, ids)]),
            Admitted(0, epoch, [AdmittedItem(rid, ids)]), Failed(2, 0, epoch, [FailedItem(rid, "internal_error", "no")]),
            Census(rng.randrange(65536), epoch, pack_rids([rid])), Census(0, epoch, b""),
            TokenizeQuery(rid, epoch, 0, "text", None, True, False), DetokenizeQuery(rid, epoch, 0, ids),
            Adds([Add(rid, route, 1, 0, ids, b"", SamplingParams(), DetokSpec(), 0, 0, b"")]),
            Submit(rid, route, 0, 1, 0, "text", None, b"", b"", True, None, SamplingParams(), DetokSpec(), 0))))

    def replayed(self) -> Frames:
        """What was right for a request that is over, or for one that never was."""
        rng, ids = self.rng, pack_ids([1000, 1001])
        rid = rng.choice((RidMaker(0, 1).next(), self._rid()))
        return _bytes(rng.choice((
            Deltas(0, 1, [TextDelta(rid, 0, "again", 0, ids), TextDelta(rid, 900, "a gap", 800, ids, Finish.LENGTH)]),
            StepOut(0, 1, 1, [], [TokenOut(rid, 0, ids, Finish.LENGTH, None, None, None, Usage(2, 0, 2))]),
            StepOut(0, 1, 1, [], [TokenOut(rid, 5000, ids)]), StepOut(0, 1, 1, [], [], TOKEN_ROW.pack(rid, 5000, 7)),
            Deltas(0, 1, [], TEXT_ROW.pack(rid, 900, 800, 2, 5), ids, "a gap"),
            Deltas(0, 1, [], TEXT_ROW.pack(rid, 0, 0, 3, 5), ids, "short"),
            Abort(pack_rids([rid, rid + 1]), rng.randrange(256)), StopHit(rid, rng.randrange(1000)),
            Admitted(0, 1, [AdmittedItem(rid, ids)]), Failed(1, 0, 1, [FailedItem(rid, "no such code", "text")]),
            Census(0, 1, pack_rids([rid])))))

    def _rid(self) -> int:
        """An id that is not in use: of this frontend, or of one that does not exist."""
        rng = self.rng
        return (rng.choice((0, 0, 0, 1, 127)) << 57 | rng.choice((1, 1, 0, 2, 4095)) << 45
                | rng.randrange(2**36, 2**37) << 8 | rng.choice((0, 0, 1, 255)))

    def _value(self, hint: Any) -> Any:
        """Any value of the type that a field has, mostly a small one, sometimes an extreme one."""
        rng, origin = self.rng, typing.get_origin(hint)
        if origin is typing.Annotated:
            bounds: Range = hint.__metadata__[0]
            fitting = [n for n in EXTREMES if bounds.low <= n <= bounds.high]
            return rng.choice(fitting) if rng.random() < 0.5 else rng.randrange(2)
        if hint is bool:
            return rng.random() < 0.5
        if hint is float:
            return rng.choice((0.0, 1.0, -1.0, 1e300, float("nan"), float("inf")))
        if hint is str:
            return rng.choice(("", "text", "\ud7ff\x00" * 10, "word " * 500))
        if hint is bytes:
            return rng.choice((b"", b"\0\0\0\0", pack_ids([1000] * 9), b"odd", b"{}", rng.randbytes(40)))
        if hint is np.ndarray:
            return np.zeros((2, 3), np.float32)
        if origin is list:
            return [self._value(typing.get_args(hint)[0]) for _ in range(rng.randrange(3))]
        if dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint, include_extras=True)
            values = {f.name: self._value(hints[f.name]) for f in dataclasses.fields(hint)}
            if "rid" in values:
                values["rid"] = self._rid()
            return hint(**values)  # type: ignore[operator]
        return None if rng.random() < 0.5 else self._value(rng.choice(
            [a for a in typing.get_args(hint) if a is not type(None)]))


def _bytes(message: Any) -> Frames:
    return [bytes(frame) for frame in codec.encode(message)]
