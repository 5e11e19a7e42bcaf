"""What the pooling scheduler tells a runner to compute, and what the runner tells back. No torch here.

A batch is one forward pass over whole inputs: there is no cache, no chunk and no state between batches. The inputs of
a batch may belong to several requests and ask for different tasks.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine_proc.pooling.request import PoolItem
from pipeline.params import PoolParams

EMBED, CLASSIFY, SCORE = "embed", "classify", "score"
TOKEN_EMBED, TOKEN_CLASSIFY = "token_embed", "token_classify"
TOKEN_TASKS = (TOKEN_EMBED, TOKEN_CLASSIFY)          # a row per token in place of one per input
CLASS_TASKS = (CLASSIFY, SCORE, TOKEN_CLASSIFY)      # rows of class scores in place of vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBatch:
    """One forward pass; never empty."""

    number: int
    items: list[PoolItem]

    @property
    def num_tokens(self) -> int:
        return sum(len(item) for item in self.items)


@dataclass(slots=True, kw_only=True)
class PoolResult:
    """What one input gave: float32 [rows, D] of memory of its own, or an error that ends its request only."""

    rows: np.ndarray | None = None
    error: str | None = None                  # a code of errors.CATALOGUE


class PoolRunner(Protocol):
    """Runs batches on a device. `launch` is asynchronous where the device is, `collect` waits for the results."""

    depth: int                                # batches that may be in flight while another is launched
    vocab_size: int
    max_positions: int                        # tokens of the longest input that the model takes; 0: any number
    num_type_ids: int                         # 1 where the model cannot tell two texts apart
    padded: bool                              # a batch costs its longest input times their number
    tasks: tuple[str, ...]
    dimension: int                            # of "embed" and "token_embed"; 0 where the model has neither
    num_labels: int                           # of "classify", "score" and "token_classify"; 0 likewise
    matryoshka: tuple[int, ...] | None        # sizes to which embeddings may be cut; (): any; None: none
    facts: dict[str, Any]                     # for the beacon (JSON values)

    def launch(self, batch: PoolBatch) -> object: ...

    def collect(self, handle: object) -> list[PoolResult]:
        """One result per item of the batch, in order."""

    def finish(self, rows: np.ndarray, params: PoolParams) -> np.ndarray:
        """Vectors of several parts together, float32 [rows, D], as the request wants them: cut, normalised."""
