"""Where top_k and top_p cut a distribution: the least weight that stays, found without sorting the vocabulary.

Weights are relative to the best token, float32 [n, V], 1 for the best. Most rows are decided by their few best tokens;
flat ones by a histogram over the leading bits of the weights, after which only one bin is sorted. Which way a row takes
depends on that row alone, and both ways give the same cut. Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

FEW = 128                       # best tokens that are looked at first
BIN_SHIFT = 16                  # a bin: the weights that share sign, exponent and 7 bits of a float32
NUM_BINS = (0x3F800000 >> BIN_SHIFT) + 1        # of the weights 0 to 1


def cuts(weights: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray) -> torch.Tensor:
    """The least weight, [n, 1], that top_k and then top_p (of what top_k left) keep; equal weights stay together."""
    vocab = weights.shape[1]
    limit = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    cut, found = _from_best(weights, limit, top_p)
    left = np.flatnonzero(~found)
    if len(left):
        index = torch.from_numpy(left).to(weights.device)
        cut[index] = _from_histogram(weights[index], limit[left], top_p[left])
    return cut.unsqueeze(1)


def _from_best(weights: torch.Tensor, limit: np.ndarray, top_p: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Cuts, [n], from the FEW best tokens, and for which rows these were enough, bool [n]."""
    vocab = weights.shape[1]
    width = min(FEW, vocab)
    values = weights.topk(width, dim=-1).values
    sums = values.double().cumsum(dim=-1).cpu().numpy()
    kept = np.minimum(limit, width)
    total = sums[np.arange(len(sums)), kept - 1]
    if width < vocab and (limit == vocab).any():
        total = np.where(limit == vocab, weights.sum(dim=-1, dtype=torch.float64).cpu().numpy(), total)
    nucleus = np.where(top_p < 1, (sums < (total * top_p)[:, None]).sum(axis=1) + 1, kept)
    last = np.clip(np.minimum(nucleus, kept), 1, width) - 1
    found = np.where(limit <= width, True, (limit == vocab) & (top_p < 1) & (nucleus <= width))
    return values.gather(1, torch.from_numpy(last).to(values.device).unsqueeze(1))[:, 0], found


def _from_histogram(weights: torch.Tensor, limit: np.ndarray, top_p: np.ndarray) -> torch.Tensor:
    """Cuts of any rows, [n]: the bin in which a count or a mass is reached, then the place within it."""
    n, device = len(weights), weights.device
    bins = (weights.contiguous().view(torch.int32) >> BIN_SHIFT).clamp_(0, NUM_BINS - 1)    # NaN stays inside
    flat = (bins + torch.arange(n, device=device, dtype=torch.int32).unsqueeze(1) * NUM_BINS).flatten()
    count, mass = (
        np.cumsum(torch.bincount(flat, each, minlength=n * NUM_BINS).view(n, NUM_BINS).flip(1).cpu().numpy(), axis=1)
        for each in (None, weights.double().flatten()))         # [n, NUM_BINS], from the heaviest bin down

    def inside(reached: np.ndarray) -> tuple[_Ragged, np.ndarray, np.ndarray]:
        """The tokens of the first bin, from the heaviest, where `reached` is true; count and mass above it."""
        place = np.where(reached.any(axis=1), reached.argmax(axis=1), NUM_BINS - 1)
        number = torch.from_numpy(NUM_BINS - 1 - place).to(device).unsqueeze(1)
        rows, before = np.arange(n), np.maximum(place - 1, 0)
        return (_ragged(weights, bins == number), np.where(place > 0, count[rows, before], 0),
                np.where(place > 0, mass[rows, before], 0.0))

    tokens, above, mass_above = inside(count >= limit[:, None])
    rest = np.clip(limit - above, 0, tokens.counts).astype(np.int64)
    cut, total = tokens.at(rest - 1), mass_above + tokens.mass(rest)
    if (top_p < 1).any():
        target = total * top_p
        tokens, _, mass_above = inside(mass >= target[:, None])
        nucleus = tokens.at(tokens.reach(target - mass_above) - 1)
        cut = torch.where(torch.from_numpy(top_p < 1).to(device), torch.maximum(cut, nucleus), cut)
    return cut


@dataclass(slots=True)
class _Ragged:
    """Some tokens of each of n rows: their weights row by row, the heaviest first."""

    values: torch.Tensor        # float32 [total]
    starts: np.ndarray          # [n]
    counts: np.ndarray          # [n]
    sums: np.ndarray            # float64 [total + 1]; sums[i]: of the first i values

    def at(self, place: np.ndarray) -> torch.Tensor:
        """The weight at `place` (from 0) of each row, clipped to what the row has: float32 [n]."""
        if not len(self.values):
            return self.values.new_zeros(len(self.starts))
        index = self.starts + np.clip(place, 0, np.maximum(self.counts, 1) - 1)
        return self.values[torch.from_numpy(np.minimum(index, len(self.values) - 1)).to(self.values.device)]

    def mass(self, count: np.ndarray) -> np.ndarray:
        """The sum of the first `count` of each row."""
        return self.sums[self.starts + count] - self.sums[self.starts]

    def reach(self, target: np.ndarray) -> np.ndarray:
        """How many of each row it takes to reach the mass `target`."""
        return np.searchsorted(self.sums, self.sums[self.starts] + target, side="left") - self.starts


def _ragged(weights: torch.Tensor, chosen: torch.Tensor) -> _Ragged:
    """The tokens where `chosen`, bool [n, V], is set."""
    owner = chosen.nonzero()[:, 0]
    values, order = weights[chosen].sort(descending=True, stable=True)
    owner, order = owner[order].sort(stable=True)
    values = values[order]
    counts = np.bincount(owner.cpu().numpy(), minlength=len(weights))
    sums = np.concatenate([[0.0], values.double().cumsum(0).cpu().numpy()])
    return _Ragged(values, np.cumsum(counts) - counts, counts, sums)
