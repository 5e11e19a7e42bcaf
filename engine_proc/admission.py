"""The engine's door: what an Add must satisfy, and the ids that it must not let in (again).

Engine process, no torch. Checks again what only the engine can know (vocabulary, context, room); what it refuses is a
`QuartetError` for the user. Must never raise anything else for bytes that decoded to an Add.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from engine_proc.repetition import RepetitionWatch
from engine_proc.request import Sequence
from pipeline.errors import QuartetError, invalid
from pipeline.grammars import COMPILED, MAX_AFTER, MAX_COMPILED_BYTES
from pipeline.ids import MAX_CHILDREN, child
from pipeline.messages import Add, Finish, unpack_ids
from pipeline.params import (
    MAX_BAD_WORDS,
    MAX_BEAMS,
    MAX_BIAS,
    MAX_LOGPROB_CELLS,
    MAX_LOGPROB_IDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PATTERN,
    MAX_STOP_IDS,
    Grammar,
    SamplingParams,
)

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
    check_sampling(add.sampling, limits.vocab_size)
    if add.sampling.beam is not None and add.history:
        raise QuartetError("internal_error", "A beam search begins at its prompt.")
    num_prompt = len(add.ids) // 4
    if add.embeds is not None and (add.embeds.ndim != 2 or len(add.embeds) != num_prompt
                                   or add.embeds.dtype not in (np.float32, np.float16, np.uint16)):
        raise invalid("'prompt_embeds' must be a matrix with a row for each token of the prompt.", "prompt_embeds")
    _check_prompt_logprobs(add.sampling.prompt_logprobs, num_prompt)
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


def _check_prompt_logprobs(k: int | None, num_prompt: int) -> None:
    """What is too much for the pipeline. The frontend did the same for the output."""
    if k is not None and k > MAX_LOGPROBS and k * num_prompt > MAX_LOGPROB_CELLS:
        raise invalid(f"'prompt_logprobs' of {k} for a prompt of {num_prompt} tokens are more than "
                      f"{MAX_LOGPROB_CELLS} log-probabilities.", "prompt_logprobs")


def _check_ids(data: bytes, vocab_size: int, param: str) -> None:
    if len(data) % 4:
        raise invalid("Token ids must be 32-bit integers.", param)
    if data:
        highest = int(np.frombuffer(data, "<u4").max())
        if highest >= vocab_size:
            raise invalid(f"Token id {highest} is out of the vocabulary, which has {vocab_size} ids.", param)


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
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
    _check_ids(sampling.allowed_ids, vocab_size, "allowed_token_ids")
    _check_ids(sampling.logprob_ids, vocab_size, "logprob_token_ids")
    if len(sampling.logprob_ids) > 4 * MAX_LOGPROB_IDS:
        raise invalid(f"'logprob_token_ids' may have at most {MAX_LOGPROB_IDS} ids.", "logprob_token_ids")
    if len(sampling.bad_ids) > MAX_BAD_WORDS:
        raise invalid(f"'bad_words' may become at most {MAX_BAD_WORDS} sequences of ids.", "bad_words")
    for word in sampling.bad_ids:
        _check_ids(word, vocab_size, "bad_words")
    _check_rules(sampling, vocab_size)
    if sampling.grammar is not None:
        _check_grammar(sampling.grammar, vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        k = getattr(sampling, name)
        if k is not None and not 0 <= k <= vocab_size:
            raise invalid(f"'{name}' must be between 0 and the size of the vocabulary.", name)


def _check_grammar(grammar: Grammar, vocab_size: int) -> None:
    if grammar.kind != COMPILED or len(grammar.text) > MAX_COMPILED_BYTES or len(grammar.after) > MAX_AFTER:
        raise invalid("The grammar of this request cannot be used.", grammar.param)
    _check_ids(grammar.after_ids, vocab_size, grammar.param)


def _check_rules(sampling: SamplingParams, vocab_size: int) -> None:
    """The optional parts of the sampling parameters."""
    repetition, thinking, beam = sampling.repetition, sampling.thinking, sampling.beam
    if repetition is not None and not (1 <= repetition.min_size <= repetition.max_size <= MAX_PATTERN
                                       and repetition.min_count >= 2):
        raise invalid(f"'repetition_detection' looks for patterns of 1 to {MAX_PATTERN} ids, twice at least.",
                      "repetition_detection")
    if thinking is not None:
        if not (0 <= thinking.start_id < vocab_size and 0 <= thinking.end_id < vocab_size):
            raise invalid("This model has no reasoning that a budget could bound.", "thinking_token_budget")
    if beam is not None and not (1 <= beam.width <= MAX_BEAMS and math.isfinite(beam.length_penalty)
                                 and beam.early in ("false", "true", "never")):
        raise invalid(f"Beam search takes 1 to {MAX_BEAMS} beams and a finite 'length_penalty'.", "use_beam_search")


def with_embeds(add: Add, rows: np.ndarray) -> Add:
    """`add` with its prompt's rows as float32 (uint16 are the bits of bfloat16) and apart from others in the cache."""
    contents = blake2b(repr((rows.dtype.str, rows.shape)).encode(), digest_size=16)
    contents.update(np.ascontiguousarray(rows).data)
    rows = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows.astype(np.float32)
    return dataclasses.replace(add, embeds=rows, salt=add.salt + contents.digest())


def sequences(add: Add, children: Iterable[int], limits: Limits, arrival: int, now: int) -> list[Sequence]:
    """The sequences of a checked Add: `children` of it, the first one leading the others to its prompt's blocks."""
    if add.embeds is not None:
        add = with_embeds(add, add.embeds)
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
        if sampling.repetition is not None:
            seq.watch = RepetitionWatch(sampling.repetition)
            for token in seq.tokens[seq.num_prompt:-1] if seq.num_history else ():
                seq.watch.push(token)             # the verdict below takes the last one
        if seq.num_history:
            seq.finish = seq.verdict()            # its end may be all that was lost
        elif len(seq.tokens) >= seq.max_total and not seq.unscored:
            seq.finish = Finish.LENGTH            # nothing to compute
        made.append(seq)
    return made
