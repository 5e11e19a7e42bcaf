"""Vectors as they go out: JSON lists, base64 or raw bytes, in the element type that was asked for.

Run by the frontend. Pure functions over float32 arrays; whoever writes many of them lets the loop turn in between.
"""
from __future__ import annotations

import base64
import sys
from functools import cache
from typing import Any

import numpy as np
import orjson

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def dump(value: Any) -> bytes:
    """Compact JSON of anything with numpy arrays and float32 scalars in it: the fewest digits that read back the same."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def raw(rows: np.ndarray, dtype: str, endianness: str) -> bytes | memoryview:
    """The elements of a float32 array, one after the other, without a copy where none is needed."""
    if dtype == "float32":
        found = np.ascontiguousarray(rows)
    elif dtype == "float16":
        found = rows.astype(np.float16)
    elif dtype == "bfloat16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        found = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)      # to the nearest, ties to even
    else:
        found = _fp8(rows, dtype)
    if endianness == "big" if sys.byteorder == "little" else endianness == "little":
        found = found.byteswap()
    return found.data.cast("B") if found.size else b""


def encoded(rows: np.ndarray, dtype: str, endianness: str) -> str:
    """Base64 of `raw`."""
    return base64.b64encode(raw(rows, dtype, endianness)).decode("ascii")


def _fp8(rows: np.ndarray, dtype: str) -> np.ndarray:
    """uint8: sign, exponent, mantissa; to the nearest, ties to even; what is too large becomes the largest number."""
    values, middles = _fp8_table(dtype)
    size = np.abs(rows)
    code = np.searchsorted(middles, size, side="left")
    tie = (code < len(middles)) & (middles[np.minimum(code, len(middles) - 1)] == size)
    code = np.minimum(code + (tie & (code % 2 == 1)), len(values) - 1)
    return (code | np.where(np.signbit(rows), 128, 0)).astype(np.uint8)


@cache
def _fp8_table(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The positive numbers by their codes, and the middles between neighbours."""
    mantissa, bias, count = (3, 7, 127) if dtype == "fp8_e4m3" else (2, 15, 124)
    codes = np.arange(count)
    exponent, fraction = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    values = np.where(exponent == 0, fraction * 2.0**(1 - bias), (1 + fraction) * 2.0**(exponent - bias)).astype(np.float64)
    return values, ((values[1:] + values[:-1]) / 2)
