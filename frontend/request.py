"""What the frontend knows of a request: its specification, its choices, and the submissions that compute them.

A request has prompts x n choices. Each prompt travels as one Submit under a fresh family id whose children are its
choices; after a death what is left of it travels again under another id. Owned and changed by frontend.table only.
"""
from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from frontend.admission import Permit
from frontend.collector import Buffer, Update
from pipeline.errors import QuartetError
from pipeline.messages import AbortReason, Chat, Finish, Logprobs, Route, Submit
from pipeline.params import DetokSpec, SamplingParams


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One prompt. Once the engine has admitted it, it is its token ids and nothing else."""

    text: str | None = None
    suffix: str | None = None                # what follows the answer: fill-in-the-middle
    chat: Chat | None = None
    ids: bytes = b""                         # uint32
    embeds: np.ndarray | None = None         # [tokens, hidden]; `ids` are zeros then
    admitted: bool = False                   # `ids` are what the engine computes with
    prompt_tokens: int = 0                   # 0: not known yet
    cached_tokens: int = 0                   # of them found in the prefix cache at first scheduling
    counted: bool = False                    # the engine has told both
    echo: str | None = None                  # its text, where it was asked for
    logprobs: list[Logprobs] = field(default_factory=list)
    num_logprobs: int = 0                    # tokens described by `logprobs`
    teller: int = -1                         # number of the choice whose prompt log-probabilities are taken

    @property
    def num_bytes(self) -> int:
        """What a tokenizer has to do for it."""
        if self.embeds is not None:
            return self.embeds.nbytes
        if self.text is not None:
            return len(self.text) + len(self.suffix or "")
        return len(self.chat.messages_json) if self.chat is not None else len(self.ids)

    @property
    def logprobs_complete(self) -> bool:
        return 0 < self.prompt_tokens <= self.num_logprobs

    def forget_logprobs(self, teller: int) -> None:
        """Choice `teller` is computed again: what it had not told completely comes again from the beginning."""
        if teller == self.teller and not self.logprobs_complete:
            self.logprobs.clear()
            self.num_logprobs, self.teller = 0, -1


@dataclass(slots=True, kw_only=True)
class Spec:
    """A request with every default filled in: what the table is asked to compute."""

    model: int
    prompts: list[Prompt]
    n: int = 1
    sampling: SamplingParams
    detok: DetokSpec
    add_special: bool = True
    truncate: int | None = None
    truncate_right: bool = False
    stream_interval: int = 1                 # tokens of a choice's update, its first and last ones excepted
    deadline_ns: int = 0
    priority: int = 0
    salt: bytes = b""
    stream: bool = False                     # the reader wants every delta, not only the end
    want_prompt_ids: bool = False            # hold the first update back until the prompt's ids are known


@dataclass(slots=True, eq=False)
class Choice:
    """One choice until its terminal event. `ids` is its history if it must be computed again."""

    request: Request
    prompt: Prompt
    number: int                              # among the n choices of its prompt
    buffer: Buffer
    rid: int = 0                             # the current child id
    ids: array[int] = field(default_factory=lambda: array("I"))
    taken: int = 0                           # output ids that the reader has
    chars: int = 0                           # characters of text received
    deaths: int = 0                          # engines that died under it
    gaps: int = 0                            # times that output of it got lost on the way
    missing: int = 0                         # censuses in a row that did not list it
    heard_ns: int = 0                        # when anything was last heard of it
    last_token_ns: int = 0

    @property
    def index(self) -> int:
        return self.buffer.index

    @property
    def finished(self) -> bool:
        return self.buffer.finish is not Finish.RUNNING


@dataclass(slots=True, eq=False)
class Submission:
    """Choices of one prompt on their way through the pipeline; slot j is child j, None once it has ended."""

    family: int
    request: Request
    prompt: Prompt
    choices: list[Choice | None]
    alone: bool = False
    route: Route | None = None               # None: waits for a stage
    admitted: bool = False                   # the engine holds it, the tokenizer does not
    heard: bool = False                      # output has come back
    num_bytes: int = 0                       # counted as its tokenizer's load

    @property
    def live(self) -> list[Choice]:
        return [c for c in self.choices if c is not None]

    @property
    def past_tokenizer(self) -> bool:
        return self.admitted or self.heard

    def message(self, route: Route) -> Submit:
        """The Submit of these choices over `route`, what they already have as history."""
        spec, prompt, first = self.request.spec, self.prompt, self.live[0]
        sampling, detok = spec.sampling, spec.detok
        history = first.ids
        assert not history or len(self.choices) == 1
        if prompt.echo is not None:
            detok = dataclasses.replace(detok, echo=False)
        if sampling.prompt_logprobs is not None and prompt.logprobs_complete:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        return Submit(
            rid=self.family, route=route, model=spec.model, n=len(self.choices), choice=first.number,
            text=prompt.text, chat=prompt.chat, ids=prompt.ids, history=history.tobytes(),
            add_special=spec.add_special, truncate=None if prompt.admitted else spec.truncate, sampling=sampling,
            detok=detok, deadline_ns=spec.deadline_ns, priority=spec.priority, salt=spec.salt, alone=self.alone,
            truncate_right=spec.truncate_right, suffix=None if prompt.admitted else prompt.suffix,
            embeds=prompt.embeds)


class Request:
    """One accepted request. Readers call `take` after each wake-up and `RequestTable.close` in the end."""

    __slots__ = ("spec", "choices", "error", "closed", "arrival_ns", "first_token_ns", "unfinished", "permit",
                 "families", "ended", "_wake", "_eager", "_dirty", "__weakref__")

    def __init__(self, spec: Spec, wake: Callable[[], None], permit: Permit | None, now_ns: int) -> None:
        self.spec = spec
        self.choices = [Choice(self, prompt, c, Buffer(p * spec.n + c))
                        for p, prompt in enumerate(spec.prompts) for c in range(spec.n)]
        self.error: QuartetError | None = None
        self.closed = False
        self.arrival_ns = now_ns
        self.first_token_ns = 0
        self.unfinished = len(self.choices)
        self.permit = permit
        self.families: set[int] = set()
        self.ended: AbortReason | None = None               # why it was not completed
        self._wake = wake
        self._eager = spec.stream and spec.stream_interval == 1       # every id is due
        self._dirty: dict[int, Choice] = {}

    @property
    def done(self) -> bool:
        """Whether the one terminal event has happened: every choice finished, or an error."""
        return self.error is not None or self.unfinished == 0

    @property
    def prompt_tokens(self) -> int:
        return sum(p.prompt_tokens for p in self.spec.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(p.cached_tokens for p in self.spec.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.ids) for c in self.choices)

    @property
    def reasoning_tokens(self) -> int | None:
        """None where reasoning is not told from the answer."""
        return sum(c.buffer.reasoning_tokens for c in self.choices) if self.spec.detok.reasoning_parser else None

    def touched(self, choice: Choice) -> None:
        """`choice` has something for the reader."""
        self._dirty[choice.buffer.index] = choice
        if self._eager or self.done or (self.spec.stream and self._due(choice)):
            self._wake()

    def wake(self) -> None:
        self._wake()

    def take(self) -> list[Update]:
        """What has come since the last call, one update per choice, in the order of their first news."""
        ready = [c for c in self._dirty.values() if self._due(c) and self._presentable(c)]
        updates = []
        for choice in ready:
            del self._dirty[choice.index]
            size, taken = len(choice.ids), choice.taken
            choice.taken = size
            updates.append(choice.buffer.take(choice.ids[taken:], size))
        return updates

    def _due(self, choice: Choice) -> bool:
        """Whether enough of it is there for an update."""
        return (len(choice.ids) - choice.taken >= self.spec.stream_interval
                or not choice.taken or choice.finished or self.done)

    def _presentable(self, choice: Choice) -> bool:
        """Whether everything about the prompt that belongs ahead of the first text is there."""
        if choice.taken or choice.finished or self.done:
            return True
        spec, prompt = self.spec, choice.prompt
        return not ((spec.want_prompt_ids and not prompt.admitted) or (spec.detok.echo and prompt.echo is None)
                    or (spec.sampling.prompt_logprobs is not None and not prompt.logprobs_complete))
