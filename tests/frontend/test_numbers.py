"""Vectors on their way out: the types that numpy lacks round as torch rounds them; JSON reads back to the same bits."""
from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch

from frontend.numbers import SIZES, dump, encoded, raw

VALUES = np.concatenate([np.random.default_rng(5).standard_normal(4000) * scale for scale in (1e-4, 0.02, 1, 40)] + [
    np.arange(-60, 60) / 16, np.array([0.0, -0.0, 1.0, 448.0, -448.0])]).astype(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [
    ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("fp8_e4m3", torch.float8_e4m3fn),
    ("fp8_e5m2", torch.float8_e5m2)])
def test_types_round_as_torch_rounds(name: str, dtype: torch.dtype) -> None:
    expected = torch.from_numpy(VALUES).to(dtype).view(torch.uint8).numpy().tobytes()
    assert bytes(raw(VALUES, name, "native")) == bytes(raw(VALUES, name, "little")) == expected
    assert len(expected) == SIZES[name] * len(VALUES)


def test_what_is_too_large_for_eight_bits_becomes_the_largest_number() -> None:
    assert bytes(raw(np.array([1e6, -1e6], np.float32), "fp8_e4m3", "native")) == b"\x7e\xfe"


@pytest.mark.parametrize(("name", "big"), [("float32", ">f4"), ("float16", ">f2")])
def test_big_endian(name: str, big: str) -> None:
    assert bytes(raw(VALUES, name, "big")) == VALUES.astype(big).tobytes()


def test_base64_and_json_read_back_to_the_same_bits() -> None:
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded(VALUES, "float32", "native")), "<f4"), VALUES)
    assert np.array_equal(np.array(json.loads(dump(VALUES)), np.float32), VALUES)
    assert dump({"a": np.float32(0.1), "b": VALUES[:0], "c": VALUES[-4:].reshape(2, 2)}) == (
        b'{"a":0.1,"b":[],"c":[[-0.0,1.0],[448.0,-448.0]]}')
    assert raw(VALUES[:0], "float32", "native") == b""
