"""The compiled kernels behind the interface of `api.py`.

Owns: the ctypes signatures of the library and the checks on what goes in. A call costs 2-4 microseconds of Python:
pointers go as integers, long argument lists as one packed struct. The library has one thread team and one scratch
buffer per process, guarded by its own lock; ctypes drops the GIL around each call.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from engine_proc.kernels.api import Activation, Kernels, PackedLinear, WeightType, is_supported
from engine_proc.kernels.decoder import Decoder, DecoderModel
from engine_proc.kernels.native_best import BestToken
from engine_proc.kernels.native_decoder import NativeDecoder, check
from engine_proc.kernels.native_linear import HugePages, NativeLinear

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "q_set_threads": (_I, [_I]),
    "q_set_spin": (None, [ctypes.c_ulong]),
    "q_linear": (_I, [_P, _P, _I, _L, _L, _P, _I, _L]),
    "q_pack": (None, [_P, _P, _I]),
    "q_pack_int8": (None, [_P, _P, _I, _P]),
    "q_count_light": (_I, [_P, _P]),
    "q_pack_light": (None, [_P, _P]),
    "q_advise_huge": (None, [_P, ctypes.c_size_t]),
    "q_best": (_I, [_P, _P, _P, _P, _L, _P, _P]),
    "q_rope_cache": (_I, [ctypes.c_char_p]),
    "q_attention": (_I, [ctypes.c_char_p]),
    "q_decoder_step": (_I, [ctypes.c_char_p, ctypes.c_char_p]),
    "q_layer_norm": (None, [_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _F, _I]),
    "q_packed_attention": (_I, [ctypes.c_char_p]),
    "q_int16_attention": (_I, [ctypes.c_char_p]),
    "q_mask": (None, [_P, _P, _P, _L, _L, _L, _L]),
    "q_argmax": (None, [_P, _I, _L, _L, _L, _P, _P, _P]),
}
TICKS_PER_US = 2500  # of the time-stamp counter, about
_ROPE = struct.Struct("11q3q5q2q2qd")  # rope_args in rope.h
_ATTENTION = struct.Struct("7q3q3q5q5q2d")  # attention_args in attention.h
_PACKED_ATTENTION = struct.Struct("6q4q7qd")  # packed_attention_args in packed_attention.h
_INT16_ATTENTION = struct.Struct("4q4q4qd")  # int16_attention_args in int16_attention.h
_BF16 = torch.bfloat16


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeKernels(Kernels):
    """See `Kernels`."""

    native = True

    def __init__(self, path: Path, level: str) -> None:
        """Loads the library; raises OSError when the loader refuses it."""
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self._level = level
        self._memory = HugePages(self.library)
        self._rope = self.library.q_rope_cache
        self._attend = self.library.q_attention
        self.threads = self.set_num_threads(torch.get_num_threads())

    def describe(self) -> str:
        return f"compiled for {self._level}, {self.threads} threads"

    def set_num_threads(self, count: int) -> int:
        self.threads = int(self.library.q_set_threads(count))
        return self.threads

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._memory.empty(shape, dtype)

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: WeightType | None = None,
        gate: Activation | None = None,
        post: Activation | None = None,
        light: bool = False,
    ) -> PackedLinear:
        return NativeLinear(self.library, self._memory, weight, bias, dtype, gate, post, light=light)

    def best_token(self, packed: PackedLinear, weight: Tensor) -> BestToken:
        """The search for the best token in `packed`, whose plain form is `weight`."""
        assert isinstance(packed, NativeLinear)
        return BestToken(self.library, self._memory, packed, weight)

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        *,
        add: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        rows, dim = x.shape
        if out is None:
            out = torch.empty((rows, dim), dtype=x.dtype)
        assert (*weight.shape,) == (dim,) and (bias is None or (*bias.shape,) == (dim,)) and (*out.shape,) == (rows, dim)
        assert weight.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)
        assert is_supported(x) and is_supported(out) and out.dtype is x.dtype
        assert add is None or (add.shape == x.shape and add.dtype is x.dtype and is_supported(add))
        self.library.q_layer_norm(
            x.data_ptr(),
            _address(add),
            weight.data_ptr(),
            _address(bias),
            out.data_ptr(),
            rows,
            dim,
            x.stride(0),
            0 if add is None else add.stride(0),
            out.stride(0),
            eps,
            x.dtype is _BF16,
        )
        return out

    def packed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        head_dim: int,
        *,
        scale: float,
        window: int = 0,
        bias: Tensor | None = None,
        span: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        rows = q.shape[0]
        if out is None:
            out = torch.empty((rows, q.shape[1]))
        heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
        assert k.shape == v.shape == (rows, kv_heads * head_dim) and heads % kv_heads == 0 and out.shape == q.shape
        assert all(t.dtype is torch.float32 and t.is_cpu and t.stride(1) == 1 for t in (q, k, v, out))
        assert starts.dtype is torch.int32 and starts.is_contiguous()
        assert bias is None or (bias.shape == (heads, 2 * span + 15) and bias.is_contiguous())
        failed = self.library.q_packed_attention(
            _PACKED_ATTENTION.pack(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                out.data_ptr(),
                starts.data_ptr(),
                _address(bias),
                q.stride(0),
                k.stride(0),
                v.stride(0),
                out.stride(0),
                rows,
                starts.shape[0] - 1,
                heads,
                kv_heads,
                head_dim,
                window,
                span,
                scale,
            )
        )
        check(failed, "packed_attention")
        return out

    def int16_attention(
        self, q: Tensor, k: Tensor, v: Tensor, head_dim: int, *, scale: float, heads: range, out: Tensor
    ) -> None:
        assert q.shape == k.shape == v.shape == out.shape and q.shape[0] > 0
        assert all(t.dtype is torch.float32 and t.is_cpu and t.stride(1) == 1 for t in (q, k, v, out))
        assert head_dim % 16 == 0 and head_dim <= 128 and 0 <= heads.start <= heads.stop <= q.shape[1] // head_dim
        failed = self.library.q_int16_attention(
            _INT16_ATTENTION.pack(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                out.data_ptr(),
                q.stride(0),
                k.stride(0),
                v.stride(0),
                out.stride(0),
                q.shape[0],
                head_dim,
                heads.start,
                heads.stop,
                scale,
            )
        )
        check(failed, "int16_attention")

    def set_spin(self, microseconds: float) -> None:
        self.library.q_set_spin(int(microseconds * TICKS_PER_US))

    def rope_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor | None,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        kv_heads, dim = k_cache.shape[2], k_cache.shape[3]
        rows, half = q.shape[0], 0 if cos is None else cos.shape[1]
        assert q.shape[1] % dim == 0 and k.shape == v.shape == (rows, kv_heads * dim) and 2 * half <= dim <= 1024
        assert q.dtype is k.dtype is v.dtype and k_cache.dtype is v_cache.dtype
        assert is_supported(q) and is_supported(k) and is_supported(v)
        assert k_cache.is_contiguous() and v_cache.is_contiguous()
        assert cos is None or (cos.is_contiguous() and sin is not None and sin.is_contiguous())
        assert positions.dtype is torch.int32 and (slots is None or slots.dtype is torch.int32)
        assert all(w is None or (w.dtype is torch.float32 and w.shape[0] == dim) for w in (q_norm, k_norm))
        failed = self._rope(
            _ROPE.pack(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                _address(cos),
                _address(sin),
                _address(q_norm),
                _address(k_norm),
                positions.data_ptr(),
                _address(slots),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                q.stride(0),
                k.stride(0),
                v.stride(0),
                rows,
                q.shape[1] // dim,
                kv_heads,
                dim,
                half,
                0 if cos is None else cos.shape[0],
                k_cache.shape[0] * k_cache.shape[1],
                q.dtype is _BF16,
                k_cache.dtype is _BF16,
                eps,
            )
        )
        check(failed, "rope_cache")

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        causal: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        block_size, kv_heads, dim = k_cache.shape[1:]
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype)
        q_heads = q.shape[1] // dim if q.dim() == 2 else q.shape[1]
        assert q_heads % kv_heads == 0 and dim % 8 == 0 and out.shape == q.shape and out.dtype is q.dtype
        assert q.dim() == 2 or q.stride(1) == out.stride(1) == dim
        assert is_supported(q) and is_supported(out) and k_cache.is_contiguous() and v_cache.is_contiguous()
        assert block_tables.dtype is query_starts.dtype is context_lens.dtype is torch.int32
        assert block_tables.stride(1) == 1 and k_cache.dtype is v_cache.dtype
        failed = self._attend(
            _ATTENTION.pack(
                q.data_ptr(),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                out.data_ptr(),
                block_tables.data_ptr(),
                query_starts.data_ptr(),
                context_lens.data_ptr(),
                q.stride(0),
                out.stride(0),
                block_tables.stride(0),
                q.shape[0],
                k_cache.shape[0],
                block_tables.shape[1],
                context_lens.shape[0],
                block_size,
                q_heads,
                kv_heads,
                dim,
                window,
                causal,
                q.dtype is _BF16,
                k_cache.dtype is _BF16,
                out.dtype is _BF16,
                scale,
                softcap,
            )
        )
        check(failed, "attention")
        return out

    def decoder(self, model: DecoderModel) -> Decoder:
        return NativeDecoder(self.library, model)

    def mask(self, logits: Tensor, which: Tensor, allowed: Tensor) -> None:
        (rows, words), vocab = allowed.shape, logits.shape[1]
        assert is_supported(logits) and logits.dtype is torch.float32 and allowed.is_contiguous()
        assert which.dtype is torch.int64 and allowed.dtype is torch.int32 and len(which) == rows and 32 * words >= vocab
        self.library.q_mask(
            logits.data_ptr(), which.data_ptr(), allowed.data_ptr(), rows, vocab, logits.stride(0), words
        )

    def argmax(self, logits: Tensor, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        rows, vocab = logits.shape
        assert is_supported(logits)
        ids, nan = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.bool)
        chosen = torch.empty(rows) if logprobs else None
        self.library.q_argmax(
            logits.data_ptr(),
            logits.dtype is _BF16,
            rows,
            vocab,
            logits.stride(0),
            ids.data_ptr(),
            _address(chosen),
            nan.data_ptr(),
        )
        return ids, chosen, nan
