"""What the xformers backend asks for, computed directly from its biases, is what the reference attention computes.

Nothing here runs an operator of xformers: those need a GPU. Its biases are Python, so where the package is installed
they are put in place of the stand-ins below, which are otherwise checked for nothing but themselves.
"""
from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention
from engine_proc.xformers_attention import XformersAttention

SHAPE: dict[str, Any] = {"layers": 2, "num_blocks": 24, "block_size": 16, "kv_heads": 2, "head_dim": 8,
                         "dtype": torch.float32, "device": torch.device("cpu")}


@dataclass
class Diagonal:
    """Queries of each sequence see its own keys, up to their own place counted from the end, within a window."""

    q_lengths: list[int]
    k_lengths: list[int]
    window: int | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> Diagonal:
        return cls(q_seqlen, kv_seqlen)

    def make_local_attention_from_bottomright(self, window_size: int) -> Diagonal:
        return Diagonal(self.q_lengths, self.k_lengths, window_size)

    def materialize(self, shape: tuple[int, ...]) -> torch.Tensor:
        mask, row, column = torch.full(shape, -torch.inf), 0, 0
        for queries, keys in zip(self.q_lengths, self.k_lengths):
            for i in range(queries):
                last = keys - queries + i
                first = 0 if self.window is None else max(0, last - self.window + 1)
                mask[row + i, column + first:column + last + 1] = 0
            row, column = row + queries, column + keys
        assert (row, column) == tuple(shape)
        return mask


@dataclass
class Paged:
    """The same for one query each, where block tables say which keys are whose."""

    k_lengths: list[int]
    tables: torch.Tensor
    size: int

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], block_tables: torch.Tensor, page_size: int, *,
                     device: torch.device) -> Paged:
        assert q_seqlen == [1] * len(kv_seqlen) and block_tables.dtype == torch.int32 and block_tables.is_contiguous()
        return cls(kv_seqlen, block_tables, page_size)

    def materialize(self, shape: tuple[int, ...]) -> torch.Tensor:
        mask = torch.full(shape, -torch.inf)
        for row, (length, table) in enumerate(zip(self.k_lengths, self.tables.tolist(), strict=True)):
            for position in range(length):
                mask[row, table[position // self.size] * self.size + position % self.size] = 0
        return mask


STAND_INS = SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Diagonal,
                            PagedBlockDiagonalCausalWithOffsetPaddedKeysMask=Paged)


class Direct:
    """Implements `xformers_attention.Operators`: attention with the bias written out."""

    page_multiple = 16

    def __init__(self, biases: Any) -> None:
        self.biases, self.calls = biases, [0, 0]

    def paged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        self.calls[0] += 1
        stand_in = isinstance(bias, Paged)      # xformers takes the width of the tables and gives that of the used pages
        mask = bias.materialize((q.shape[1], k.shape[1] if stand_in else bias.k_seqinfo.seqstart_py[-1]))
        return self._attend(q, k[:, :mask.shape[1]], v[:, :mask.shape[1]], mask, scale)

    def gathered(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        self.calls[1] += 1
        return self._attend(q, k, v, bias.materialize((q.shape[1], k.shape[1])), scale)

    @staticmethod
    def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        assert q.shape[0] == 1 and q.shape[2:] == k.shape[2:] == v.shape[2:] and k.shape == v.shape
        scores = torch.einsum("bmghd,bnghd->bghmn", q, k) * scale + mask
        weights = torch.softmax(scores, dim=-1)
        used = (mask == 0).any(dim=0)[None, :, None, None, None]        # elsewhere the cache may hold anything
        return torch.einsum("bghmn,bnghd->bmghd", weights, torch.where(used, v, 0))


@pytest.fixture(params=["stand-ins", "xformers"])
def biases(request: pytest.FixtureRequest) -> Any:
    if request.param == "stand-ins":
        return STAND_INS
    pytest.importorskip("xformers", reason="the package of the extra 'cuda' is not installed")
    from xformers.ops.fmha import attn_bias
    return attn_bias


def step(queries: list[int], lengths: list[int], seed: int = 0) -> AttentionBatch:
    """Sequences with `queries` new tokens of `lengths`; blocks in no order."""
    generator = np.random.default_rng(seed)
    blocks = generator.permutation(np.arange(1, 24)).tolist()
    tables = np.zeros((len(lengths), 5), np.int32)
    for row, length in enumerate(lengths):
        for i in range(-(-length // 16)):
            tables[row, i] = blocks.pop()
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    context = np.array(lengths, np.int32)
    slots = np.concatenate([tables[s][np.arange(length - count, length) // 16] * 16 + np.arange(length - count, length) % 16
                            for s, (count, length) in enumerate(zip(queries, lengths))]).astype(np.int64)
    decodes = next((i for i, count in enumerate(queries) if count > 1), len(queries))
    return AttentionBatch(
        query_start=torch.from_numpy(starts), context_len=torch.from_numpy(context), block_tables=torch.from_numpy(tables),
        slots=torch.from_numpy(slots), num_decodes=decodes, host_query_start=starts, host_context_len=context)


@pytest.mark.parametrize(("queries", "lengths"), [
    ([1, 1, 1], [1, 16, 40]), ([5, 17], [5, 60]), ([1, 1, 7, 16], [33, 2, 7, 70]), ([1], [64]), ([3, 1], [20, 9])])
@pytest.mark.parametrize("spec", [
    AttentionSpec(scale=0.3), AttentionSpec(scale=0.3, window=9), AttentionSpec(scale=0.3, softcap=20.0)],
    ids=["full", "window", "softcap"])
def test_it_is_the_reference(biases: Any, queries: list[int], lengths: list[int], spec: AttentionSpec) -> None:
    torch.manual_seed(1)
    reference, backend = PagedAttention(**SHAPE), XformersAttention(Direct(biases), **SHAPE)
    for cache in (reference, backend):
        for tensor in (*cache.k, *cache.v):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    batch = step(queries, lengths)
    for layer in range(2):
        q, k, v = (torch.randn(sum(queries), heads, 8) for heads in (6, 2, 2))
        for cache in (reference, backend):
            cache.write(layer, k, v, batch.slots)
        torch.testing.assert_close(
            backend.attend(layer, q, batch, spec), reference.attend(layer, q, batch, spec), atol=1e-5, rtol=1e-4)


def test_which_operator_is_asked(biases: Any) -> None:
    """Full decodes go over pages, what has a window or several queries over gathered keys, in one call each."""
    def calls(spec: AttentionSpec, queries: list[int], lengths: list[int]) -> list[int]:
        direct = Direct(biases)
        XformersAttention(direct, **SHAPE).attend(0, torch.randn(sum(queries), 6, 8), step(queries, lengths), spec)
        return direct.calls
    full, window = AttentionSpec(scale=1.0), AttentionSpec(scale=1.0, window=4)
    assert calls(full, [1, 1], [5, 30]) == [1, 0]
    assert calls(full, [1, 1, 4, 6], [5, 30, 4, 20]) == [1, 1]
    assert calls(window, [1, 1, 4], [5, 30, 4]) == [0, 1]
    assert calls(AttentionSpec(scale=1.0, softcap=5.0), [1, 4], [5, 4]) == [0, 0]


def test_biases_are_made_once_a_step() -> None:
    made = []
    class Counted(Diagonal):
        @classmethod
        def from_seqlens(cls, *args: Any, **kwargs: Any) -> Diagonal:
            made.append(args)
            return super().from_seqlens(*args, **kwargs)
    backend = XformersAttention(Direct(SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Counted)), **SHAPE)
    for number in range(2):
        batch = step([4, 6], [4, 20], seed=number)
        for layer in range(2):
            backend.attend(layer, torch.randn(10, 6, 8), batch, AttentionSpec(scale=1.0))
    assert len(made) == 2
