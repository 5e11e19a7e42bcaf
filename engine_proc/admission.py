"""The engine's door: what an Add must satisfy, and the ids that it must not let in (again).

Engine process, no torch. Checks again what only the engine can know (vocabulary, context, room); what it refuses is a
`QuartetError` for the user. Must never raise anything else for bytes that decoded to an Add.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine_proc.request import Sequence
from pipeline.errors import QuartetError, invalid
from pipeline.ids import MAX_CHILDREN, child
from pipeline.messages import Add, Finish, unpack_ids
from pipeline.params import MAX_BIAS, MAX_N, MAX_STOP_IDS, SamplingParams

TOMBSTONE_NS = 120 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this engine can serve."""

    max_model_len: int
    capacity: int                     # tokens that fit into the whole KV cache
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_waiting: int

    @property
    def longest(self) -> int:
        """The most tokens of a sequence: the KV of its last one is never needed."""
        return min(self.max_model_len, self.capacity + 1)


class Tombstones:
    """Ids that are over: bounded in number and in time."""

    __slots__ = ("_limit", "_expiry")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._expiry: dict[int, int] = {}          # rid -> monotonic ns; oldest first

    def __len__(self) -> int:
        return len(self._expiry)

    def add(self, rid: int, now: int) -> None:
        self._expiry.pop(rid, None)
        while self._expiry:
            oldest = next(iter(self._expiry))
            if len(self._expiry) < self._limit and self._expiry[oldest] > now:
                break
            del self._expiry[oldest]
        self._expiry[rid] = now + TOMBSTONE_NS

    def holds(self, rid: int, now: int) -> bool:
        return self._expiry.get(rid, 0) > now


def check(add: Add, limits: Limits, num_waiting: int) -> None:
    """QuartetError when `add` cannot be served."""
    if not 1 <= add.n <= MAX_N or child(add.rid) + add.n > MAX_CHILDREN or add.choice + add.n > MAX_CHILDREN:
        raise invalid(f"'n' must be between 1 and {MAX_N}.", "n")
    if not add.ids:
        raise invalid("The prompt is empty.", "prompt")
    _check_ids(add.ids, limits.vocab_size, "prompt")
    _check_ids(add.history, limits.vocab_size, "prompt")
    _check_sampling(add.sampling, limits.vocab_size)
    num_prompt = len(add.ids) // 4
    if num_prompt + (add.sampling.max_tokens > 0) > limits.max_model_len:
        raise QuartetError(
            "context_length_exceeded", f"This model's maximum context length is {limits.max_model_len} tokens, but the "
            f"prompt has {num_prompt} tokens and leaves no room for an answer.", "prompt")
    if num_prompt > limits.capacity:
        raise QuartetError(
            "context_length_exceeded", f"The prompt has {num_prompt} tokens, but the KV cache of this server holds "
            f"{limits.capacity} tokens.", "prompt")
    if not add.history and num_waiting >= limits.max_waiting:
        raise QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")


def _check_ids(data: bytes, vocab_size: int, param: str) -> None:
    if len(data) % 4:
        raise invalid("Token ids must be 32-bit integers.", param)
    if data:
        highest = int(np.frombuffer(data, "<u4").max())
        if highest >= vocab_size:
            raise invalid(f"Token id {highest} is out of the vocabulary, which has {vocab_size} ids.", param)


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    numbers = {name: getattr(sampling, name) for name in (
        "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise invalid(f"'{name}' must be a finite number.", name)
    _check_ids(sampling.stop_ids, vocab_size, "stop_token_ids")
    _check_ids(sampling.bias_ids, vocab_size, "logit_bias")
    if len(sampling.stop_ids) > 4 * MAX_STOP_IDS:
        raise invalid(f"'stop_token_ids' may have at most {MAX_STOP_IDS} ids.", "stop_token_ids")
    if len(sampling.bias_ids) > 4 * MAX_BIAS or len(sampling.bias_values) != len(sampling.bias_ids):
        raise invalid(f"'logit_bias' must map at most {MAX_BIAS} token ids to numbers.", "logit_bias")
    if not np.isfinite(np.frombuffer(sampling.bias_values, "<f4")).all():
        raise invalid("The values of 'logit_bias' must be finite numbers.", "logit_bias")
    for name in ("logprobs", "prompt_logprobs"):
        k = getattr(sampling, name)
        if k is not None and not 0 <= k <= vocab_size:
            raise invalid(f"'{name}' must be between 0 and the size of the vocabulary.", name)


def sequences(add: Add, children: Iterable[int], limits: Limits, arrival: int, now: int) -> list[Sequence]:
    """The sequences of a checked Add: `children` of it, the first one leading the others to its prompt's blocks."""
    sampling = add.sampling
    stops = frozenset(unpack_ids(sampling.stop_ids))
    if not sampling.ignore_eos:
        stops |= frozenset(limits.eos_ids)
    eos_id = limits.eos_ids[0] if limits.eos_ids and not sampling.ignore_eos else -1
    made: list[Sequence] = []
    for j in children:
        seq = Sequence.of(add, j, arrival + j, limits.longest)
        seq.stops, seq.eos_id, seq.arrived_ns = stops, eos_id, now
        if made and not seq.unscored:             # prompt logprobs are of each choice's own computation
            seq.leader = made[0]
        if seq.num_history:
            seq.finish = seq.verdict()            # its end may be all that was lost
        elif len(seq.tokens) >= seq.max_total and not seq.unscored:
            seq.finish = Finish.LENGTH            # nothing to compute
        made.append(seq)
    return made
