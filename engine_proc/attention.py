"""The paged KV cache and attention over it, as a torch reference that is correct for every mix of rows.

Owns the K and V tensors of every layer, [num_blocks, block_size, kv_heads, head_dim]; which block belongs to whom is
the scheduler's business. `AttentionBatch` describes a step's rows. Kernels take the place of `PagedAttention` through
the same two methods, `write` and `attend`. Engine process. A row must never read a position that is not its sequence's.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

GROUP_TOKENS = 65_536               # cached tokens that the reference gathers at once for decode rows
SCORE_FLOATS = 8 * 2**20            # scores that it holds at once where the soft cap needs them


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How one layer attends."""

    scale: float
    window: int | None = None       # keys that a query sees, itself included
    softcap: float | None = None


@dataclass(slots=True, kw_only=True)
class AttentionBatch:
    """The rows of one step: `sequences` S, `tokens` T. Sequences with one query each come first."""

    query_start: torch.Tensor       # int32 [S + 1]
    context_len: torch.Tensor       # int32 [S]: tokens in the cache, those of this step included
    block_tables: torch.Tensor      # int32 [S, max_blocks], padded with block 0
    slots: torch.Tensor             # int64 [T]: block * block_size + offset, where each new token's K and V go
    num_decodes: int                # leading sequences with exactly one query
    host_query_start: np.ndarray    # the same on the host, for planning
    host_context_len: np.ndarray


class PagedAttention:
    """K and V of all layers. Memory is zero at first and taken from the system as blocks are first written."""

    def __init__(self, layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.block_size = block_size
        self.k = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.v = [_zeros(shape, dtype, device) for _ in range(layers)]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, [T, kv_heads, head_dim], at `slots`."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to) in all layers."""
        sources, targets = (torch.tensor(side) for side in zip(*pairs))
        for cache in (*self.k, *self.v):
            cache[targets] = cache[sources]

    def attend(self, layer: int, q: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        """Causal attention of q, [T, heads, head_dim], to each row's own sequence: [T, heads * head_dim]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for first, end in _decode_groups(batch):
            out[first:end] = self._decode(layer, q[first:end], batch, first, spec)
        starts = batch.host_query_start
        for s in range(batch.num_decodes, len(batch.host_context_len)):
            rows = slice(int(starts[s]), int(starts[s + 1]))
            out[rows] = self._prefill(layer, q[rows], batch, s, spec)
        return out.flatten(1)

    def _decode(self, layer: int, q: torch.Tensor, batch: AttentionBatch, first: int,
                spec: AttentionSpec) -> torch.Tensor:
        """Sequences first, first + 1 ... with one query each; q: [n, heads, head_dim]."""
        n = len(q)
        longest = int(batch.host_context_len[first:first + n].max())
        tables = batch.block_tables[first:first + n, :-(-longest // self.block_size)].long()
        lengths = batch.context_len[first:first + n, None]
        positions = torch.arange(tables.shape[1] * self.block_size, device=q.device)
        seen = positions < lengths                                          # [n, L]
        # Blocks hold what former sequences left, NaN for all we know, and 0 * NaN is NaN: blank it.
        k = self._gather(self.k[layer], tables).masked_fill_(~seen[..., None, None], 0)
        v = self._gather(self.v[layer], tables).masked_fill_(~seen[..., None, None], 0)
        if spec.window is not None:
            seen = seen & (positions >= lengths - spec.window)
        grouped = q.unflatten(1, (k.shape[2], -1))                          # [n, kv_heads, group, head_dim]
        return _attend(grouped, k.transpose(1, 2), v.transpose(1, 2), seen[:, None, None, :], spec).flatten(1, 2)

    def _prefill(self, layer: int, q: torch.Tensor, batch: AttentionBatch, s: int, spec: AttentionSpec) -> torch.Tensor:
        """One sequence with several queries; q: [n, heads, head_dim]."""
        n, length = len(q), int(batch.host_context_len[s])
        table = batch.block_tables[s:s + 1, :-(-length // self.block_size)].long()
        k = self._gather(self.k[layer], table)[:, :length].transpose(1, 2)  # [1, kv_heads, L, head_dim]
        v = self._gather(self.v[layer], table)[:, :length].transpose(1, 2)
        keys = torch.arange(length, device=q.device)
        queries = torch.arange(length - n, length, device=q.device)[:, None]
        seen = keys <= queries                                              # [n, L]
        if spec.window is not None:
            seen &= keys > queries - spec.window
        heads = q.transpose(0, 1).unsqueeze(0)                              # [1, heads, n, head_dim]
        if spec.softcap is None:
            out = F.scaled_dot_product_attention(heads, k, v, seen, scale=spec.scale, enable_gqa=True)
            return out[0].transpose(0, 1)
        grouped = heads.unflatten(1, (k.shape[1], -1))                      # [1, kv_heads, group, n, head_dim]
        step = max(1, SCORE_FLOATS // (q.shape[1] * length))
        parts = [_attend(grouped[:, :, :, i:i + step], k.unsqueeze(2), v.unsqueeze(2), seen[i:i + step], spec)
                 for i in range(0, n, step)]
        return torch.cat(parts, dim=3)[0].flatten(0, 1).transpose(0, 1)

    @staticmethod
    def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """[n, blocks] -> [n, blocks * block_size, kv_heads, head_dim], a copy."""
        return cache[tables].flatten(1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attention of q [..., n, d] to k, v [..., L, d] where `seen` allows it."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=spec.scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * spec.scale
    scores = torch.tanh(scores / spec.softcap) * spec.softcap
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.matmul(weights, v.float()).to(q.dtype)


def _decode_groups(batch: AttentionBatch) -> Iterator[tuple[int, int]]:
    """Runs of decode rows whose padded contexts are at most GROUP_TOKENS together."""
    first, longest = 0, 0
    for s in range(batch.num_decodes):
        longest = max(longest, int(batch.host_context_len[s]))
        if s > first and longest * (s - first + 1) > GROUP_TOKENS:
            yield first, s
            first, longest = s, int(batch.host_context_len[s])
    if first < batch.num_decodes:
        yield first, batch.num_decodes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that cost no memory until they are written: calloc's fresh pages, which torch.zeros would touch."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    width = {4: np.uint32, 2: np.uint16}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=width)).view(dtype)
