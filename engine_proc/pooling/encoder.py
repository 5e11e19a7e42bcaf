"""One configurable encoder for the BERT family on our kernels: layers as data (`EncoderArch`), packed batches.

Activations are float32 throughout, whatever the type of the weights; nothing is padded and no token sees another
input. Engine process; knows nothing of requests.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.kernels import Activation, Kernels, PackedLinear, WeightType
from engine_proc.pooling.body import Packed
from engine_proc.pooling.encoder_arch import EncoderArch, Layer
from engine_proc.rope import tables
from engine_proc.weights import Weights

BIAS_PADDING = 15                       # floats that the kernel may read behind a head's relative biases
MAX_DISTANCE = 128                      # MPNet's buckets reach so far
ROW_GAP = 16                            # floats between the rows of a buffer: rows must not share their cache sets


@dataclass(slots=True)
class Norm:
    """LayerNorm; float32 [hidden]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class EncoderLayer:
    """The weights of one layer, packed; the activation is part of `up`."""

    spec: Layer
    qkv: PackedLinear
    o: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attn_norm: Norm | None
    mlp_norm: Norm


class Encoder:
    """Implements `body.Body`. What `forward` gives is overwritten by the next call."""

    padded = False

    def __init__(self, arch: EncoderArch, kernels: Kernels, weights: Weights, longest: int,
                 quantization: WeightType | None, progress: Callable[[int], None]) -> None:
        """Read and pack the weights, for inputs of up to `longest` tokens. StartError when the files do not fit."""
        self.arch, self._kernels, self._weights, self._quantization = arch, kernels, weights, quantization
        self.width, self.vocab_size, self.num_type_ids = arch.hidden, arch.vocab, arch.num_type_ids
        self.max_positions = arch.max_positions
        wide = (arch.vocab, arch.embedding_width)
        word = f"{arch.names['word']}.weight"
        weights.base = (weights.find(word, wide) or word).removesuffix(word)
        self._word = self._tensor("word", wide, weights.dtype)
        self._type = self._tensor("type", (arch.num_type_ids, wide[1])) if "type" in arch.names else None
        self._position = self._tensor("position", (arch.positions, wide[1])) if arch.positions else None
        self._embed_norm = self._norm("embed_norm", wide[1])
        self._projection = (kernels.linear(*self._stacked(["embed_projection"], [arch.hidden], wide[1], True))
                            if "embed_projection" in arch.names else None)
        self._ropes = [tables(rope, longest) for rope in arch.ropes]
        self._rope_shape = torch.empty(1, 1, arch.heads, arch.head_dim)      # the kernel's cache, which nothing enters
        self._span = longest if arch.bias_buckets else 0
        self._bias = self._relative_bias() if arch.bias_buckets else None
        self._layers = []
        for number, layer in enumerate(arch.layers):
            progress(100 * number // len(arch.layers))
            self._layers.append(self._layer(layer, number))
        self._buffers: dict[str, torch.Tensor] = {}          # grow to the largest batch seen
        self._final_norm = self._norm("final_norm", arch.hidden) if "final_norm" in arch.names else None

    # ---- loading -------------------------------------------------------------------------------------------------

    def _name(self, role: str, number: int = 0) -> str:
        return self._weights.base + self.arch.names[role].format(n=number)

    def _tensor(self, role: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._weights.get(f"{self._name(role)}.weight", shape, dtype)

    def _norm(self, role: str, width: int, number: int = 0) -> Norm:
        name, weights = self._name(role, number), self._weights
        old = f"{name}.gamma" in weights                     # as checkpoints converted from TensorFlow call them
        weight = weights.get(f"{name}.{'gamma' if old else 'weight'}", (width,), torch.float32)
        if role != "embed_norm" and not self.arch.norm_bias or f"{name}.{'beta' if old else 'bias'}" not in weights:
            return Norm(weight, None)
        return Norm(weight, weights.get(f"{name}.{'beta' if old else 'bias'}", (width,), torch.float32))

    def _stacked(self, roles: list[str], rows: list[int], width: int, biased: bool,
                 number: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [sum of rows, width] and bias of several linear layers as one."""
        names = [self._name(role, number) for role in roles]
        weight = self._weights.stack([f"{name}.weight" for name in names], [(n, width) for n in rows])
        bias = self._weights.stack([f"{name}.bias" for name in names], [(n,) for n in rows]) if biased else None
        return weight, bias

    def _layer(self, spec: Layer, number: int) -> EncoderLayer:
        arch = self.arch
        hidden, activation = arch.hidden, self._activation()

        def pack(roles: list[str], rows: list[int], width: int, biased: bool, gate: Activation | None = None,
                 post: Activation | None = None) -> PackedLinear:
            weight, bias = self._stacked(roles, rows, width, biased, number)
            return self._kernels.linear(weight, bias, dtype=self._quantization, gate=gate, post=post)

        if arch.gated:
            whole = "gate_up" in arch.names
            up = pack(["gate_up"] if whole else ["gate", "up"], [2 * arch.mlp] if whole else [arch.mlp] * 2, hidden,
                      arch.mlp_bias, gate=activation)
        else:
            up = pack(["up"], [arch.mlp], hidden, arch.mlp_bias, post=activation)
        qkv = ["qkv"] if "qkv" in arch.names else ["q", "k", "v"]
        return EncoderLayer(
            spec=spec, qkv=pack(qkv, [3 * hidden // len(qkv)] * len(qkv), hidden, arch.qkv_bias),
            o=pack(["o"], [hidden], hidden, arch.o_bias), up=up, down=pack(["down"], [hidden], arch.mlp, arch.mlp_bias),
            attn_norm=self._norm("attn_norm", hidden, number) if spec.attn_norm else None,
            mlp_norm=self._norm("mlp_norm", hidden, number))

    def _activation(self) -> Activation:
        activation = self.arch.activation
        assert activation in ("silu", "gelu_tanh", "gelu", "relu")
        return activation  # type: ignore[return-value]

    def _relative_bias(self) -> torch.Tensor:
        """float32 [heads, 2 * span - 1 + padding]: MPNet's biases by distance (T5's buckets, both sides)."""
        arch, span = self.arch, self._span
        table = self._tensor("bias", (arch.bias_buckets, arch.heads))
        apart = torch.arange(1 - span, span)                             # key - query
        half = arch.bias_buckets // 2
        side, size, exact = (apart > 0).long() * half, apart.abs(), half // 2
        far = exact + (torch.log(size.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
                       * (half - exact)).long()
        bucket = side + torch.where(size < exact, size, far.clamp(max=half - 1))
        return torch.nn.functional.pad(table[bucket].T, (0, BIAS_PADDING + 1)).contiguous()

    # ---- computing -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, packed: Packed) -> torch.Tensor:
        arch = self.arch
        starts, places, count = torch.from_numpy(packed.starts), packed.places, len(packed.ids)
        x, normed = self._embed(packed, places), self._buffer("normed", count, arch.hidden)
        added, inner = self._buffer("added", count, arch.hidden), self._buffer("inner", count, arch.mlp)
        positions = torch.from_numpy(places.astype(np.int32)) if self._ropes else None
        for number, layer in enumerate(self._layers):
            if not arch.prenorm:
                assert layer.attn_norm is not None
                layer.o(self._attend(layer, x, starts, positions), added)
                self._normed(x, layer.attn_norm, added, x)
                self._normed(x, layer.mlp_norm, layer.down(layer.up(x, inner), added), x)
                continue
            before = added if number else None               # of the layer before, not yet part of x
            h = x if layer.attn_norm is None else self._normed(x, layer.attn_norm, before, normed)
            layer.o(self._attend(layer, h, starts, positions), added)
            layer.down(layer.up(self._normed(x, layer.mlp_norm, added, normed), inner), added)
        if arch.prenorm:
            assert self._final_norm is not None
            self._normed(x, self._final_norm, added, x)
        return x

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """float32 [rows, width] of memory that is kept: fresh pages cost more than what is computed into them."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < rows:
            buffer = self._buffers[name] = self._kernels.empty((rows, width + ROW_GAP), torch.float32)
        return buffer[:rows, :width]

    def _normed(self, x: torch.Tensor, norm: Norm, add: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        return self._kernels.layer_norm(x, norm.weight, norm.bias, self.arch.eps, add=add, out=out)

    def _embed(self, packed: Packed, places: np.ndarray) -> torch.Tensor:
        arch = self.arch
        x = self._buffer("embedded", len(packed.ids), arch.embedding_width)
        x.copy_(self._word[torch.from_numpy(packed.ids)])
        if self._type is not None:
            x += self._type[torch.from_numpy(packed.type_ids)]
        if self._position is not None:
            rows = places + arch.first_position
            if arch.pad_id >= 0:
                rows = _behind_padding(packed, rows, arch)
            x += self._position[torch.from_numpy(rows)]
        self._normed(x, self._embed_norm, None, x)
        return x if self._projection is None else self._projection(x, self._buffer("x", len(x), arch.hidden))

    def _attend(self, layer: EncoderLayer, h: torch.Tensor, starts: torch.Tensor,
                positions: torch.Tensor | None) -> torch.Tensor:
        arch = self.arch
        qkv = layer.qkv(h, self._buffer("qkv", len(h), 3 * arch.hidden))
        q, k, v = qkv.split(arch.hidden, dim=1)
        if layer.spec.rope is not None and positions is not None:
            cos, sin = self._ropes[layer.spec.rope]
            self._kernels.rope_cache(q, k, v, cos, sin, positions, self._rope_shape, self._rope_shape, None)
        return self._kernels.packed_attention(
            q, k, v, starts, arch.head_dim, scale=arch.head_dim ** -0.5, window=layer.spec.window, bias=self._bias,
            span=self._span, out=self._buffer("attended", len(h), arch.hidden))


def _behind_padding(packed: Packed, rows: np.ndarray, arch: EncoderArch) -> np.ndarray:
    """Padding tokens inside a text take the padding's position and do not count, as RoBERTa has it."""
    padding = packed.ids == arch.pad_id
    if not padding.any():
        return rows
    before = np.cumsum(padding) - padding
    before -= np.repeat(before[packed.starts[:-1]], packed.lengths)
    return np.where(padding, arch.first_position - 1, rows - before)
