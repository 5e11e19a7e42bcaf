"""The arithmetic of one rank: torch's, with a sum over the ranks where each has computed a part.

Takes the place of `TorchOps` at load; the decoder does not know that it is split. Every rank must call the same
methods in the same order, which they do because they run the same decoder over the same batch.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine_proc.layers import Linear, TorchOps
from engine_proc.parallel.team import Team


@dataclass(slots=True)
class Summed(Linear):
    """A layer that is split by columns: the parts' products are added up, the bias once."""


@dataclass(slots=True)
class Gathered(Linear):
    """The vocabulary's matrix, split by rows: rank 0 gets the logits of all."""


class ParallelOps(TorchOps):
    """`vocab`: tokens of the whole model."""

    def __init__(self, team: Team, vocab: int) -> None:
        self._team, self._vocab = team, vocab
        self._first, self._last = team.share.vocabulary(vocab)
        self._width = team.share.vocabulary_width(vocab)

    def pack_summed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Summed(weight, bias)

    def pack_head(self, weight: torch.Tensor) -> Linear:
        return Gathered(weight)

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Each row comes from the one rank that holds its token; adding zeros changes nothing."""
        elsewhere = (ids < self._first) | (ids >= self._last)
        if self._first == self._last:
            return self._team.sum(table.new_zeros(len(ids), table.shape[1]))
        x = table[(ids - self._first).masked_fill_(elsewhere, 0)]
        return self._team.sum(x.masked_fill_(elsewhere[:, None], 0))

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if isinstance(layer, Summed):
            out = self._team.sum(F.linear(x, layer.weight))
            return out if layer.bias is None else out.add_(layer.bias)
        out = F.linear(x, layer.weight, layer.bias)
        if not isinstance(layer, Gathered):
            return out
        parts = self._team.gather(F.pad(out, (0, self._width - out.shape[1])))
        return out if parts is None else torch.cat(parts, dim=1)[:, :self._vocab]
