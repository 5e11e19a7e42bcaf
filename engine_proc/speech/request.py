"""A transcription as the engine sees it: windows of audio, and one sequence for each attempt at a window. No torch.

A request's windows come one by one and leave one by one, in any order. Everything about a window can be computed again
from its features, so that nothing has to survive this process.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine_proc.request import Sequence
from pipeline.messages import AudioWindow, Route
from pipeline.params import SpeechParams


@dataclass(slots=True, eq=False)
class SpeechRequest:
    """One submission. Owned by the core."""

    rid: int
    route: Route
    params: SpeechParams
    deadline_ns: int
    priority: int
    alone: bool
    arrival: int
    arrived_ns: int
    language: str | None                     # None until it is known; windows wait for the first one to tell
    previous: list[int]                      # ids of the prompt and the hot words
    total: int = -1                          # windows; -1 until the last one has come
    windows: dict[int, Window] = field(default_factory=dict)     # those that came and are not done
    seen: set[int] = field(default_factory=set)
    num_done: int = 0
    detecting: int = -1                      # number of the window that is to tell the language
    started_ns: int = 0
    ended: bool = False

    @property
    def done(self) -> bool:
        return not self.windows and self.total == len(self.seen)


@dataclass(slots=True, eq=False)
class Window:
    """A stretch of at most thirty seconds."""

    request: SpeechRequest
    given: AudioWindow | None                       # without its features once they are encoded
    features: np.ndarray | None              # until they are encoded
    audio: int = -1                          # slot of its encoder states; -1: not encoded
    onset_s: float = 0.0                     # where sound begins in a window that was cut in silence
    attempt: int = 0                         # index into the temperatures
    take: Take | None = None                 # the sequence under way
    best: Take | None = None                 # the attempt with the highest mean log-probability so far
    no_speech: float = 0.0                   # probability that nobody speaks, from the first step
    tokens: int = 0                          # decoded over all attempts

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: early windows of any request ahead of late ones, so that short files pass long ones."""
        index = self.given.index if self.given is not None else 0
        return self.request.priority, index, self.request.arrival


@dataclass(slots=True, eq=False)
class Take(Sequence):
    """One attempt at a window, as the scheduler sees it."""

    window: Window | None = None
    timestamps: bool = False
    detect: bool = False                     # one step that only tells the language
    sot: int = -1                            # position of <|startoftranscript|>, whose logits tell whether anybody speaks
    logprobs: list[float] = field(default_factory=list)      # of each output id, among those that were allowed
    no_speech: float = -1.0                  # -1: not computed

    @property
    def output(self) -> list[int]:
        """Output ids without the end of the transcript."""
        ids = self.tokens[self.num_prompt:].tolist()
        return ids[:-1] if ids and ids[-1] in self.stops else ids

    @property
    def avg_logprob(self) -> float:
        """Mean over the output, the end included, as the authors' implementation counts it."""
        return sum(self.logprobs) / (len(self.output) + 1)
