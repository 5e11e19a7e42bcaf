"""The CPU's fast path: a decoder whose weights are packed for our kernels and whose step is one call into C.

`KernelOps` packs the weights while the decoder is loaded; `FusedDecoder` then takes the place of the torch decoder in
the runner. What the kernels cannot do (LayerNorm, MLPs without a gate, float16) stays with TorchOps. Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine_proc import kernels
from engine_proc.arch import Arch
from engine_proc.attention import PagedAttention
from engine_proc.decoder import Decoder, ModelBatch
from engine_proc.decoder import DecoderLayer as Layer
from engine_proc.device import available_memory
from engine_proc.greedy import Batch, Calls
from engine_proc.kernels import DecoderLayer, DecoderModel, Kernels, PackedLinear, StepInput, WeightType
from engine_proc.kernels.native import NativeKernels
from engine_proc.kernels.native_best import BestToken
from engine_proc.kernels.native_decoder import NativeDecoder
from engine_proc.layers import Linear, Norm, TorchOps

ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = (torch.bfloat16, torch.float32)
LIGHT_PART = 16                       # of the memory that is free at the start: what light copies of weights may take


@dataclass(slots=True)
class Packed(Linear):
    """A linear layer in the kernels' own layout; `weight` is empty."""

    packed: PackedLinear | None = None


@dataclass(slots=True)
class PackedHead(Packed):
    """The vocabulary's matrix, and the search for the best token in it where the kernels have one."""

    best: BestToken | None = None


class KernelOps(TorchOps):
    """Packs for the kernels. `quantization`: None keeps the weights' type, "int8" quantises them."""

    name = "kernels"

    def __init__(self, made: Kernels, quantization: WeightType | None = None) -> None:
        self.kernels, self._quantization = made, quantization
        self._light_left = available_memory() // LIGHT_PART

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        packed = self.kernels.linear(weight, bias, dtype=self._quantization, light=self._light(weight))
        return Packed(weight.new_empty(0), None, packed)

    def pack_head(self, weight: torch.Tensor) -> Linear:
        packed = self.kernels.linear(weight, None, dtype=self._quantization)
        best = self.kernels.best_token(packed, weight) if isinstance(self.kernels, NativeKernels) else None
        return PackedHead(weight.new_empty(0), None, packed, best)

    def pack_gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> Linear:
        assert activation in ACTIVATIONS
        packed = self.kernels.linear(weight, bias, dtype=self._quantization, light=self._light(weight),
                                     gate="silu" if activation == "silu" else "gelu_tanh")
        return Packed(weight.new_empty(0), None, packed)

    def _light(self, weight: torch.Tensor) -> bool:
        """Whether there is memory for a second copy of this one."""
        self._light_left -= weight.nbytes
        return self._light_left >= 0

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return _packed(layer)(x)


def why_not(arch: Arch, dtype: torch.dtype) -> str | None:
    """What keeps a decoder from the fused step; None when nothing does."""
    windows = {layer.window for layer in arch.layers if layer.window}
    for unfit, reason in (
            (dtype not in DTYPES, f"the dtype {dtype}"), (arch.norm != "rms", "LayerNorm"),
            (not arch.gated, "an MLP without a gate"), (arch.activation not in ACTIVATIONS, f"the {arch.activation}"),
            (arch.head_dim % 8 != 0, "the head size"), (len(windows) > 1, "several window sizes"),
            (arch.hidden % 2 != 0 or arch.mlp % 2 != 0, "an odd width")):
        if unfit:
            return reason
    return None


class FusedDecoder:
    """Implements runner.Model over packed weights. The cache is bound at construction: the kernels hold its address."""

    def __init__(self, net: Decoder, cache: PagedAttention) -> None:
        assert isinstance(net.ops, KernelOps)
        arch = net.arch
        self.hidden_size, self.context_cost = arch.hidden, net.context_cost
        self.vocab_size, self._arch, self._cache, self._head = net.vocab_size, arch, cache, _packed(net.head)
        self._best = net.head.best if isinstance(net.head, PackedHead) else None
        self.binds = self._best is not None and arch.logit_divisor == 1.0 and arch.logit_softcap is None
        specs, self._kernels = net.layers[0].spec, net.ops.kernels
        self._decoder = self._kernels.decoder(DecoderModel(
            layers=tuple(_layer(layer, cache.k[i], cache.v[i]) for i, layer in enumerate(net.layers)),
            embedding=net.embedding, final_norm=net.norm.weight, q_heads=arch.heads, kv_heads=arch.kv_heads,
            head_dim=arch.head_dim, eps=arch.norm_eps, scale=specs.scale, softcap=specs.softcap or 0.0,
            qk_norm_full=arch.qk_norm == "full", embedding_multiplier=net.embed_scale,
            residual_multiplier=arch.residual_scale))

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        """float32 hidden states of the wanted rows after the last norm, [R, hidden]."""
        assert cache is self._cache
        attention = batch.attention
        return self._decoder(StepInput(
            ids=batch.ids.int(), positions=batch.positions.int(), slots=attention.slots.int(),
            block_tables=attention.block_tables, query_starts=attention.query_start,
            context_lens=attention.context_len, out_rows=batch.rows.int(),
            embeds=None if batch.embeds is None else batch.embeds * self._arch.given_scale))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab]."""
        logits = self._head(hidden, torch.empty(hidden.shape[0], self.vocab_size))
        if self._arch.logit_divisor != 1.0:
            logits /= self._arch.logit_divisor
        if self._arch.logit_softcap is not None:
            logits = torch.tanh(logits / self._arch.logit_softcap) * self._arch.logit_softcap
        return logits

    def mask(self, logits: torch.Tensor, which: torch.Tensor, allowed: torch.Tensor) -> None:
        """See `Kernels.mask`."""
        self._kernels.mask(logits, which, allowed)

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token of each row, int64 [R], and whether its logit is a number, bool [R]."""
        tokens, _, nan = self._kernels.argmax(logits)
        ids = tokens.numpy()            # between two steps the caches are cold: NumPy touches less code than torch
        valid = np.isfinite(logits.numpy()[np.arange(len(ids)), ids]) & ~nan.numpy()
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(valid)

    def bind(self, batch: Batch) -> Calls:
        """The same as forward, logits and argmax, for a batch whose arrays stay. Only for a model that `binds`."""
        assert isinstance(self._decoder, NativeDecoder) and self._best is not None
        count, tensor = len(batch.ids), torch.from_numpy
        rows, hidden = torch.arange(count + 1, dtype=torch.int32), tensor(batch.hidden)
        step = StepInput(
            ids=tensor(batch.ids), positions=tensor(batch.positions), slots=tensor(batch.slots),
            block_tables=tensor(batch.tables), query_starts=rows, context_lens=tensor(batch.context_lens),
            out_rows=rows[:count])
        return Calls(batch, self._decoder.bind(step, hidden),
                     self._best.bind(hidden, tensor(batch.tokens), tensor(batch.best)))

    def take_times(self) -> dict[str, float]:
        """Seconds by kind of operation since the last call, where it is measured."""
        return self._decoder.take_times()


def _layer(layer: Layer, k_cache: torch.Tensor, v_cache: torch.Tensor) -> DecoderLayer:
    return DecoderLayer(
        qkv=_packed(layer.qkv), o=_packed(layer.o), gate_up=_packed(layer.up), down=_packed(layer.down),
        k_cache=k_cache, v_cache=v_cache, cos=None if layer.rope is None else layer.rope.cos,
        sin=None if layer.rope is None else layer.rope.sin, input_norm=_weight(layer.attn_norm),
        q_norm=_weight(layer.q_norm), k_norm=_weight(layer.k_norm), attention_post_norm=_weight(layer.attn_post_norm),
        mlp_norm=_weight(layer.mlp_norm), mlp_post_norm=_weight(layer.mlp_post_norm), window=layer.spec.window or 0)


def _weight(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight


def _packed(layer: Linear) -> PackedLinear:
    assert isinstance(layer, Packed) and layer.packed is not None
    return layer.packed


def load_kernels(threads: int) -> Kernels | None:
    """The compiled kernels with their threads; None where there is no compiler or the processor is too old."""
    made = kernels.load()
    if not made.native:
        return None
    made.set_num_threads(threads)
    return made
