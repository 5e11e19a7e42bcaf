"""The kernels in torch, for machines without a compiler or with a processor below AVX2.

Owns: the adapter from `reference.py` to the interface. Slow but always there; the engine's log says so at start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_proc.kernels import reference
from engine_proc.kernels.api import Activation, Kernels, PackedLinear, WeightType
from engine_proc.kernels.decoder import Decoder, DecoderModel, LayerwiseDecoder


class TorchLinear(PackedLinear):
    """A weight as it came (int8: quantised and widened again, so that answers match the compiled kernels')."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: WeightType | None,
        gate: Activation | None,
        post: Activation | None,
    ) -> None:
        self.n, self.k = weight.shape[0] // (2 if gate else 1), weight.shape[1]
        if dtype == "int8":
            weight = reference.dequantized(weight).to(weight.dtype)
        elif dtype is not None:
            weight = weight.to(getattr(torch, dtype))
        self._weight = weight.detach().clone()
        self._bias = None if bias is None else bias.detach().to(weight.dtype)
        self._gate: Activation | None = gate
        self._post: Activation | None = post
        self.nbytes = self._weight.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = F.linear(x.to(self._weight.dtype), self._weight, self._bias)
        if self._gate:
            y = reference.act_mul(y, self._gate)
        if self._post:
            y = reference.activate(y, self._post)
        return y.to(x.dtype) if out is None else out.copy_(y)


class TorchKernels(Kernels):
    """See `Kernels`."""

    native = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def describe(self) -> str:
        return f"torch (no compiled kernels: {self._reason}), {torch.get_num_threads()} threads"

    def set_num_threads(self, count: int) -> int:
        torch.set_num_threads(count)
        return torch.get_num_threads()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

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
        return TorchLinear(weight, bias, dtype, gate, post)

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
        if add is not None:
            x += add
        y = reference.layer_norm(x, weight, bias, eps)
        return y if out is None else out.copy_(y)

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
        y = reference.packed_attention(
            q, k, v, starts, head_dim, scale=scale, window=window, bias=bias, span=span
        )
        return y if out is None else out.copy_(y)

    def int16_attention(
        self, q: Tensor, k: Tensor, v: Tensor, head_dim: int, *, scale: float, heads: range, out: Tensor
    ) -> None:
        if not heads:
            return
        columns = slice(heads.start * head_dim, heads.stop * head_dim)
        starts = torch.tensor([0, q.shape[0]], dtype=torch.int32)
        out[:, columns] = reference.packed_attention(
            q[:, columns], k[:, columns], v[:, columns], starts, head_dim, scale=scale)

    def set_spin(self, microseconds: float) -> None:
        """Torch's threads have a policy of their own."""

    def rope_cache(self, *args: Any, **options: Any) -> None:
        reference.rope_cache(*args, **options)

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
        y = reference.attention(
            q.contiguous(),
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            causal=causal,
        )
        return y if out is None else out.copy_(y)

    def decoder(self, model: DecoderModel) -> Decoder:
        return LayerwiseDecoder(self, model)

    def mask(self, logits: Tensor, which: Tensor, allowed: Tensor) -> None:
        reference.mask(logits, which, allowed)

    def argmax(self, logits: Tensor, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        return reference.argmax(logits, logprobs)
