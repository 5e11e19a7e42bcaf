"""The compiled kernels behind the interface of `api.py`.

Owns: the ctypes signatures of the library and the checks on what goes in. A call costs 2-4 microseconds of Python:
pointers go as integers, long argument lists as one packed struct. The library has one thread team and one scratch
buffer per process, guarded by its own lock; ctypes drops the GIL around each call.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine_proc.kernels.api import Activation, Kernels, PackedLinear, WeightType, is_supported
from engine_proc.kernels.decoder import Decoder, DecoderModel
from engine_proc.kernels.native_decoder import NativeDecoder, check

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "q_set_threads": (_I, [_I]),
    "q_set_spin": (None, [ctypes.c_ulong]),
    "q_linear": (_I, [_P, _P, _I, _L, _L, _P, _I, _L]),
    "q_pack": (None, [_P, _P, _I]),
    "q_pack_int8": (None, [_P, _P, _I]),
    "q_advise_huge": (None, [_P, ctypes.c_size_t]),
    "q_rms_norm": (None, [_P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _F, _F, _I, _I]),
    "q_rope_cache": (_I, [ctypes.c_char_p]),
    "q_attention": (_I, [ctypes.c_char_p]),
    "q_decoder_step": (_I, [ctypes.c_char_p, ctypes.c_char_p]),
    "q_layer_norm": (None, [_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _F, _I]),
    "q_packed_attention": (_I, [ctypes.c_char_p]),
    "q_int16_attention": (_I, [ctypes.c_char_p]),
    "q_act_mul": (None, [_P, _P, _L, _L, _L, _L, _I, _I]),
    "q_mask": (None, [_P, _P, _P, _L, _L, _L, _L]),
    "q_argmax": (None, [_P, _I, _L, _L, _L, _P, _P, _P]),
    "q_top_k": (None, [_P, _I, _L, _L, _L, _L, _P, _P, _P, _P]),
}
TICKS_PER_US = 2500  # of the time-stamp counter, about
_PANEL = 32  # outputs of a panel (tile.h)
_KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
_ACTS: dict[str | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "tanh": 5}
_PACK_MULTIPLE = {"float32": 1, "bfloat16": 2, "int8": 64}
_WEIGHT = struct.Struct("2q5q")  # linear_weight in linear.h
_ROPE = struct.Struct("11q3q5q2q2q2d")  # rope_args in rope.h
_ATTENTION = struct.Struct("7q3q3q5q5q2d")  # attention_args in attention.h
_PACKED_ATTENTION = struct.Struct("6q4q7qd")  # packed_attention_args in packed_attention.h
_INT16_ATTENTION = struct.Struct("4q4q4qd")  # int16_attention_args in int16_attention.h
_BF16 = torch.bfloat16


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeLinear(PackedLinear):
    """A weight in panels of 32 outputs; see linear.h."""

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: HugePages,
        weight: Tensor,
        bias: Tensor | None,
        dtype: WeightType | None,
        gate: Activation | None,
        post: Activation | None,
    ) -> None:
        assert not (gate and post)
        assert weight.dim() == 2 and is_supported(weight)
        weight = weight.detach().contiguous()
        stored: str = dtype or str(weight.dtype).removeprefix("torch.")
        rows, self.k = weight.shape
        assert rows > 0 and self.k > 0 and (not gate or rows % 2 == 0)
        self.n = rows // 2 if gate else rows
        panels = -(-self.n // (_PANEL // 2 if gate else _PANEL))
        inputs = -(-self.k // _PACK_MULTIPLE[stored]) * _PACK_MULTIPLE[stored]
        inputs += inputs // 64 * 4 if stored == "int8" else 0  # a float scale per 64 bytes
        storage = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}[stored]
        self._panels = memory.empty((panels * inputs * _PANEL,), storage)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        assert self._bias is None or self._bias.shape == (rows,)
        self._struct = ctypes.create_string_buffer(
            _WEIGHT.pack(
                self._panels.data_ptr(),
                _address(self._bias),
                self.n,
                self.k,
                _KINDS[stored],
                _ACTS[gate],
                _ACTS[post],
            )
        )
        self.address = ctypes.addressof(self._struct)  # of the C struct, for the fused decoder
        self._q_linear = library.q_linear
        pack = library.q_pack_int8 if stored == "int8" else library.q_pack
        pack(self.address, weight.data_ptr(), weight.dtype is _BF16)
        self.nbytes = self._panels.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows, inputs = x.shape
        if out is None:
            out = torch.empty((rows, self.n), dtype=x.dtype)
        assert inputs == self.k and (*out.shape,) == (rows, self.n) and is_supported(x) and is_supported(out)
        failed = rows and self._q_linear(
            self.address,
            x.data_ptr(),
            x.dtype is _BF16,
            x.stride(0),
            rows,
            out.data_ptr(),
            out.dtype is _BF16,
            out.stride(0),
        )
        check(failed, "linear")
        return out


    def bind(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        """The product of float32 tensors that stay where they are."""
        assert x.dtype is out.dtype is torch.float32 and x.shape[1] == self.k
        assert (*out.shape,) == (x.shape[0], self.n) and is_supported(x) and is_supported(out)
        call, kept = self._q_linear, (self, x, out)
        arguments = (self.address, x.data_ptr(), 0, x.stride(0), x.shape[0], out.data_ptr(), 0, out.stride(0))

        def run() -> None:
            assert kept
            check(call(*arguments), "linear")

        return run


class HugePages:
    """Memory for what a step streams through, weights above all, in large pieces on huge pages.

    A packed matrix of a small model is below the size of one huge page; side by side they fill some (a tenth more
    bandwidth). A piece lives as long as a tensor cut from it.
    """

    PIECE = 64 << 20
    ALIGNMENT = 64

    def __init__(self, library: ctypes.CDLL) -> None:
        self._advise = library.q_advise_huge
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, aligned to a cache line."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > self._piece.nbytes:
            self._piece, self._used = torch.empty(max(nbytes, self.PIECE), dtype=torch.uint8), 0
            self._advise(self._piece.data_ptr(), self._piece.nbytes)
            assert self._piece.data_ptr() % self.ALIGNMENT == 0
        tensor = self._piece[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += -(-nbytes // self.ALIGNMENT) * self.ALIGNMENT
        return tensor


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
        self._norm = self.library.q_rms_norm
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
    ) -> PackedLinear:
        return NativeLinear(self.library, self._memory, weight, bias, dtype, gate, post)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, out: Tensor | None = None
    ) -> Tensor:
        return self._rms_norm(x, None, weight, eps, offset, out)

    def add_rms_norm(
        self,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        assert (*x.shape,) == (*residual.shape,) and x.dtype is residual.dtype and is_supported(x)
        return self._rms_norm(residual, x, weight, eps, offset, out)

    def _rms_norm(
        self, x: Tensor, add: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor | None
    ) -> Tensor:
        rows, dim = x.shape
        if out is None:
            out = torch.empty((rows, dim), dtype=x.dtype)
        assert (*weight.shape,) == (dim,) and (*out.shape,) == (rows, dim) and out.dtype is x.dtype
        assert is_supported(x) and is_supported(weight) and is_supported(out)
        self._norm(
            x.data_ptr(),
            0 if add is None else add.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            1,
            dim,
            x.stride(0),
            0 if add is None else add.stride(0),
            out.stride(0),
            eps,
            offset,
            x.dtype is _BF16,
            weight.dtype is _BF16,
        )
        return out

    def head_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
        rows, dim, stride = x.shape[0], weight.shape[0], x.stride(0)
        assert x.shape[1] % dim == 0 and is_supported(x) and is_supported(weight)
        here = x.data_ptr()
        self._norm(
            here,
            0,
            weight.data_ptr(),
            here,
            rows,
            x.shape[1] // dim,
            dim,
            stride,
            0,
            stride,
            eps,
            offset,
            x.dtype is _BF16,
            weight.dtype is _BF16,
        )
        return x

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
        norm_offset: float = 0.0,
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
                norm_offset,
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

    def act_mul(self, x: Tensor, act: Activation, out: Tensor | None = None) -> Tensor:
        rows, dim = x.shape[0], x.shape[1] // 2
        if out is None:
            out = torch.empty((rows, dim), dtype=x.dtype)
        assert (*out.shape,) == (rows, dim) and out.dtype is x.dtype and is_supported(x) and is_supported(out)
        self.library.q_act_mul(
            x.data_ptr(), out.data_ptr(), rows, dim, x.stride(0), out.stride(0), _ACTS[act], x.dtype is _BF16
        )
        return out

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

    def bind_argmax(self, logits: Tensor, ids: Tensor, nan: Tensor) -> Callable[[], None]:
        """argmax of float32 logits that stay where they are, into `ids` (int32) and `nan` (bool)."""
        rows, vocab = logits.shape
        assert is_supported(logits) and logits.dtype is torch.float32
        assert ids.dtype is torch.int32 and nan.dtype is torch.bool and len(ids) == len(nan) == rows
        call, kept = self.library.q_argmax, (logits, ids, nan)
        arguments = (logits.data_ptr(), 0, rows, vocab, logits.stride(0), ids.data_ptr(), 0, nan.data_ptr())

        def run() -> None:
            assert kept
            call(*arguments)

        return run

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, vocab = logits.shape
        assert is_supported(logits) and 0 < k <= vocab
        values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)
        logsumexp, nan = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
        self.library.q_top_k(
            logits.data_ptr(),
            logits.dtype is _BF16,
            rows,
            vocab,
            logits.stride(0),
            k,
            ids.data_ptr(),
            values.data_ptr(),
            logsumexp.data_ptr(),
            nan.data_ptr(),
        )
        return values, ids, logsumexp, nan
