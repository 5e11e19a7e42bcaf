"""Bytes of a request to a validated body, or to one OpenAI-shaped error that names the parameter.

Parsing is strict JSON (no NaN, no lone surrogates, bounded depth); the last of two equal keys counts. Messages of
errors come from our own schemas and never repeat what was sent. Run by the frontend; holds no state.
"""
from __future__ import annotations

import math
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from frontend.fields import MAX_JSON_DEPTH, Body, refuse_unsupported
from pipeline.errors import QuartetError, invalid

_POSITION = re.compile(r"line \d+ column \d+")
B = TypeVar("B", bound=Body)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; QuartetError invalid_request for anything else."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        position = _POSITION.search(str(error))
        where = f" ({position.group()})" if position else ""
        raise QuartetError("invalid_request", f"The body is not valid JSON{where}.") from None
    if not isinstance(value, dict):
        raise QuartetError("invalid_request", "The body must be a JSON object.")
    _check(value)
    return value


def _check(value: Any) -> None:
    """Depth, and no number that overflowed to infinity."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise QuartetError("invalid_request", f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")
        below = []
        for container in level:
            for item in container.values() if type(container) is dict else container:
                kind = type(item)
                if kind is dict or kind is list:
                    below.append(item)
                elif kind is float and not math.isfinite(item):
                    raise QuartetError("invalid_request", "The body holds a number that is too large.")
        level = below


def validate(schema: type[B], body: dict[str, Any]) -> B:
    """`body` as a `schema`, or the first thing that is wrong with it."""
    refuse_unsupported(body, schema.HONOURS)
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        first = max(same, key=lambda e: len(_path(e["loc"], body)))     # of a union, the branch that fitted best
        param, message = _path(first["loc"], body), str(first["msg"])
        if first["type"] == "missing":
            raise QuartetError("invalid_request", f"The parameter '{param}' is required.", param) from None
        raise invalid(f"Invalid value for '{param}': {message[:1].lower()}{message[1:]}.", param) from None


def _path(loc: tuple[int | str, ...], body: Any) -> str:
    """`messages[0].role` from pydantic's location; the names of union branches are left out."""
    path, here = "", body
    for part in loc:
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif isinstance(part, str) and isinstance(here, dict) and (part in here or part == loc[-1]) and part != "[key]":
            path, here = f"{path}.{part}" if path else part, here.get(part)
    return path
