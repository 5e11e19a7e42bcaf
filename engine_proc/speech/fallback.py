"""Makes the attempts at a window and judges them: accepted, tried again hotter, or silence. Engine process, no torch.

The thresholds are those of the authors' implementation: a text that compresses too well is a loop, one that is
unlikely on average was guessed, and one that is unlikely while probably nobody speaks was made up.
"""
from __future__ import annotations

import dataclasses
from array import array

from engine_proc.speech.request import Take, Window
from engine_proc.speech.segments import compression_ratio
from engine_proc.speech.vocabulary import Vocabulary
from pipeline.params import DetokSpec

COMPRESSION_MOST = 2.4
LOGPROB_LEAST = -1.0
NO_SPEECH_MOST = 0.6
ATTEMPTS = 8                     # room for temperatures in the key of a window's random numbers


class Ladder:
    """Attempts for the windows of one model. `take` numbers them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._count = 0

    def detect(self, window: Window) -> Take:
        """One step that tells the language."""
        return self._take(window, [self._vocabulary.sot], 0.0, detect=True)

    def attempt(self, window: Window) -> Take:
        """The next attempt at a window whose language is known."""
        request, params = window.request, window.request.params
        timestamps = params.timestamps and self._vocabulary.timestamp_begin >= 0
        prompt = self._vocabulary.prompt(request.previous, request.language, params.task == "translate", timestamps)
        return self._take(window, prompt, params.temperatures[window.attempt], timestamps=timestamps)

    def _take(self, window: Window, prompt: list[int], temperature: float, *, timestamps: bool = False,
              detect: bool = False) -> Take:
        vocabulary, request = self._vocabulary, window.request
        assert window.given is not None
        self._count += 1
        sampling = dataclasses.replace(request.params.sampling, temperature=temperature, logprobs=None,
                                       prompt_logprobs=None)
        room = 1 if detect else sampling.max_tokens or vocabulary.max_length
        priority, index, arrival = window.order
        return Take(
            rid=self._count, route=request.route, choice=window.given.index * ATTEMPTS + window.attempt,
            tokens=array("I", prompt), num_prompt=len(prompt), sampling=sampling, detok=DetokSpec(),
            max_total=min(vocabulary.max_length, len(prompt) + room), priority=priority,
            arrival=(index << 40) + (arrival << 8) + window.attempt, alone=request.alone,
            stops=frozenset((vocabulary.eot,)), eos_id=vocabulary.eot, arrived_ns=request.arrived_ns, window=window,
            timestamps=timestamps, detect=detect,
            sot=prompt.index(vocabulary.sot) if vocabulary.no_speech >= 0 else -1)

    def judge(self, window: Window, take: Take) -> bool:
        """Whether the window is settled; `window.best` is then what was heard, None for silence."""
        if take.no_speech >= 0 and not window.attempt:
            window.no_speech = take.no_speech
        text = self._vocabulary.text(take.output)
        loops = compression_ratio(text) > COMPRESSION_MOST
        guessed = take.avg_logprob < LOGPROB_LEAST
        if guessed and window.no_speech > NO_SPEECH_MOST:
            window.best = None
            return True
        if not loops and not guessed:
            window.best = take
            return True
        best = window.best
        if best is None or self._rank(take) > self._rank(best):
            window.best = take
        window.attempt += 1
        return window.attempt >= len(window.request.params.temperatures)

    def _rank(self, take: Take) -> tuple[bool, float]:
        return compression_ratio(self._vocabulary.text(take.output)) <= COMPRESSION_MOST, take.avg_logprob
