"""Samples of any length -> windows of at most thirty seconds, cut where it is quiet.

Pure functions of the samples, so that a recording that is decoded again has the same windows. Run by the decoder worker.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tokenizer_proc.audio.decode import RATE

WINDOW = 30 * RATE
EARLIEST = 18 * RATE                 # no window but the last is shorter
HOP = RATE // 50                     # loudness is judged every 20 ms ...
SPAN = 15                            # ... over 300 ms, so that the gap inside of a word does not count


@dataclass(slots=True)
class Piece:
    """A window: where it begins in the recording, and its samples."""

    index: int
    start: int
    samples: np.ndarray
    last: bool


def pieces(chunks: Iterable[np.ndarray]) -> Iterator[Piece]:
    """The windows of a recording, in order. Together they hold every sample exactly once."""
    held: list[np.ndarray] = []
    size = start = index = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        while size > WINDOW:
            samples = np.concatenate(held)
            cut = quietest(samples[:WINDOW])
            yield Piece(index, start, samples[:cut], False)
            held, size, start, index = [samples[cut:]], size - cut, start + cut, index + 1
    yield Piece(index, start, np.concatenate(held) if held else np.zeros(0, np.float32), True)


def quietest(samples: np.ndarray) -> int:
    """The sample at which a full window is best cut: the middle of its quietest 300 ms, the later of two equals.

    A late cut means fewer windows, so that quiet has to be clearly quieter to be taken early.
    """
    tail = samples[EARLIEST:]
    count = len(tail) // HOP
    power = np.square(tail[:count * HOP].reshape(count, HOP), dtype=np.float32).mean(axis=1)
    smooth = np.convolve(power, np.ones(SPAN, np.float32) / SPAN, mode="valid")
    loudness = 10 * np.log10(smooth + 1e-8) + np.linspace(3.0, 0.0, len(smooth), dtype=np.float32)
    best = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return EARLIEST + best * HOP + SPAN * HOP // 2
