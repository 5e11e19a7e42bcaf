"""What turns the vectors of tokens into answers: pooling, dense layers, classifiers. Small products, all in float32.

Engine process. A head gives raw rows for whole batches; normalisation, squashing and cutting to a size come after
(`finish`), as the request asks.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine_proc.kernels import reference
from engine_proc.pooling.body import Packed
from engine_proc.pooling.plan import CLASS_TASKS, CLASSIFY, EMBED, SCORE, TOKEN_CLASSIFY, TOKEN_EMBED
from pipeline.params import PoolParams


class Head(Protocol):
    """`rows` gives float32 [S, D], or [T, D] for a task of TOKEN_TASKS."""

    tasks: tuple[str, ...]
    dimension: int
    num_labels: int
    activation: str                      # what `activation=None` means: normalize | softmax | sigmoid | tanh ... | none

    def rows(self, task: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor: ...


@dataclass(slots=True)
class DenseLayer:
    """A linear layer with an activation and, for some classifiers, a norm behind it. float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str = "none"
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if self.activation != "none":
            y = torch.sigmoid(y) if self.activation == "sigmoid" else reference.activate(y, self.activation)
        return y if self.norm is None else reference.layer_norm(y, *self.norm)


class EmbedHead:
    """Embeddings: pooled and projected, or one per token."""

    def __init__(self, width: int, modes: Sequence[str], token_dense: Sequence[DenseLayer],
                 dense: Sequence[DenseLayer], normalize: bool) -> None:
        self._modes, self._token_dense, self._dense = tuple(modes), tuple(token_dense), tuple(dense)
        last = [*token_dense, *dense]
        late = self._modes == ("all",)
        self.tasks: tuple[str, ...] = (TOKEN_EMBED,) if late else (EMBED, TOKEN_EMBED)
        self.dimension = last[-1].weight.shape[0] if last else width * len(self._modes)
        self.num_labels = 0
        self.activation = "normalize" if normalize else "none"

    def rows(self, task: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        for layer in self._token_dense:
            hidden = layer(hidden)
        if task == TOKEN_EMBED:
            return hidden
        pooled = torch.cat([pool(mode, hidden, packed) for mode in self._modes], dim=1)
        for layer in self._dense:
            pooled = layer(pooled)
        return pooled


class ClassifyHead:
    """Class scores of each input: a pooled vector through one or two layers; or of each token."""

    def __init__(self, mode: str, layers: Sequence[DenseLayer], activation: str) -> None:
        self._mode, self._layers = mode, tuple(layers)
        self.dimension, self.num_labels = 0, layers[-1].weight.shape[0]
        self.activation = activation
        self.tasks: tuple[str, ...] = (TOKEN_CLASSIFY,) if mode == "all" else class_tasks(self.num_labels)

    def rows(self, task: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        x = hidden if task == TOKEN_CLASSIFY else pool(self._mode, hidden, packed)
        for layer in self._layers:
            x = layer(x)
        return x


class LogitsHead:
    """For a body that gives class scores itself, [S, labels] (or [T, labels])."""

    def __init__(self, num_labels: int, activation: str, tokens: bool) -> None:
        self.dimension, self.num_labels, self.activation = 0, num_labels, activation
        self.tasks: tuple[str, ...] = (TOKEN_CLASSIFY,) if tokens else class_tasks(num_labels)

    def rows(self, task: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        return hidden


def class_tasks(num_labels: int) -> tuple[str, ...]:
    return (CLASSIFY, SCORE) if num_labels == 1 else (CLASSIFY,)


def pool(mode: str, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """One vector per input, float32 [S, width], by a mode of sentence-transformers."""
    starts = torch.from_numpy(packed.starts.astype(np.int64))
    if mode == "cls":
        return hidden[starts[:-1]]
    if mode == "last":
        return hidden[starts[1:] - 1]
    lengths, places = torch.from_numpy(packed.lengths), packed.places
    if packed.skips is not None:
        pooled = places >= np.repeat(packed.skips, packed.lengths)
        hidden, places = hidden[torch.from_numpy(pooled)], places[pooled]
        lengths = lengths - torch.from_numpy(packed.skips)
    if mode == "max":
        return torch.segment_reduce(hidden, "max", lengths=lengths, axis=0)
    if mode == "weightedmean":
        weights = torch.from_numpy(places + 1).float()[:, None]
        total = torch.segment_reduce(weights, "sum", lengths=lengths, axis=0)
        return torch.segment_reduce(hidden * weights, "sum", lengths=lengths, axis=0) / total
    summed = torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0)
    counts = lengths[:, None].float()
    return summed / (counts.sqrt() if mode == "mean_sqrt_len" else counts)


def finish(rows: torch.Tensor, params: PoolParams, default: str) -> torch.Tensor:
    """Cut to `dimensions`, then normalise or squash, as the request or else the model says."""
    if params.dimensions:
        rows = rows[:, :params.dimensions]
    activation = default
    if params.activation is False:
        activation = "none"
    elif params.activation and default == "none":
        squash = "sigmoid" if rows.shape[1] == 1 else "softmax"
        activation = squash if params.task in CLASS_TASKS else "normalize"
    match activation:
        case "normalize":
            return torch.nn.functional.normalize(rows, dim=1)
        case "softmax":
            return rows.softmax(dim=1)
        case "sigmoid":
            return rows.sigmoid()
        case "none":
            return rows
    return reference.activate(rows, activation)
