"""What the decoder attends to: the paged cache of its own tokens, and one slot of encoder states per window.

Engine process. Both have a torch path that is correct on every machine and a path through the C kernels. A slot is
written by the encoder only, and read until the runner gives it to another window.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention
from engine_proc.decoder import ModelBatch
from engine_proc.kernels import Kernels


@dataclass(slots=True)
class SelfPlan:
    """A step's rows as self-attention sees them; int32 for the kernels."""

    attention: AttentionBatch
    positions: torch.Tensor
    slots: torch.Tensor


class SelfCache:
    """Keys and values of the decoder's own tokens, in the scheduler's blocks."""

    def __init__(self, pages: PagedAttention, heads: int, kernels: Kernels | None) -> None:
        self.pages, self._heads, self._kernels = pages, heads, kernels
        self._spec = AttentionSpec(scale=pages.k[0].shape[-1] ** -0.5)

    def plan(self, batch: ModelBatch) -> SelfPlan:
        if self._kernels is None:
            return SelfPlan(batch.attention, batch.positions, batch.attention.slots)
        return SelfPlan(batch.attention, batch.positions.int(), batch.attention.slots.int())

    def attend(self, layer: int, qkv: torch.Tensor, plan: SelfPlan) -> torch.Tensor:
        """Keep the new keys and values, then attend causally. qkv: [T, 3 * width] -> [T, width]."""
        q, k, v = qkv.chunk(3, dim=-1)
        batch = plan.attention
        if self._kernels is None:
            q, k, v = (part.unflatten(1, (self._heads, -1)) for part in (q, k, v))
            self.pages.write(layer, k, v, plan.slots)
            return self.pages.attend(layer, q, batch, self._spec)
        keys, values = self.pages.k[layer], self.pages.v[layer]
        self._kernels.rope_cache(q, k, v, None, None, plan.positions, keys, values, plan.slots)
        out = torch.empty(q.shape, dtype=q.dtype)
        return self._kernels.attention(q, keys, values, batch.block_tables, batch.query_start, batch.context_len,
                                       scale=self._spec.scale, out=out)


@dataclass(slots=True)
class CrossPlan:
    """A step's rows as cross-attention sees them."""

    tables: torch.Tensor                # int32 [S, 1]: a slot is one block as long as a window
    lengths: torch.Tensor               # int32 [S]
    batch: AttentionBatch


class CrossCache:
    """Keys and values of encoder states: [slots, frames, heads, head_dim] per layer; every frame is seen."""

    def __init__(self, layers: int, slots: int, frames: int, heads: int, head_dim: int, dtype: torch.dtype,
                 kernels: Kernels | None) -> None:
        pages = PagedAttention(layers, slots, frames, heads, head_dim, dtype, torch.device("cpu"))
        self._k, self._v, self._frames, self._kernels = pages.k, pages.v, frames, kernels
        self._scale = head_dim ** -0.5

    def write(self, layer: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [frames, heads, head_dim]."""
        self._k[layer][slot].copy_(k)
        self._v[layer][slot].copy_(v)

    def read(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._k[layer][slot], self._v[layer][slot]

    def plan(self, batch: AttentionBatch, slots: torch.Tensor) -> CrossPlan:
        return CrossPlan(slots.view(-1, 1), torch.full_like(slots, self._frames), batch)

    def attend(self, layer: int, q: torch.Tensor, plan: CrossPlan) -> torch.Tensor:
        """q: [T, width] -> [T, width]."""
        keys, values, batch = self._k[layer], self._v[layer], plan.batch
        if self._kernels is not None:
            return self._kernels.attention(q, keys, values, plan.tables, batch.query_start, plan.lengths,
                                           scale=self._scale, causal=False)
        out = torch.empty_like(q)
        starts = batch.host_query_start
        for s, slot in enumerate(plan.tables[:, 0].tolist()):
            rows = slice(int(starts[s]), int(starts[s + 1]))
            heads = q[rows].unflatten(1, (keys.shape[2], -1)).transpose(0, 1)
            mixed = F.scaled_dot_product_attention(
                heads, keys[slot].transpose(0, 1), values[slot].transpose(0, 1), scale=self._scale)
            out[rows] = mixed.transpose(0, 1).flatten(1)
        return out
