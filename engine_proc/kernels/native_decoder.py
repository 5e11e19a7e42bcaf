"""The fused step: a whole decoder in one call of the compiled library.

Owns: the C description of a model (decoder.h), built once, and of a step, built per call. Tensors that the description
points to are kept alive here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from engine_proc.kernels.decoder import DecoderLayer, DecoderModel, StepInput

_LAYER = struct.Struct("14q3q")  # decoder_layer
_MODEL = struct.Struct("3q9q3q5d")  # decoder_model
_STEP = struct.Struct("10q5q")  # decoder_step
TIME_KINDS = ("norms", "qkv", "rope_cache", "attention", "o", "gate_up", "down")
_BF16 = torch.bfloat16


def check(failed: int, what: str) -> None:
    """Raises what a result of the library means: -1 no memory for scratch space, -2 an index outside its array."""
    if failed:
        if failed == -2:
            raise IndexError(f"{what}: a block, slot, position, id or row is out of range")
        raise MemoryError(f"{what}: no memory for scratch space")


class NativeDecoder:
    """See `decoder.Decoder`. Linear layers must be of the same library (`NativeLinear`)."""

    def __init__(self, library: ctypes.CDLL, model: DecoderModel) -> None:
        self._model = model
        self._kept: list[Tensor] = []
        self._step = library.q_decoder_step
        self._hidden = model.embedding.shape[1]
        self._times = (ctypes.c_double * len(TIME_KINDS))()
        self._times_at = ctypes.addressof(self._times)
        self._layers = ctypes.create_string_buffer(b"".join(map(self._layer, model.layers)))
        self._packed = _MODEL.pack(
            ctypes.addressof(self._layers),
            self._keep(model.embedding.contiguous()),
            self._float(model.final_norm),
            len(model.layers),
            *model.embedding.shape,
            model.layers[0].down.k,
            model.q_heads,
            model.kv_heads,
            model.head_dim,
            *model.layers[0].k_cache.shape[:2],
            model.embedding.dtype is _BF16,
            model.layers[0].k_cache.dtype is _BF16,
            model.qk_norm_full,
            model.eps,
            model.scale,
            model.softcap,
            model.embedding_multiplier,
            model.residual_multiplier,
        )
        self._check()

    def __call__(self, step: StepInput) -> Tensor:
        hidden = torch.empty(step.out_rows.shape[0], self._hidden)
        check(self._step(self._packed, self._pack(step, hidden)), "decoder step")
        return hidden

    def bind(self, step: StepInput, hidden: Tensor) -> Callable[[], None]:
        """The step over tensors that stay where they are: reads them and writes `hidden` whenever it is called."""
        assert hidden.shape == (step.out_rows.shape[0], self._hidden) and hidden.is_contiguous()
        call, model, packed, kept = self._step, self._packed, self._pack(step, hidden), (step, hidden)

        def run() -> None:
            assert kept
            check(call(model, packed), "decoder step")

        return run

    def _pack(self, step: StepInput, hidden: Tensor) -> bytes:
        """decoder_step; the tensors must outlive the call."""
        rows, outs = step.ids.shape[0], step.out_rows.shape[0]
        assert step.positions.shape[0] == step.slots.shape[0] == rows and step.block_tables.stride(1) == 1
        assert step.query_starts.shape[0] == step.context_lens.shape[0] + 1
        for tensor in (step.ids, step.positions, step.slots, step.block_tables, step.out_rows):
            assert tensor.dtype is torch.int32
        assert step.query_starts.dtype is step.context_lens.dtype is torch.int32
        embeds = 0
        if step.embeds is not None:
            assert step.embeds.dtype is torch.float32 and step.embeds.shape == (rows, self._hidden)
            assert step.embeds.is_contiguous()
            embeds = step.embeds.data_ptr()
        return _STEP.pack(
            step.ids.data_ptr(),
            embeds,
            step.positions.data_ptr(),
            step.slots.data_ptr(),
            step.block_tables.data_ptr(),
            step.query_starts.data_ptr(),
            step.context_lens.data_ptr(),
            step.out_rows.data_ptr(),
            hidden.data_ptr(),
            self._times_at,
            rows,
            step.context_lens.shape[0],
            step.block_tables.stride(0),
            step.block_tables.shape[1],
            outs,
        )

    def take_times(self) -> dict[str, float]:
        """Seconds by kind of operation since the last call."""
        taken = dict(zip(TIME_KINDS, self._times, strict=True))
        ctypes.memset(self._times, 0, ctypes.sizeof(self._times))
        return taken

    def _layer(self, layer: DecoderLayer) -> bytes:
        norms = (layer.input_norm, layer.q_norm, layer.k_norm)
        later = (layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        return _LAYER.pack(
            *map(self._float, (*norms, *later)),
            *(linear.address for linear in linears),  # type: ignore[attr-defined]
            self._keep(layer.k_cache),
            self._keep(layer.v_cache),
            self._float(layer.cos),
            self._float(layer.sin),
            0 if layer.cos is None else layer.cos.shape[1],
            0 if layer.cos is None else layer.cos.shape[0],
            layer.window,
        )

    def _float(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self._keep(tensor.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _check(self) -> None:
        model = self._model
        wide, narrow = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
        cache = model.layers[0].k_cache
        assert model.head_dim % 8 == 0 and model.head_dim <= 1024 and model.q_heads % model.kv_heads == 0
        assert len({layer.window for layer in model.layers if layer.window}) <= 1
        for layer in model.layers:
            assert (layer.qkv.k, layer.qkv.n) == (self._hidden, wide + 2 * narrow)
            assert (layer.o.k, layer.o.n) == (wide, self._hidden)
            assert (layer.gate_up.k, layer.gate_up.n) == (self._hidden, layer.down.k)
            assert (layer.down.k, layer.down.n) == (model.layers[0].down.k, self._hidden)
            assert self._hidden % 2 == wide % 2 == layer.down.k % 2 == 0
            assert layer.k_cache.shape == layer.v_cache.shape == cache.shape
            assert layer.k_cache.dtype is layer.v_cache.dtype is cache.dtype
            assert cache.shape[2:] == (model.kv_heads, model.head_dim)
