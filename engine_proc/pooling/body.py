"""What a pooling model is to the runner: packed inputs in, vectors of tokens (or class scores) out.

Engine process. `Packed` lays the inputs of a batch one behind another, without padding; a body that needs padding pads
for itself.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine_proc.pooling.request import PoolItem


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """T tokens of S inputs."""

    ids: np.ndarray                     # int64 [T]
    type_ids: np.ndarray                # int64 [T]
    starts: np.ndarray                  # int32 [S + 1]
    skips: np.ndarray | None = None     # int64 [S]: tokens at the beginning that are not pooled; None: all are

    @classmethod
    def of(cls, items: Sequence[PoolItem]) -> Packed:
        ids = np.frombuffer(b"".join([item.ids for item in items]), "<u4").astype(np.int64)
        type_ids = np.frombuffer(b"".join([item.type_ids or bytes(len(item)) for item in items]), np.uint8)
        starts = np.zeros(len(items) + 1, np.int32)
        np.cumsum([len(item) for item in items], out=starts[1:])
        skips = np.array([item.skip for item in items]) if any(item.skip for item in items) else None
        return cls(ids=ids, type_ids=type_ids.astype(np.int64), starts=starts, skips=skips)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]."""
        return np.diff(self.starts).astype(np.int64)

    @property
    def places(self) -> np.ndarray:
        """int64 [T]: each token's place in its input, from 0 on."""
        return np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths)


class Body(Protocol):
    """The model below its heads. `width`: of a vector."""

    width: int
    vocab_size: int
    num_type_ids: int
    padded: bool
    max_positions: int                  # tokens of the longest input; 0: any number

    def forward(self, packed: Packed) -> torch.Tensor:
        """float32 [T, width]: the last hidden state of every token."""
