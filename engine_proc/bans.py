"""Tokens that requests forbid: everything but `allowed_token_ids`, and the last id of each bad word that began.

Batched tensor work over the rows that asked; a step without such rows costs nothing. A bad word of one id is no matter
of history: it is a logit bias of minus infinity (engine_proc.slots). Engine process.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.history import Histories

ANY = -2                # a place of a pattern that everything matches; no id, and not Histories' -1 for "none"


@dataclass(frozen=True, slots=True)
class Words:
    """Bad words of one sequence: `last` may not follow an output that ends with `before`."""

    before: np.ndarray          # int64 [m, w], right-aligned, ANY in front
    last: np.ndarray            # int64 [m]

    @classmethod
    def of(cls, words: Sequence[np.ndarray]) -> Words | None:
        """From id sequences of two ids or more each; None without any."""
        if not words:
            return None
        width = max(len(word) for word in words) - 1
        before = np.full((len(words), width), ANY, np.int64)
        for row, word in zip(before, words):
            row[width - len(word) + 1:] = word[:-1]
        return cls(before, np.array([word[-1] for word in words], np.int64))


class Allowed:
    """For each sequence that names its allowed ids a row over the vocabulary."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.device, self.free = device, list[int]()
        self._forbidden = torch.zeros((0, vocab), dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self._forbidden)

    def take(self, ids: np.ndarray) -> int:
        """A row that leaves `ids`, int64, only."""
        if not self.free:
            old, more = len(self), max(4, len(self))
            self._forbidden = torch.cat([self._forbidden, self._forbidden.new_zeros(more, self._forbidden.shape[1])])
            self.free = list(range(old + more - 1, old - 1, -1))
        row = self.free.pop()
        self._forbidden[row] = True
        self._forbidden[row, torch.from_numpy(ids).to(self.device)] = False
        return row

    def apply(self, logits: torch.Tensor, which: np.ndarray, tables: np.ndarray) -> None:
        """Rows `which` of `logits`, float32 [R, V], keep what rows `tables` allow."""
        index, table = (torch.from_numpy(array).to(self.device) for array in (which, tables))
        logits[index] = logits[index].masked_fill_(self._forbidden[table], float("-inf"))


def ban_words(logits: torch.Tensor, found: Sequence[tuple[int, int, Words]], histories: Histories) -> None:
    """Ban the ends of words whose beginnings are there. `found`: (row of `logits`, row of `histories`, words)."""
    device = logits.device
    width = max(words.before.shape[1] for _, _, words in found)
    owner = np.concatenate([np.full(len(words.last), number) for number, (_, _, words) in enumerate(found)])
    before = np.concatenate([
        np.pad(words.before, ((0, 0), (width - words.before.shape[1], 0)), constant_values=ANY)
        for _, _, words in found])
    last = np.concatenate([words.last for _, _, words in found])
    rows = np.array([row for row, _, _ in found])[owner]
    recent = histories.recent(np.array([table for _, table, _ in found]), width)[torch.from_numpy(owner).to(device)]
    pattern = torch.from_numpy(before).to(device)
    met = ((pattern == recent) | (pattern == ANY)).all(dim=1)
    where = (torch.from_numpy(rows).to(device), torch.from_numpy(last).to(device))
    logits.index_put_(where, torch.where(met, float("-inf"), 0.0).to(logits.dtype), accumulate=True)
