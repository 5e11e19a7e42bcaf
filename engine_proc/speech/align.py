"""Word times from cross-attention: which frames each token listened to, made monotonic by dynamic time warping.

Engine process, numpy only. The method is that of the authors' implementation: the attention of the alignment heads is
standardised over the tokens, smoothed by a median filter over the frames and averaged over the heads; the cheapest
monotonic path through its negative gives the frame at which each token begins.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MEDIAN_WIDTH = 7


@dataclass(slots=True)
class Alignment:
    """Start of each of n text tokens in seconds of the window, and of what follows them: float64 [n + 1]."""

    starts: np.ndarray


def path_times(weights: np.ndarray, num_prompt: int, num_text: int, frames_per_second: float) -> Alignment:
    """`weights`: float32 [heads, num_prompt + num_text + 1, frames], each row a distribution over frames."""
    deviation = weights.std(axis=1, keepdims=True)
    standard = (weights - weights.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-9)
    matrix = median(standard).mean(axis=0)[num_prompt - 1:-1]               # row i: the step that chose text token i
    rows, frames = warp(-matrix[:num_text + 1])
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    starts = frames[first] / frames_per_second
    end = (frames[-1] + 1) / frames_per_second
    return Alignment(np.append(starts[:num_text], starts[num_text] if len(starts) > num_text else end))


def median(x: np.ndarray) -> np.ndarray:
    """Running median over the last axis, mirrored at both ends."""
    half = MEDIAN_WIDTH // 2
    if x.shape[-1] <= half:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_WIDTH, axis=-1)
    return np.partition(windows, half, axis=-1)[..., half]


def warp(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path from corner to corner of `cost` [n, m], each step down, right or both: row and column indices.

    Computed by anti-diagonals, each of which depends on the two before it only.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    move = np.zeros((n + 1, m + 1), np.int8)                                # 0: diagonal, 1: down, 2: right
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        both, down, right = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        way = np.where((both < down) & (both < right), 0, np.where(down < right, 1, 2))
        total[i, j] = cost[i - 1, j - 1] + np.choose(way, (both, down, right))
        move[i, j] = way
    move[0, :], move[:, 0] = 2, 1
    i, j, path = n, m, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        way = move[i, j]
        i, j = i - (way != 2), j - (way != 1)
    found = np.array(path[::-1])
    return found[:, 0], found[:, 1]
