"""Log-probabilities in the three forms of the API: chat, completions, and per prompt token.

JSON never holds NaN or an infinity: what is unlikely beyond measure is -9999.0. Run by the frontend; pure functions.
"""
from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from pipeline.messages import Logprobs, unpack_ids

FLOOR = -9999.0


def _floats(data: bytes) -> array[float]:
    values = array("f")
    values.frombytes(data)
    return values


def _finite(value: float) -> float:
    return value if value > FLOOR else FLOOR


def mean(found: Logprobs | None) -> float:
    """The mean log-probability of an output's tokens; of nothing, minus infinity."""
    values = _floats(found.values) if found is not None else array("f")
    return sum(values) / len(values) if values else -math.inf


def _name(token: bytes, number: int, as_id: bool) -> str:
    return f"token_id:{number}" if as_id else token.decode("utf-8", "replace")


def chat_content(found: Logprobs, ids: Sequence[int], as_ids: bool) -> list[dict[str, Any]]:
    """``choices[].logprobs.content``: one entry per token of `ids`, each with its k best and, once each, what was
    asked for by id."""
    k, top_ids = found.k, unpack_ids(found.top_ids)
    values, top_values = _floats(found.values), _floats(found.top_values)
    content = []
    for i, number in enumerate(ids):
        places = {top_ids[j]: j for j in reversed(range(i * k, (i + 1) * k))}
        top = [{"token": _name(found.top_tokens[j], top_ids[j], as_ids), "logprob": _finite(top_values[j]),
                "bytes": list(found.top_tokens[j])} for j in sorted(places.values())]
        content.append({"token": _name(found.tokens[i], number, as_ids), "logprob": _finite(values[i]),
                        "bytes": list(found.tokens[i]), "top_logprobs": top})
    return content


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion, piece by piece: text offsets go on from one piece to the next."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids, self._offset = as_ids, 0

    def piece(self, parts: Sequence[tuple[Logprobs, Sequence[int]]]) -> dict[str, list[Any]]:
        """The object for `parts`: the prompt's (with echo) and the output's log-probabilities with their ids."""
        result: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for found, ids in parts:
            values = _floats(found.values)
            for i, number in enumerate(ids):
                known = values[i] == values[i]               # NaN: the first token of a prompt has none
                token = _name(found.tokens[i], number, self._as_ids)
                result["text_offset"].append(self._offset)
                result["token_logprobs"].append(_finite(values[i]) if known else None)
                result["tokens"].append(token)
                result["top_logprobs"].append(self._best(found, i, token, values[i]) if known else None)
                self._offset += len(token)
        return result

    def _best(self, found: Logprobs, i: int, token: str, value: float) -> dict[str, float]:
        """The token itself, then the k best; of tokens that look alike the likeliest."""
        best = {token: _finite(value)}
        values, numbers = _floats(found.top_values[4 * i * found.k:4 * (i + 1) * found.k]), unpack_ids(
            found.top_ids[4 * i * found.k:4 * (i + 1) * found.k])
        for j, (number, top) in enumerate(zip(numbers, values)):
            best.setdefault(_name(found.top_tokens[i * found.k + j], number, self._as_ids), _finite(top))
        return best


def prompt_tokens(found: Logprobs, ids: Sequence[int], as_ids: bool) -> list[dict[str, Any] | None]:
    """``prompt_logprobs``: per prompt token id -> {logprob, rank, decoded_token}, the token itself first; null for the
    first token of the prompt."""
    k, values, top_values = found.k, _floats(found.values), _floats(found.top_values)
    ranks, top_ids = unpack_ids(found.ranks), unpack_ids(found.top_ids)
    result: list[dict[str, Any] | None] = []
    for i, number in enumerate(ids):
        if values[i] != values[i]:
            result.append(None)
            continue
        entry = {str(number): {"logprob": _finite(values[i]), "rank": ranks[i],
                               "decoded_token": _name(found.tokens[i], number, as_ids)}}
        for rank, j in enumerate(range(i * k, (i + 1) * k), 1):
            entry.setdefault(str(top_ids[j]), {
                "logprob": _finite(top_values[j]), "rank": rank,
                "decoded_token": _name(found.top_tokens[j], top_ids[j], as_ids)})
        result.append(entry)
    return result
