"""One configurable decoder for all dense families: layers as data (`Arch`), arithmetic behind `Ops`.

Works on packed batches: ids [T], positions [T], no padding, no loop over requests. `forward` gives the final hidden
states of the rows that are wanted; `logits` turns rows into float32 logits. Engine process; knows nothing of requests.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine_proc.arch import Arch
from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention
from engine_proc.layers import Linear, Norm, Ops, RopeTable
from engine_proc.parallel.share import WHOLE, Share
from engine_proc.rope import tables
from engine_proc.weights import Weights


@dataclass(slots=True, kw_only=True)
class ModelBatch:
    """The input of one step. On the model's device."""

    ids: torch.Tensor               # int64 [T]
    positions: torch.Tensor         # int64 [T]
    rows: torch.Tensor              # int64 [R]: rows whose hidden states are wanted
    attention: AttentionBatch
    embeds: torch.Tensor | None = None      # float32 [T, hidden]: taken as they are where an id is negative


@dataclass(slots=True, kw_only=True)
class DecoderLayer:
    """The weights of one layer, packed. A norm that the architecture lacks is None."""

    qkv: Linear
    o: Linear
    up: Linear                      # gates above ups where the architecture is gated
    down: Linear
    attn_norm: Norm | None
    attn_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    rope: RopeTable | None
    spec: AttentionSpec


class Decoder:
    """A dense decoder-only transformer over a paged cache."""

    def __init__(self, arch: Arch, ops: Ops, embedding: torch.Tensor, layers: list[DecoderLayer], norm: Norm,
                 head: Linear) -> None:
        self.arch, self.ops = arch, ops
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        # Gemma rounds its scale to the dtype of the weights.
        self.embed_scale = float(torch.tensor(arch.embed_scale).to(embedding.dtype))
        self.vocab_size, self.hidden_size, self.context_cost = arch.vocab, arch.hidden, arch.context_cost

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        """Hidden states of `batch.rows` after the last norm, [R, hidden]; K and V of all tokens are in the cache."""
        ops, scale = self.ops, self.arch.residual_scale
        x = ops.embed(self.embedding, batch.ids if batch.embeds is None else batch.ids.clamp_min(0))
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        if batch.embeds is not None:
            x = torch.where(batch.ids[:, None] < 0, self.arch.given_scale * batch.embeds, x).to(x.dtype)
        h = x if self.layers[0].attn_norm is None else ops.norm(x, self.layers[0].attn_norm)
        for number, layer in enumerate(self.layers):
            delta = self._attention(number, layer, h, batch, cache)
            h = ops.add_norm(x, delta, scale, layer.mlp_norm)
            delta = self._mlp(layer, h)
            if number + 1 < len(self.layers):
                h = ops.add_norm(x, delta, scale, self.layers[number + 1].attn_norm)
        return ops.add_norm(x[batch.rows], delta[batch.rows], scale, self.norm)

    def _attention(self, number: int, layer: DecoderLayer, h: torch.Tensor, batch: ModelBatch,
                   cache: PagedAttention) -> torch.Tensor:
        ops, arch = self.ops, self.arch
        qkv = ops.linear(h, layer.qkv)
        if arch.qk_norm == "full":
            qkv = self._norm_full(qkv, layer)
        heads = qkv.unflatten(-1, (-1, arch.head_dim))
        q, k, v = heads.split([arch.heads, arch.kv_heads, arch.kv_heads], dim=1)
        if layer.rope is not None and arch.qk_norm != "head":
            ops.rotate(heads[:, :arch.heads + arch.kv_heads], layer.rope, batch.positions)      # q and k at once
        if arch.qk_norm == "head" and layer.q_norm is not None and layer.k_norm is not None:
            q, k = ops.norm(q, layer.q_norm), ops.norm(k, layer.k_norm)
            if layer.rope is not None:
                ops.rotate(q, layer.rope, batch.positions)
                ops.rotate(k, layer.rope, batch.positions)
        cache.write(number, k, v, batch.attention.slots)
        out = ops.linear(cache.attend(number, q, batch.attention, layer.spec), layer.o)
        return out if layer.attn_post_norm is None else ops.norm(out, layer.attn_post_norm)

    def _norm_full(self, qkv: torch.Tensor, layer: DecoderLayer) -> torch.Tensor:
        """Norm the queries of all heads as one vector, and the keys likewise (OLMo 2)."""
        assert layer.q_norm is not None and layer.k_norm is not None
        width, kv_width = self.arch.heads * self.arch.head_dim, self.arch.kv_heads * self.arch.head_dim
        q, k, v = qkv.split([width, kv_width, kv_width], dim=-1)
        return torch.cat([self.ops.norm(q, layer.q_norm), self.ops.norm(k, layer.k_norm), v], dim=-1)

    def _mlp(self, layer: DecoderLayer, h: torch.Tensor) -> torch.Tensor:
        ops, act = self.ops, self.arch.activation
        inner = ops.gated(h, layer.up, act) if self.arch.gated else ops.activate(ops.linear(h, layer.up), act)
        out = ops.linear(inner, layer.down)
        return out if layer.mlp_post_norm is None else ops.norm(out, layer.mlp_post_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab], of memory of its own."""
        logits = self.ops.linear(hidden, self.head).float()
        if self.arch.logit_divisor != 1.0:
            logits /= self.arch.logit_divisor
        if self.arch.logit_softcap is not None:
            logits = torch.tanh(logits / self.arch.logit_softcap) * self.arch.logit_softcap
        return logits


def load_decoder(arch: Arch, weights: Weights, ops: Ops, longest: int,
                 progress: Callable[[int], None], *, head: bool = True, share: Share = WHOLE) -> Decoder:
    """Read, fuse and pack the weights of `arch` for up to `longest` positions. StartError when the files do not fit.

    Without `head` the decoder is for its hidden states only: the vocabulary's matrix is not packed a second time.
    `share`: the part of the model that this process holds.
    """
    ropes = [RopeTable(*tables(rope, longest)) for rope in arch.ropes]
    wide = (arch.vocab, arch.hidden)
    embed_name = weights.find(f"{arch.names['embed']}.weight", wide) or f"model.{arch.names['embed']}.weight"
    weights.base = embed_name.removesuffix(f"{arch.names['embed']}.weight")
    embedding = weights.assemble(share.tokens(embed_name, wide))
    layers = []
    for number, layer in enumerate(arch.layers):
        progress(100 * number // len(arch.layers))
        reader = _LayerReader(arch, weights, ops, f"{weights.base}layers.{number}.", share)
        rope = None if layer.rope is None else ropes[layer.rope]
        window = layer.window if layer.window is not None and layer.window < longest else None
        spec = AttentionSpec(scale=arch.attn_scale, window=window, softcap=arch.attn_softcap)
        layers.append(reader.read(rope, spec))
    reader = _LayerReader(arch, weights, ops, weights.base, share)
    norm = reader.norm("norm", arch.hidden)
    assert norm is not None
    head_name = weights.find(f"{arch.names['head']}.weight", wide) or f"{arch.names['head']}.weight"
    if arch.tied:
        weights.ignore(head_name)
    matrix = embedding if arch.tied or not head else weights.assemble(share.tokens(head_name, wide))
    return Decoder(share.local(arch), ops, embedding, layers, norm, ops.pack_head(matrix if head else matrix[:1]))


class _LayerReader:
    """Reads the parts of one layer by role."""

    def __init__(self, arch: Arch, weights: Weights, ops: Ops, prefix: str, share: Share) -> None:
        self.arch, self.weights, self.ops, self.prefix, self.share = arch, weights, ops, prefix, share

    def read(self, rope: RopeTable | None, spec: AttentionSpec) -> DecoderLayer:
        arch, names = self.arch, self.arch.names
        q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        qk_widths = (arch.head_dim, arch.head_dim) if arch.qk_norm == "head" else (q, kv)
        qkv = ["qkv"] if "qkv" in names else ["q", "k", "v"]
        up = ["gate_up"] if "gate_up" in names else ["gate", "up"] if arch.gated else ["up"]
        qkv_rows = [[q, kv, kv]] if "qkv" in names else [[q], [kv], [kv]]
        up_rows = [[arch.mlp] * 2] if "gate_up" in names else [[arch.mlp]] * len(up)
        weight, bias = self.tensors(up, up_rows, arch.hidden, arch.mlp_bias)
        return DecoderLayer(
            qkv=self.ops.pack(*self.tensors(qkv, qkv_rows, arch.hidden, arch.qkv_bias)),
            o=self.ops.pack_summed(*self.columns("o", q, arch.o_bias)),
            up=self.ops.pack_gated(weight, bias, arch.activation) if arch.gated else self.ops.pack(weight, bias),
            down=self.ops.pack_summed(*self.columns("down", arch.mlp, arch.mlp_bias)),
            attn_norm=self.norm("attn_norm", arch.hidden), attn_post_norm=self.norm("attn_post_norm", arch.hidden),
            mlp_norm=self.norm("mlp_norm", arch.hidden), mlp_post_norm=self.norm("mlp_post_norm", arch.hidden),
            q_norm=self.norm("q_norm", qk_widths[0], "rms"), k_norm=self.norm("k_norm", qk_widths[1], "rms"),
            rope=rope, spec=spec)

    def tensors(self, roles: list[str], blocks: list[list[int]], width: int,
                biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [rows, width] and bias of a fused linear layer; `blocks`: of rows, in the tensor of each role."""
        def read(kind: str, rest: tuple[int, ...]) -> torch.Tensor:
            return self.weights.assemble([
                piece for role, rows in zip(roles, blocks, strict=True)
                for piece in self.share.rows(f"{self.prefix}{self.arch.names[role]}.{kind}", rows, rest)])
        return read("weight", (width,)), read("bias", ()) if biased else None

    def columns(self, role: str, width: int, biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [hidden, width] and bias of a layer that gives a part of a sum."""
        name = self.prefix + self.arch.names[role]
        weight = self.weights.assemble(self.share.columns(f"{name}.weight", self.arch.hidden, width))
        return weight, self.weights.get(f"{name}.bias", (self.arch.hidden,)) if biased else None

    def norm(self, role: str, width: int, kind: str | None = None) -> Norm | None:
        if role not in self.arch.names:
            return None
        kind, name = kind or self.arch.norm, self.prefix + self.arch.names[role]
        weight = self.weights.get(f"{name}.weight", (width,), torch.float32) + self.arch.norm_offset
        bias = self.weights.get(f"{name}.bias", (width,), torch.float32) if kind == "layer" else None
        return Norm(weight, bias, self.arch.norm_eps, kind)
