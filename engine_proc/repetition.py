"""Ends a choice that only repeats itself: some pattern of ids, so many times in a row at the end of the output.

One vector operation per id and sequence that asked. A pure function of the output ids, so a continuation replays it.
Engine process, no torch.
"""
from __future__ import annotations

from array import array

import numpy as np

from pipeline.params import Repetition


class RepetitionWatch:
    """Watches the output of one sequence."""

    __slots__ = ("_sizes", "_needed", "_runs", "_output")

    def __init__(self, rule: Repetition) -> None:
        self._sizes = np.arange(rule.min_size, rule.max_size + 1)
        self._needed = self._sizes * (rule.min_count - 1)
        self._runs = np.zeros(len(self._sizes), np.int64)   # ids in a row that equal the one a pattern's size before
        self._output = array("I")

    def push(self, token: int) -> bool:
        """Whether `token` completes a repetition."""
        output = np.frombuffer(self._output, np.uint32) if self._output else np.zeros(0, np.uint32)
        near = self._sizes[:max(0, len(output) - int(self._sizes[0]) + 1)]          # patterns that fit
        equal = output[len(output) - near] == token
        runs = self._runs[:len(near)]
        np.multiply(runs + 1, equal, out=runs)
        del output
        self._output.append(token)
        return bool((runs >= self._needed[:len(near)]).any())
