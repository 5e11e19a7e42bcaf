"""The pooling engine's door: what a slice of inputs must satisfy.

Engine process, no torch. What it refuses is a `QuartetError` for the user. Must never raise anything else for bytes
that decoded to a PoolAdd.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine_proc.pooling.plan import CLASS_TASKS, TOKEN_TASKS, PoolRunner
from pipeline.errors import QuartetError, invalid
from pipeline.messages import PoolAdd, PoolInput, unpack_ids

MAX_RESULT_BYTES = 48 * 2**20        # of one input: what an outbox always has room for


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """What this engine can serve."""

    max_model_len: int
    vocab_size: int
    num_type_ids: int
    tasks: Sequence[str]
    dimension: int
    num_labels: int
    matryoshka: Sequence[int] | None
    max_waiting: int
    max_embed_len: int = 0                   # tokens of an input in parts

    @classmethod
    def of(cls, runner: PoolRunner, max_model_len: int, max_waiting: int, max_embed_len: int = 0) -> PoolLimits:
        longest = min(max_model_len, runner.max_positions or max_model_len)
        return cls(max_model_len=longest, vocab_size=runner.vocab_size, num_type_ids=runner.num_type_ids,
                   tasks=runner.tasks, dimension=runner.dimension, num_labels=runner.num_labels,
                   matryoshka=runner.matryoshka, max_waiting=max_waiting, max_embed_len=max_embed_len)


def check(add: PoolAdd, limits: PoolLimits, num_requests: int) -> None:
    """QuartetError when `add` cannot be served. `num_requests`: those held besides it."""
    params = add.params
    if params.task not in limits.tasks:
        known = ", ".join(f"'{task}'" for task in limits.tasks)
        raise invalid(f"This model does not do '{params.task}'; it does {known}.", "task")
    if params.dimensions:
        _check_dimensions(params.dimensions, params.task, limits)
    width = limits.num_labels if params.task in CLASS_TASKS else params.dimensions or limits.dimension
    for given in add.inputs:
        _check_input(given, limits)
        if given.parts and params.task != "embed":
            raise invalid("Only embeddings are computed in parts.", "input")
        if params.task in TOKEN_TASKS and len(given.ids) * width > MAX_RESULT_BYTES:
            raise invalid(f"Input {given.index} would give more than {MAX_RESULT_BYTES >> 20} MiB of numbers; "
                          "shorten it.", "input")
    if num_requests >= limits.max_waiting:
        raise QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")


def _check_dimensions(wanted: int, task: str, limits: PoolLimits) -> None:
    if task in CLASS_TASKS:
        raise invalid("'dimensions' is for embeddings only.", "dimensions")
    if limits.matryoshka is None:
        raise invalid(f"This model's embeddings have {limits.dimension} dimensions and cannot be cut.", "dimensions")
    if wanted > limits.dimension or (limits.matryoshka and wanted not in limits.matryoshka):
        allowed = (f"one of {', '.join(map(str, limits.matryoshka))}" if limits.matryoshka
                   else f"between 1 and {limits.dimension}")
        raise invalid(f"'dimensions' must be {allowed} for this model.", "dimensions")


def _check_input(given: PoolInput, limits: PoolLimits) -> None:
    if len(given.ids) % 4:
        raise invalid("Token ids must be 32-bit integers.", "input")
    if not given.ids:
        raise invalid(f"Input {given.index} is empty.", "input")
    count = len(given.ids) // 4
    longest = _longest_part(given, count)
    if longest > limits.max_model_len or (given.parts and count > limits.max_embed_len):
        raise QuartetError("context_length_exceeded", f"This model's maximum context length is {limits.max_model_len} "
                                                      f"tokens, but input {given.index} has {count}.", "input")
    if given.skip >= count:
        raise invalid(f"Nothing of input {given.index} would be pooled.", "input")
    highest = int(np.frombuffer(given.ids, "<u4").max())
    if highest >= limits.vocab_size:
        raise invalid(f"Token id {highest} is out of the vocabulary, which has {limits.vocab_size} ids.", "input")
    if given.type_ids and (len(given.type_ids) != count or max(given.type_ids) >= limits.num_type_ids):
        raise invalid(f"The token type ids of input {given.index} do not fit this model.", "input")


def _longest_part(given: PoolInput, count: int) -> int:
    """Tokens of the longest stretch that is computed at once."""
    if not given.parts:
        return count
    try:
        parts = unpack_ids(given.parts)
    except ValueError:
        raise invalid("The parts of an input must be 32-bit integers.", "input") from None
    if min(parts) < 1 or sum(parts) != count or given.type_ids or given.skip:
        raise invalid(f"The parts of input {given.index} do not fit it.", "input")
    return max(parts)
