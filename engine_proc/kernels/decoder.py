"""A dense decoder as data, and its step built from single kernels.

Owns: the description that the fused step (native_decoder.py) and this one share. The layer-by-layer step here is what
runs on the torch fallback and what the fused one is tested against; it works with any `Kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine_proc.kernels import reference
from engine_proc.kernels.api import Kernels, PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights, cache and options of one layer; norms are [hidden], a None is left out.

    qkv: rows of q, k and v in this order. gate_up: a gated layer. q_norm, k_norm: [head_dim], or over all heads when
    the model says `qk_norm_full`. attention_post_norm, mlp_post_norm: on a result before it joins the residual stream
    (Gemma 2 and 3, OLMo 2). Caches [blocks, block_size, kv_heads, head_dim]. cos, sin: float32
    [positions, rotary / 2]. window: keys a query may see, 0 for all; one value for all layers that have one.
    """

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor | None
    sin: Tensor | None
    input_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderModel:
    """A stack of layers between an embedding [vocab, hidden] and a final norm [hidden].

    softcap: of attention scores, 0 for none. The multipliers are Granite's, Gemma's and MiniCPM's scalings.
    """

    layers: tuple[DecoderLayer, ...]
    embedding: Tensor
    final_norm: Tensor
    q_heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    softcap: float = 0.0
    qk_norm_full: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0


@dataclass(slots=True, kw_only=True)
class StepInput:
    """One step's batch of T rows in S sequences; int32 tensors, see `Kernels.rope_cache` and `Kernels.attention`.

    ids [T]; where an id is negative the row of `embeds` (float32 [T, hidden]) is taken as it is. out_rows [R]: rows
    whose result is wanted.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    out_rows: Tensor
    embeds: Tensor | None = None


class Decoder(Protocol):
    """One step of a model: fills the cache and returns the hidden states that were asked for."""

    def __call__(self, step: StepInput) -> Tensor:
        """Hidden states of the rows `out_rows` after the last norm, float32 [R, hidden]."""

    def take_times(self) -> dict[str, float]:
        """Seconds spent by kind of operation since the last call; empty where it is not measured."""


class LayerwiseDecoder:
    """The step as a row of single kernels; activations have the embedding's type."""

    def __init__(self, kernels: Kernels, model: DecoderModel) -> None:
        self._kernels = kernels
        self._model = model

    def take_times(self) -> dict[str, float]:
        return {}

    def __call__(self, step: StepInput) -> Tensor:
        model = self._model
        x = model.embedding[step.ids.long().clamp_min(0)] * model.embedding_multiplier
        if step.embeds is not None:
            x = torch.where(step.ids[:, None] < 0, step.embeds.to(x.dtype), x)
        for layer in model.layers:
            y = self._norm(x, layer.input_norm)
            x = self._join(x, layer.o(self._attend(layer.qkv(y), layer, step)), layer.attention_post_norm)
            x = self._join(x, layer.down(layer.gate_up(self._norm(x, layer.mlp_norm))), layer.mlp_post_norm)
        return reference.rms_norm(x[step.out_rows.long()], model.final_norm, model.eps).float()

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else reference.rms_norm(x, weight, self._model.eps)

    def _join(self, residual: Tensor, x: Tensor, post_norm: Tensor | None) -> Tensor:
        return residual + self._norm(x, post_norm) * self._model.residual_multiplier

    def _attend(self, qkv: Tensor, layer: DecoderLayer, step: StepInput) -> Tensor:
        model, kernels = self._model, self._kernels
        wide, narrow = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
        q, k, v = qkv.split([wide, narrow, narrow], dim=1)
        norms: dict[str, Tensor] = {}
        if layer.q_norm is not None and layer.k_norm is not None:
            if model.qk_norm_full:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            else:
                norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        kernels.rope_cache(
            q,
            k,
            v,
            layer.cos,
            layer.sin,
            step.positions,
            layer.k_cache,
            layer.v_cache,
            step.slots,
            **norms,
            eps=model.eps,
        )
        return kernels.attention(
            q,
            layer.k_cache,
            layer.v_cache,
            step.block_tables,
            step.query_starts,
            step.context_lens,
            scale=model.scale,
            window=layer.window,
            softcap=model.softcap,
        )
