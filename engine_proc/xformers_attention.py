"""Attention over the paged cache through xformers: split-K over pages for decodes, cutlass over gathered keys for chunks.

Takes the place of `PagedAttention` on a GPU. The split-K operator reads the cache by block table, but knows neither
windows nor rows of different lengths, and wants pages of a multiple of its BLOCK_N; what it cannot do goes to the
cutlass one over keys that are gathered first, and soft caps to the reference. Written against xformers 0.0.35; proven on
a CPU only as to what it asks for (see docs/gpu.md). Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention


class Operators(Protocol):
    """What is used of xformers; tests put a direct computation in its place."""

    biases: Any                     # the module xformers.ops.fmha.attn_bias
    page_multiple: int              # of the paged operator

    def paged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        """q [1, rows, kv_heads, group, D], k and v [1, slots of the cache, kv_heads, group, D] -> like q."""

    def gathered(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        """The same over the keys of the bias's sequences, one after another."""


class Xformers:
    """The operators themselves. Imported here, where they are wanted: it takes seconds."""

    def __init__(self) -> None:
        from xformers.ops import fmha

        self.biases, self._fmha = fmha.attn_bias, fmha
        self._paged = type("PagedOp", (fmha.triton_splitk.FwOp,), {"BLOCK_N": 16})
        self.page_multiple = 16

    def paged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        out: torch.Tensor = self._fmha.memory_efficient_attention_forward(
            q, k, v, attn_bias=bias, scale=scale, op=self._paged)
        return out

    def gathered(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
        out: torch.Tensor = self._fmha.memory_efficient_attention_forward(
            q, k, v, attn_bias=bias, scale=scale, op=self._fmha.cutlass.FwOp)
        return out


@dataclass(slots=True)
class StepBiases:
    """What all layers of one step share, by window."""

    batch: AttentionBatch
    paged: Any = None
    gathered: dict[tuple[int, int | None], tuple[Any, torch.Tensor]] = field(default_factory=dict)


class XformersAttention(PagedAttention):
    """`PagedAttention` with another `attend`."""

    def __init__(self, operators: Operators, **shape: Any) -> None:
        super().__init__(**shape)
        self._operators = operators
        self._step: StepBiases | None = None

    def attend(self, layer: int, q: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        if spec.softcap is not None:
            return super().attend(layer, q, batch, spec)
        step = self._step
        if step is None or step.batch is not batch:
            step = self._step = StepBiases(batch)
        out, paged = torch.empty_like(q, memory_format=torch.contiguous_format), 0
        if spec.window is None and self.block_size % self._operators.page_multiple == 0:
            paged = batch.num_decodes
        if paged:
            out[:paged] = self._over_pages(step, layer, q[:paged], spec)
        if paged < len(batch.host_context_len):
            row = int(batch.host_query_start[paged])
            out[row:] = self._over_gathered(step, layer, q[row:], paged, spec)
        return out.flatten(1)

    def _over_pages(self, step: StepBiases, layer: int, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """The leading sequences, one query each."""
        count = len(q)
        if step.paged is None:
            width = -(-int(step.batch.host_context_len[:count].max()) // self.block_size)
            step.paged = self._operators.biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                [1] * count, step.batch.host_context_len[:count].tolist(),
                step.batch.block_tables[:count, :width].contiguous(), self.block_size, device=q.device)
        k, v = (self._grouped(cache[layer].flatten(0, 1), q) for cache in (self.k, self.v))
        return self._operators.paged(self._heads(q), k, v, step.paged, spec.scale)[0].flatten(1, 2)

    def _over_gathered(self, step: StepBiases, layer: int, q: torch.Tensor, first: int,
                       spec: AttentionSpec) -> torch.Tensor:
        """Sequences `first` and on, with any number of queries each."""
        made = step.gathered.get((first, spec.window))
        if made is None:
            made = step.gathered[first, spec.window] = self._gathered_bias(step.batch, first, spec.window, q.device)
        bias, where = made
        k, v = (self._grouped(cache[layer].flatten(0, 1)[where], q) for cache in (self.k, self.v))
        return self._operators.gathered(self._heads(q), k, v, bias, spec.scale)[0].flatten(1, 2)

    def _gathered_bias(self, batch: AttentionBatch, first: int, window: int | None,
                       device: torch.device) -> tuple[Any, torch.Tensor]:
        """The bias, and the slots of all keys of its sequences, int64 [sum of their lengths]."""
        lengths, starts = batch.host_context_len[first:], batch.host_query_start[first:]
        bias = self._operators.biases.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            np.diff(starts).tolist(), lengths.tolist(), device=device)
        if window is not None:
            bias = bias.make_local_attention_from_bottomright(window)
        owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
        position = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
        blocks = batch.block_tables[first:][owner, position // self.block_size]
        return bias, blocks.long() * self.block_size + position % self.block_size

    def _heads(self, q: torch.Tensor) -> torch.Tensor:
        return q.unflatten(1, (self.k[0].shape[2], -1))[None]

    def _grouped(self, keys: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """[N, kv_heads, D] -> [1, N, kv_heads, group, D], without a copy."""
        return keys[None, :, :, None].expand(-1, -1, -1, q.shape[1] // keys.shape[1], -1)
