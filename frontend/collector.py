"""Merging buffers between the request table and whoever reads an answer: per choice one `Update`, never a queue.

While a reader is slow, text, ids and log-probabilities of the same choice are joined, so that memory is bounded by the
length of the answer. No sanic, no zmq; the frontend's loop runs it, and so may any other client of the pipeline.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.families.parts import append_span
from pipeline.logprobs import join_logprobs
from pipeline.messages import Finish, Logprobs


@dataclass(slots=True)
class Update:
    """What one choice gained since the reader last looked."""

    index: int                               # of the choice in the answer
    text: str = ""
    ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: Logprobs | None = None         # of `ids`
    finish: Finish = Finish.RUNNING
    stop: str | int | None = None
    completion_tokens: int = 0               # output tokens of the choice so far, these included
    spans: list[tuple[int, int]] = field(default_factory=list)     # (families.parts.Part, characters) over `text`
    reasoning_tokens: int = 0                # of `completion_tokens`
    open_call: bool = False                  # the last tool call is not complete


class Buffer:
    """Collects the output of one choice until it is taken; its ids are the choice's own."""

    __slots__ = ("index", "finish", "stop", "reasoning_tokens", "open_call", "_text", "_spans", "_logprobs")

    def __init__(self, index: int) -> None:
        self.index = index
        self.reasoning_tokens, self.open_call = 0, False
        self._text: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._logprobs: list[Logprobs] = []
        self.finish = Finish.RUNNING
        self.stop: str | int | None = None

    def add(self, text: str, logprobs: Logprobs | None = None, spans: Iterable[tuple[int, int]] = ()) -> None:
        if text:
            self._text.append(text)
            for kind, chars in spans:
                append_span(self._spans, kind, chars)
        if logprobs is not None:
            self._logprobs.append(logprobs)

    def end(self, finish: Finish, stop: str | int | None) -> None:
        self.finish, self.stop = finish, stop

    def take(self, ids: array[int], completion_tokens: int) -> Update:
        """`ids`: those of the output that were not taken yet."""
        text = self._text[0] if len(self._text) == 1 else "".join(self._text)
        logprobs = join_logprobs(self._logprobs) if self._logprobs else None
        update = Update(self.index, text, ids, logprobs, self.finish, self.stop, completion_tokens, self._spans,
                        self.reasoning_tokens, self.open_call)
        self._text, self._spans, self._logprobs = [], [], []
        return update
