"""`prompt_embeds`: rows that take the place of a prompt's token embeddings, as plain numbers in base64.

Never a torch file or anything else that would have to be unpickled: a type out of three, a shape, and the bytes. Run by
the frontend; pure functions.
"""
from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from frontend.fields import Body
from pipeline.errors import QuartetError, invalid

TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


class Embeds(Body):
    """Row-major little-endian numbers of shape [tokens, hidden size of the model]."""

    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=2, max_length=2)]
    data: Annotated[str, Field(description="base64")]


def rows_of(embeds: Embeds, longest: int) -> np.ndarray:
    """[tokens, hidden]: float32, float16, or the bits of bfloat16 as uint16. QuartetError for what does not fit."""
    kind, (tokens, hidden) = TYPES[embeds.dtype], embeds.shape
    if tokens >= longest:
        raise QuartetError("context_length_exceeded", f"This model's maximum context length is {longest} tokens. However, "
                           f"'prompt_embeds' stands for {tokens} tokens.", "prompt_embeds")
    try:
        data = base64.b64decode(embeds.data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("'prompt_embeds.data' must be base64.", "prompt_embeds.data") from None
    if len(data) != tokens * hidden * kind.itemsize:
        raise invalid(f"'prompt_embeds.data' has {len(data)} bytes; {tokens} x {hidden} numbers of {embeds.dtype} have "
                      f"{tokens * hidden * kind.itemsize}.", "prompt_embeds.data")
    rows = np.frombuffer(data, kind).reshape(tokens, hidden)
    finite = (rows & 0x7F80 != 0x7F80) if kind == TYPES["bfloat16"] else np.isfinite(rows)
    if not finite.all():
        raise invalid("'prompt_embeds.data' holds a number that is not finite.", "prompt_embeds.data")
    return rows
