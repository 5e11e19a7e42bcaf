"""A device that is as late as a device may be: a reference for what a GPU does behind the host's back.

What is submitted is computed when somebody waits for it, or earlier if the dice say so, always in order. Input arrays are
not copied: the device sees them when it computes, and fills them with nonsense when it is done, as whoever reuses a
buffer would. So a step that was given a buffer which is still in use, or that reads a token before it is sampled, or
results before they are there, computes nonsense or fails.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine_proc.device import Cpu


class Late(Cpu):
    """Implements `device.Device` with one step in flight. `eager`: how often it computes at once."""

    depth = 1

    def __init__(self, seed: int = 0, eager: float = 0.3) -> None:
        self._random, self._eager = random.Random(seed), eager
        self._queue: list[Pending] = []
        self._inputs: list[np.ndarray] = []         # given since the last submission
        self._running: Pending | None = None
        self.most_waiting = 0

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        (self._inputs if self._running is None else self._running.inputs).append(array)
        return torch.from_numpy(array)

    def submit(self, work: Callable[[], Any]) -> Pending:
        pending = Pending(self, work, self._inputs)
        self._inputs = []
        self._queue.append(pending)
        self.most_waiting = max(self.most_waiting, len(self._queue))
        if self._random.random() < self._eager:
            self.run(pending)
        return pending

    def run(self, last: Pending) -> None:
        """Compute what was submitted, up to `last`."""
        while last in self._queue:
            self._running = pending = self._queue.pop(0)
            try:
                pending.value = pending.work()
            except Exception as error:
                pending.error = error
            self._running = None

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Results:
        assert self._running is not None, "results of nothing"
        return Results(self._running, [tensor.clone().numpy() for tensor in tensors])


class Pending:
    """Something submitted."""

    def __init__(self, device: Late, work: Callable[[], Any], inputs: list[np.ndarray]) -> None:
        self.device, self.work, self.inputs = device, work, inputs
        self.value: Any = None
        self.error: Exception | None = None
        self.waited = False

    def wait(self) -> Any:
        self.device.run(self)
        if not self.waited:
            for array in self.inputs:
                array.fill(-(2**30) if array.dtype.kind == "i" else np.nan)
        self.waited = True
        if self.error is not None:
            raise self.error
        return self.value


class Results:
    """Implements `device.Fetch`; nobody may look before the step was waited for."""

    def __init__(self, step: Pending, arrays: list[np.ndarray]) -> None:
        self._step, self._arrays = step, arrays

    def wait(self) -> list[np.ndarray]:
        assert self._step.waited
        return self._arrays
