"""Paged attention against its torch reference: every head size, grouping, mask and batch shape, in a poisoned cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_proc.kernels import Kernels, reference
from tests.engine_proc.kernel_cases import ALL, DTYPES, NATIVE, close, poisoned, prepared, randn


@pytest.fixture(params=ALL, ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from prepared(request.param)


@dataclass(slots=True, kw_only=True)
class Batch:
    """Sequences as (new tokens, context including them) over a cache whose unused slots and blocks are NaN."""

    sequences: list[tuple[int, int]]
    q_heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    hidden: int = 0  # tokens at the start of each context that nobody may read
    q: Tensor = field(init=False)
    caches: list[Tensor] = field(init=False)
    tables: Tensor = field(init=False)
    starts: Tensor = field(init=False)
    contexts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        blocks_of = [-(-context // self.block_size) for _, context in self.sequences]
        total = sum(blocks_of) + 3
        order = torch.randperm(total)
        width = max(blocks_of) + 2
        self.tables = torch.full((len(self.sequences), width), -(10**6), dtype=torch.int32)
        shape = (total, self.block_size, self.kv_heads, self.dim)
        self.caches = [poisoned(*shape, dtype=self.cache_dtype or self.dtype) for _ in range(2)]
        used = 0
        for s, (_, context) in enumerate(self.sequences):
            mine = order[used : used + blocks_of[s]]
            used += blocks_of[s]
            self.tables[s, : len(mine)] = mine.int()
            token = torch.arange(self.hidden, context)
            slot = mine[token // self.block_size] * self.block_size + token % self.block_size
            for cache in self.caches:
                cache.view(-1, *shape[2:])[slot] = randn(len(token), *shape[2:], dtype=cache.dtype)
            self.tables[s, : self.hidden // self.block_size] = -(10**6)
        new = torch.tensor([n for n, _ in self.sequences])
        self.starts = torch.cat((torch.zeros(1), new.cumsum(0))).int()
        self.contexts = torch.tensor([context for _, context in self.sequences], dtype=torch.int32)
        self.q = randn(int(new.sum()), self.q_heads, self.dim, dtype=self.dtype)

    def run(self, kernels: Kernels, **options: Any) -> Tensor:
        out = poisoned(*self.q.shape, dtype=self.dtype)
        result = kernels.attention(
            self.q, *self.caches, self.tables, self.starts, self.contexts, scale=0.2, out=out, **options
        )
        assert result is out
        return out

    def exact(self, **options: Any) -> Tensor:
        wide = [t.double() for t in (self.q, *self.caches)]
        return reference.attention(*wide, self.tables, self.starts, self.contexts, scale=0.2, **options)


MIXED = [(1, 1), (1, 63), (5, 5), (1, 64), (17, 80), (1, 65), (70, 70), (3, 130), (1, 577), (2, 1030)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 16, 24, 32, 40, 64, 80, 96, 128, 256])
def test_every_head_size_in_a_mixed_batch(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    batch = Batch(sequences=MIXED[:8], dim=dim, dtype=dtype)
    close(batch.run(kernels), batch.exact())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (8, 1), (32, 2), (64, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_grouping_of_heads(kernels: Kernels, heads: tuple[int, int], dtype: torch.dtype) -> None:
    batch = Batch(sequences=MIXED, q_heads=heads[0], kv_heads=heads[1], dim=32, dtype=dtype)
    close(batch.run(kernels), batch.exact())


@pytest.mark.parametrize("window", [1, 5, 16, 64, 100, 600])
def test_sliding_windows(kernels: Kernels, window: int) -> None:
    batch = Batch(sequences=MIXED, dim=32)
    close(batch.run(kernels, window=window), batch.exact(window=window))


def test_blocks_that_the_window_has_left_are_not_read(kernels: Kernels) -> None:
    batch = Batch(sequences=[(1, 700), (8, 650)], hidden=600, dim=32)
    close(batch.run(kernels, window=40), batch.exact(window=40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = Batch(sequences=MIXED, dtype=dtype)
    batch.q *= 8
    close(batch.run(kernels, softcap=20.0), batch.exact(softcap=20.0))
    close(batch.run(kernels, softcap=5.0, window=50), batch.exact(softcap=5.0, window=50))


def test_without_causality_every_row_sees_the_whole_context(kernels: Kernels) -> None:
    batch = Batch(sequences=[(70, 70), (3, 3), (40, 40)], dim=32)
    close(batch.run(kernels, causal=False), batch.exact(causal=False))


@pytest.mark.parametrize("block_size", [1, 8, 24, 128])
def test_any_block_size(kernels: Kernels, block_size: int) -> None:
    batch = Batch(sequences=MIXED, dim=16, block_size=block_size)
    close(batch.run(kernels), batch.exact())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_may_have_another_type_than_the_queries(kernels: Kernels, dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    batch = Batch(sequences=MIXED[:7], dtype=dtype, cache_dtype=other)
    close(batch.run(kernels), batch.exact())


def test_queries_inside_wider_rows_and_sequences_without_rows(kernels: Kernels) -> None:
    batch = Batch(sequences=[(2, 20), (0, 5), (3, 3)], q_heads=4, kv_heads=2, dim=16)
    expected = batch.exact().flatten(1)
    wide = poisoned(5, 100)
    wide[:, 20:84] = batch.q.flatten(1)
    out = poisoned(5, 80)
    kernels.attention(
        wide[:, 20:84], *batch.caches, batch.tables, batch.starts, batch.contexts, scale=0.2, out=out[:, 16:]
    )
    close(out[:, 16:], expected)
    assert out[:, :16].isnan().all()


@pytest.mark.parametrize("kernels", NATIVE[:1], indirect=True, ids=str)
def test_an_index_out_of_range_is_refused_before_anything_is_read(kernels: Kernels) -> None:
    def run(change: Callable[[Batch], object]) -> Tensor:
        batch = Batch(sequences=[(2, 20), (1, 40)], dim=16)
        change(batch)
        return batch.run(kernels)

    assert not run(lambda batch: None).isnan().any()
    changes: list[Callable[[Batch], object]] = [
        lambda batch: batch.tables[1, :1].fill_(len(batch.caches[0])),
        lambda batch: batch.tables[0, 1:2].fill_(-1),
        lambda batch: batch.contexts[0:1].fill_(1),
        lambda batch: batch.contexts[1:2].fill_(1000),
        lambda batch: batch.starts[2:3].fill_(4),
    ]
    for change in changes:
        with pytest.raises(IndexError):
            run(change)


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    batch = Batch(sequences=[(3, 90), (1, 600)], dim=32)
    batch.q *= 1000
    close(batch.run(kernels), batch.exact(), absolute=1e-3)


def test_a_nan_in_a_query_stays_in_its_row(kernels: Kernels) -> None:
    batch = Batch(sequences=[(4, 20), (1, 30)], dim=32)
    expected = batch.exact()
    batch.q[1, 2, 5] = float("nan")
    out = batch.run(kernels)
    assert out[1, 2].isnan().all()
    keep = torch.ones(out.shape[:2], dtype=torch.bool)
    keep[1, 2] = False
    close(out[keep], expected[keep])


@pytest.mark.parametrize("kernels", NATIVE, indirect=True, ids=str)
@pytest.mark.parametrize("window", [0, 300])
def test_chunks_batches_and_threads_do_not_change_a_single_bit(kernels: Kernels, window: int) -> None:
    context = 1200
    whole = Batch(sequences=[(context, context)], dim=32, dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    kernels.set_num_threads(1)
    expected = whole.run(kernels, window=window)
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        for first, last in ((0, 1), (0, 70), (513, 514), (500, 620), (1199, 1200), (1024, 1200)):
            out = kernels.attention(
                whole.q[first:last].contiguous(),
                *whole.caches,
                whole.tables,
                torch.tensor([0, last - first], dtype=torch.int32),
                torch.tensor([last], dtype=torch.int32),
                scale=0.2,
                window=window,
            )
            assert torch.equal(out, expected[first:last])
