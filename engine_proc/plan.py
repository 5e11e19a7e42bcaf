"""What the scheduler tells the runner to do in one step, and what the runner tells back. No torch here.

A plan holds leases: every sequence and block that it names stays untouched until the plan is collected, whatever
aborts, stops or deadlines are marked meanwhile.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine_proc.request import Sequence
from pipeline.messages import Logprobs


@dataclass(slots=True, kw_only=True)
class PlanItem:
    """`count` tokens of `seq` from position `start` on are computed; their KV blocks are reserved. Never changed; not frozen,
    because there is one for every token, and a frozen one takes three times as long to make.

    `sample`: the last of them is the sequence's last token, so a next token is sampled from its logits.
    `prompt_logprobs`: logits of every one of them are wanted (the request asked for prompt logprobs).
    """

    seq: Sequence
    start: int
    count: int
    sample: bool
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: decodes (count 1) first, then prefill chunks."""

    number: int
    items: list[PlanItem]
    copies: list[tuple[int, int]] = field(default_factory=list)   # KV blocks to copy first: (from, to)

    @property
    def num_tokens(self) -> int:
        return sum([item.count for item in self.items])


@dataclass(frozen=True, slots=True)
class Candidates:
    """What beam search may go on with after one hypothesis, best first: arrays of C each."""

    ids: np.ndarray
    scores: np.ndarray        # log-probabilities after penalties and bias; -inf: forbidden
    values: np.ndarray        # log-probabilities of the unmodified logits


@dataclass(slots=True, kw_only=True)
class ItemResult:
    """What one plan item gave. `token` is None where nothing was sampled; `error` ends that request only."""

    token: int | None = None
    logprobs: Logprobs | None = None          # of the sampled token
    prompt_logprobs: Logprobs | None = None   # of the prompt tokens start+1 .. start+count (those inside the prompt)
    error: str | None = None                  # a code of errors.CATALOGUE
    candidates: Candidates | None = None      # in place of the token, where beam search goes on


class Runner(Protocol):
    """Runs plans on a device. `launch` is asynchronous where the device is, `collect` waits for the result."""

    depth: int                                # plans that may be in flight while another is launched: CPU 0, CUDA 1
    num_blocks: int                           # KV blocks, block 0 included
    block_size: int
    vocab_size: int                           # width of the logits
    context_cost: float                       # of attending to one token more, in prompt tokens without any context
    facts: dict[str, Any]                     # for the beacon: dtype, device, architecture, ... (JSON values)

    def admit(self, seq: Sequence) -> None:
        """Give `seq` a fresh sampler slot (zeroed), replaying penalties over its tokens."""

    def release(self, seq: Sequence) -> None:
        """Take the slot back; idempotent."""

    def launch(self, plan: StepPlan) -> object: ...

    def collect(self, handle: object) -> list[ItemResult]:
        """One result per item of the plan, in order."""
