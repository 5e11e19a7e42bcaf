"""The pieces of JSON that answers are made of: serialising, finish reasons, usage, error bodies.

Strict clients decide the shapes (reference/api-surface.md section 3): closed lists of finish reasons, no null where a
list is expected, no NaN. Run by the frontend; pure functions.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from frontend.request import Prompt, Request
from pipeline.errors import QuartetError
from pipeline.logprobs import join_logprobs
from pipeline.messages import Finish, Logprobs, unpack_ids

# Everything outside ASCII is escaped: some clients split a stream's lines at U+2028 and its like.
quote = json.encoder.encode_basestring_ascii

_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_REASONS = {Finish.EOS: "stop", Finish.STOP_ID: "stop", Finish.STOP_STRING: "stop", Finish.LENGTH: "length",
            Finish.REPETITION: "repetition", Finish.COMPLETE: "stop"}


def dump(value: Any) -> bytes:
    """Compact UTF-8 JSON; ValueError for NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def dump_ascii(value: Any) -> str:
    """Compact ASCII JSON; ValueError for NaN. Made for many small values: most are None or a word."""
    if value is None:
        return "null"
    return quote(value) if type(value) is str else _ENCODER.encode(value)


def finish_reason(finish: Finish) -> str | None:
    """OpenAI's name; None while the choice runs."""
    return _REASONS.get(finish)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int,
          reasoning_tokens: int | None = None) -> dict[str, Any]:
    """`reasoning_tokens` None: reasoning is not told from the answer."""
    told: dict[str, Any] = {
        "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens}}
    if reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return told


def usage_of(request: Request) -> dict[str, Any]:
    return usage(request.prompt_tokens, request.completion_tokens, request.cached_tokens, request.reasoning_tokens)


def prompt_ids(prompt: Prompt) -> list[int] | None:
    """What the engine computed with; None where it never said."""
    return list(unpack_ids(prompt.ids)) if prompt.admitted and prompt.embeds is None else None


def prompt_logprobs(prompt: Prompt) -> tuple[Logprobs, Sequence[int]] | None:
    """The prompt's log-probabilities and its ids, where both came."""
    ids = prompt_ids(prompt)
    if not prompt.logprobs or ids is None:
        return None
    return join_logprobs(prompt.logprobs), ids[:prompt.num_logprobs]


def error_body(error: QuartetError) -> bytes:
    return dump(error.body())


def error_event(error: QuartetError) -> bytes:
    """The event that ends a stream which cannot be completed."""
    return b"data: " + dump_ascii(error.body()).encode() + b"\n\n"
