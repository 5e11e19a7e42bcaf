"""The wire: every message survives a round trip, and nothing that is no message does any harm."""
from __future__ import annotations

import dataclasses
import random
import typing

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import codec, messages
from pipeline.messages import (
    Abort,
    Add,
    Adds,
    Deltas,
    Logprobs,
    Route,
    StepOut,
    Submit,
    Tensor,
    TextDelta,
    TokenOut,
    Usage,
    pack_ids,
    unpack_ids,
)
from pipeline.params import DetokSpec, SamplingParams
from pipeline.schema import BadFrame, Range

ROUTE = Route(0, 1, 2, 3, 4, 5)


def strategy(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value that an annotation of the registry allows."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        bounds = hint.__metadata__[0]
        assert isinstance(bounds, Range)
        return st.integers(bounds.low, bounds.high)
    if origin is list:
        return st.lists(strategy(typing.get_args(hint)[0]), max_size=3)
    if origin is not None:
        return st.one_of([st.none() if a is type(None) else strategy(a) for a in typing.get_args(hint)])
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{f.name: strategy(hints[f.name]) for f in dataclasses.fields(hint)})
    if hint is np.ndarray:
        return st.builds(lambda n, d: np.arange(n * d, dtype=np.float32).reshape(n, d), st.integers(0, 3), st.integers(0, 3))
    return {str: st.text(max_size=8), bytes: st.binary(max_size=16), bool: st.booleans(),
            float: st.floats(allow_nan=False)}[hint]


def plain(value: typing.Any) -> typing.Any:
    """Records and arrays as nested lists that can be compared."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tolist()
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("cls", [c for c in messages.REGISTRY.values() if c is not Tensor], ids=lambda c: c.__name__)
def test_every_message_survives_a_round_trip(cls: type) -> None:
    @settings(max_examples=30, deadline=None)
    @given(strategy(cls))
    def check(message: typing.Any) -> None:
        back = codec.decode([bytes(f) for f in codec.encode(message)])
        assert type(back) is cls
        assert plain(back) == plain(message)
    check()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint32", "int32", "int64", "uint8", "uint16"])
def test_arrays_ride_as_extra_frames(dtype: str) -> None:
    data = np.arange(12, dtype=dtype).reshape(3, 4)
    frames = codec.encode(Tensor(7, data))
    assert len(frames) == 2 and len(frames[1]) == data.nbytes
    back = codec.decode([bytes(f) for f in frames])
    assert back.rid == 7 and back.data.dtype == data.dtype and np.array_equal(back.data, data)


@pytest.mark.parametrize("header", [
    [15, 1, [0, [2, 2], 0]], [15, 1, [0, [3], 1]], [15, 1, [99, [1], 0]], [15, 1, [0, [2**31, 2**31], 0]],
    [15, 1, [0, [1, 1, 1, 1, 1], 0]], [15, 1, [0, [-1], 0]], [15, 1, "x"]])
def test_array_headers_must_fit_their_frames(header: list[typing.Any]) -> None:
    with pytest.raises(BadFrame):
        codec.decode([msgpack.packb(header), b"\0" * 12])


def test_appended_fields_are_compatible_both_ways() -> None:
    old_reader = msgpack.packb([6, b"", 1, "a field that a later version appended"])
    assert codec.decode([old_reader]) == Abort(b"", 1)
    item = [1, 0, b"", 0]                              # a TokenOut without its later fields
    assert codec.decode([msgpack.packb([9, 0, 1, 1, [], [item]])]) == StepOut(0, 1, 1, [], [TokenOut(1, 0, b"")])


@pytest.mark.parametrize("frame", [
    b"", b"\xc1", b"\x91", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 100_000, b"\x81\x01\x02",
    b"\x92\xcd\x03\xe7\x00", msgpack.packb([6, "text", 1]), msgpack.packb([6, b"", 256]), msgpack.packb([6, b"", -1]),
    msgpack.packb([6, b"", True]), msgpack.packb([6, b"", 1]) + b"\x00", msgpack.packb("Abort"), msgpack.packb([]),
    msgpack.packb({"type": 6}), msgpack.packb([6, b"", 1.0]), msgpack.packb([True, b"", 1]),
    msgpack.packb([6, b"", msgpack.ExtType(1, b"x")]), b"\x80\x04\x95pickle."])
def test_what_is_no_message_is_a_bad_frame(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        codec.decode([frame])


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(BadFrame):
        codec.decode([codec.encode(Abort(b"", 0))[0]] + [b""] * (codec.MAX_FRAMES + 1))


def test_mutated_frames_decode_or_are_bad_frames() -> None:
    rng = random.Random(5)
    submit = Submit(1 << 20, ROUTE, 0, 2, 0, "hello", None, b"", b"", True, None, SamplingParams(logprobs=3),
                    DetokSpec(stop=["a", "b"]), 5)
    logprobs = Logprobs(1, b"\0" * 4, b"\0" * 4, b"\0" * 4, b"\0" * 4, [b"x"], [b"y"])
    originals = [codec.encode(m)[0] for m in (
        submit, Adds([Add(1, ROUTE, 1, 0, pack_ids([1, 2]), b"", SamplingParams(), DetokSpec(), 0, 0, b"")]),
        StepOut(0, 1, 1, [], [TokenOut(1, 0, pack_ids([3]), 1, None, logprobs, None, Usage(1, 2, 3))]),
        Deltas(0, 1, [TextDelta(1, 0, "abc", 0, b"", stop="x")]))]
    outcomes = {"good": 0, "bad": 0}
    for _ in range(20_000):
        frame = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            action, at = rng.randrange(3), rng.randrange(len(frame))
            if action == 0:
                frame[at] = rng.randrange(256)
            elif action == 1 and len(frame) > 1:
                del frame[at]
            else:
                frame.insert(at, rng.randrange(256))
        try:
            codec.decode([bytes(frame)])
            outcomes["good"] += 1
        except BadFrame:
            outcomes["bad"] += 1
    assert outcomes["bad"] > 1000 and outcomes["good"] > 100


def test_defaults_at_the_end_of_a_record_do_not_travel() -> None:
    plain, full = TextDelta(1, 0, "a", 0, b"\1\0\0\0"), TextDelta(2, 0, "a", 0, b"", open_call=True)
    _, _, _, items = msgpack.unpackb(codec.encode(Deltas(0, 1, [plain, full]))[0])
    assert items[0] == [1, 0, "a", 0, b"\1\0\0\0"] and len(items[1]) == len(dataclasses.fields(TextDelta))
    assert codec.decode(codec.encode(Deltas(0, 1, [plain, full]))).items == [plain, full]


def test_ids_are_little_endian_uint32() -> None:
    assert pack_ids([1, 2**32 - 1]) == b"\x01\0\0\0\xff\xff\xff\xff"
    assert list(unpack_ids(pack_ids(range(5)))) == [0, 1, 2, 3, 4]
    with pytest.raises(OverflowError):
        pack_ids([2**32])
    with pytest.raises(ValueError):
        unpack_ids(b"abc")
