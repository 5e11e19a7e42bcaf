"""Token ids of the sequences whose sampling looks back at them, one row each, on the model's device.

Penalties and bad words read them. A row is filled from the sequence's tokens when it is taken, so
that a continuation or a pre-empted sequence has the history it would have had. Engine process.
"""
from __future__ import annotations

import numpy as np
import torch

from engine_proc.request import Sequence


class Histories:
    """Rows of up to `longest` ids; the table grows with the number of sequences that need one."""

    def __init__(self, longest: int, device: torch.device) -> None:
        self.longest, self.device = longest, device
        self.free: list[int] = []
        self._lengths = np.zeros(0, np.int64)           # [P]
        self._starts = np.zeros(0, np.int64)            # [P]: where the output begins
        self._ids = torch.zeros((0, longest), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self._lengths)

    def take(self, seq: Sequence) -> int:
        """A row with the tokens of `seq`."""
        if not self.free:
            old, more = len(self), max(4, len(self))
            self._ids = torch.cat([self._ids, self._ids.new_zeros(more, self.longest)])
            self._lengths, self._starts = (
                np.concatenate([table, np.zeros(more, np.int64)]) for table in (self._lengths, self._starts))
            self.free = list(range(old + more - 1, old - 1, -1))
        row = self.free.pop()
        self._ids[row, :len(seq.tokens)] = torch.tensor(seq.tokens, dtype=torch.int64, device=self.device)
        self._lengths[row], self._starts[row] = len(seq.tokens), seq.num_prompt
        return row

    def push(self, rows: np.ndarray, tokens: torch.Tensor) -> None:
        """Append the sampled tokens, int64 [p], to `rows`, int64 [p]."""
        self._ids[self._on_device(rows), self._on_device(self._lengths[rows])] = tokens
        self._lengths[rows] += 1

    def whole(self, rows: np.ndarray) -> torch.Tensor:
        """Prompt and output of `rows`: int64 [p, L]; shorter ones are filled with their own last token."""
        lengths = self._lengths[rows]
        columns = np.minimum(np.arange(int(lengths.max())), lengths[:, None] - 1)
        return self._ids[self._on_device(rows[:, None]), self._on_device(columns)]

    def recent(self, rows: np.ndarray, width: int) -> torch.Tensor:
        """The last `width` output ids of `rows`: int64 [p, width], -1 where there are none."""
        columns = self._lengths[rows][:, None] + np.arange(-width, 0)
        known = columns >= self._starts[rows][:, None]
        ids = self._ids[self._on_device(rows[:, None]), self._on_device(np.maximum(columns, 0))]
        return ids.masked_fill_(~torch.from_numpy(known).to(self.device), -1)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
