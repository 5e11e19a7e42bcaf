"""Which part of a decoder's weights a rank holds, and which models can be split at all. No torch here.

Attention is split by heads, the MLP by its inner width, the vocabulary by rows of its matrices: q, k, v, gate and up
keep a rank's rows (column-parallel), o and down its columns (row-parallel), so that a layer needs two sums over the
ranks. Norms are whole everywhere. Engine process and its ranks, at load.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from engine_proc.arch import Arch


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) and columns (None: all) of the tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What rank `rank` of `size` holds."""

    rank: int = 0
    size: int = 1

    def cut(self, count: int) -> tuple[int, int]:
        """This rank's part of `count` equal things; they divide (see `why_not`)."""
        each = count // self.size
        return self.rank * each, (self.rank + 1) * each

    def vocabulary(self, vocab: int) -> tuple[int, int]:
        """This rank's tokens, first and last + 1. The last ranks may hold fewer, or none."""
        each = self.vocabulary_width(vocab)
        return min(self.rank * each, vocab), min((self.rank + 1) * each, vocab)

    def vocabulary_width(self, vocab: int) -> int:
        """The most tokens that a rank holds."""
        return -(-vocab // self.size)

    def local(self, arch: Arch) -> Arch:
        """The decoder as this rank computes it: its heads, its part of the MLP."""
        return arch if self.size == 1 else dataclasses.replace(
            arch, heads=arch.heads // self.size, kv_heads=arch.kv_heads // self.size, mlp=arch.mlp // self.size)

    def rows(self, name: str, blocks: Sequence[int], rest: tuple[int, ...]) -> list[Piece]:
        """This rank's rows of a tensor that holds `blocks` of rows below one another, each split by itself."""
        shape, pieces, start = (sum(blocks), *rest), [], 0
        for block in blocks:
            first, last = self.cut(block)
            pieces.append(Piece(name, shape, (start + first, start + last)))
            start += block
        return pieces

    def columns(self, name: str, rows: int, width: int) -> list[Piece]:
        """This rank's columns of a matrix [rows, width]."""
        return [Piece(name, (rows, width), (0, rows), self.cut(width))]

    def tokens(self, name: str, shape: tuple[int, int]) -> list[Piece]:
        """This rank's rows of a matrix [vocabulary, hidden]."""
        return [Piece(name, shape, self.vocabulary(shape[0]))]


WHOLE = Share()                 # of a model that is not split


def why_not(arch: Arch, size: int) -> str | None:
    """What keeps a model from being split over `size` ranks; None when nothing does."""
    for count, what in ((arch.heads, "attention heads"), (arch.kv_heads, "key and value heads"),
                        (arch.mlp, "columns of the MLP")):
        if count % size:
            return f"it has {count} {what}, which {size} does not divide"
    return "it norms all of its heads together" if arch.qk_norm == "full" else None
