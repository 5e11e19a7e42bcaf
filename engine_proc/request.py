"""One sequence (one choice of one request) as the engine sees it. No torch here.

A sequence is described by counts, not by phases: prefill, decode and chunk follow from `num_computed` (tokens whose
KV is in the cache), `num_scheduled` (those plus what steps in flight compute) and `len(tokens)`.
"""
from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine_proc.constraint import Constraint
from engine_proc.repetition import RepetitionWatch
from pipeline.errors import QuartetError
from pipeline.messages import Add, Finish, Logprobs, Route
from pipeline.params import DetokSpec, SamplingParams

if TYPE_CHECKING:
    from engine_proc.beams import BeamSearch


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, KV blocks and sampling state of one choice; owned by the engine, changed only in `collect`."""

    rid: int
    route: Route
    choice: int
    tokens: array[int]                       # prompt ids, then output ids (a continuation's history included)
    num_prompt: int                          # length of the prompt proper
    sampling: SamplingParams
    detok: DetokSpec
    max_total: int                           # prompt + output tokens may not pass this
    deadline_ns: int = 0
    priority: int = 0
    salt: bytes = b""
    alone: bool = False
    arrival: int = 0                         # order of admission
    num_history: int = 0                     # output ids that came with a continuation
    num_computed: int = 0                    # tokens with KV in the cache
    num_scheduled: int = 0                   # num_computed + what steps in flight compute
    num_in_flight: int = 0                   # steps launched and not collected that hold this sequence
    num_sent: int = 0                        # output ids already sent to the detokenizer
    num_cached: int = 0                      # prompt tokens found in the prefix cache at first scheduling
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)   # chain hashes of the full blocks of `tokens`
    leader: Sequence | None = None           # wait until this sibling's prompt is computed, then share its blocks
    opened: bool = False                     # Open was sent to the detokenizer
    preemptions: int = 0
    finish: Finish = Finish.RUNNING
    stop_id: int | None = None
    slot: int = -1                           # row of the runner's sampler state; -1: none
    stops: frozenset[int] = frozenset()      # ids that end it: the model's (unless ignore_eos) and the request's
    eos_id: int = -1                         # which of them is the end of the sequence proper; -1: none
    mark: Finish = Finish.RUNNING            # how it is to end (ABORT, STOP_STRING, ERROR); applied at the next collect
    error: QuartetError | None = None        # with Finish.ERROR
    num_kept: int = -1                       # with Finish.STOP_STRING: output ids that belong to the text; -1: all
    prompt_logprobs: list[Logprobs] = field(default_factory=list)   # of its prompt's chunks, until they are sent
    num_prompt_scored: int = 0               # leading positions whose logits gave prompt logprobs
    constraint: Constraint | None = None     # of its output, once the grammar is compiled
    arrived_ns: int = 0
    watch: RepetitionWatch | None = None     # of its output, where the request wants it to end when it repeats itself
    search: BeamSearch | None = None         # of the choices of a beam search, and of the sequences that feed it
    embeds: np.ndarray | None = None         # float32 [prompt, hidden] in place of the prompt's ids, which are zeros
    started_ns: int = 0                      # first scheduled
    first_token_ns: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def unscored(self) -> bool:
        """Whether prompt logprobs are wanted of positions that have not been computed with their logits kept."""
        return self.sampling.prompt_logprobs is not None and self.num_prompt_scored + 1 < self.num_prompt

    def verdict(self) -> Finish:
        """How the newest output id ends it: end of sequence, stop id, complete grammar, length, or not at all."""
        if self.search is not None:
            return Finish.LENGTH                      # it was to give one token's candidates
        token, constraint = self.tokens[-1], self.constraint
        repeats = self.watch is not None and self.watch.push(token)
        if constraint is not None and (error := constraint.advance(token)) is not None:
            self.error = error
            return Finish.ERROR
        if token in self.stops and self.num_output > self.sampling.min_tokens:
            if token == self.eos_id:
                return Finish.EOS
            self.stop_id = token
            return Finish.STOP_ID
        if constraint is not None and constraint.complete:
            return Finish.EOS if token in constraint.ends else Finish.COMPLETE
        if repeats and self.num_output > self.sampling.min_tokens:
            return Finish.REPETITION
        return Finish.LENGTH if len(self.tokens) >= self.max_total else Finish.RUNNING

    @classmethod
    def of(cls, add: Add, j: int, arrival: int, max_model_len: int) -> Sequence:
        """Child `j` of an Add. ValueError for ids that are no multiple of four bytes."""
        tokens = array("I")
        tokens.frombytes(add.ids)
        num_prompt = len(tokens)
        tokens.frombytes(add.history)
        return cls(
            rid=add.rid + j, route=add.route, choice=add.choice + j, tokens=tokens, num_prompt=num_prompt,
            sampling=add.sampling, detok=add.detok, deadline_ns=add.deadline_ns, priority=add.priority,
            salt=add.salt, alone=add.alone, arrival=arrival, embeds=add.embeds,
            num_history=len(tokens) - num_prompt, num_sent=len(tokens) - num_prompt,
            max_total=min(max_model_len, num_prompt + add.sampling.max_tokens))
