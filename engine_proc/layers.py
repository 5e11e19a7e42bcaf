"""The arithmetic of a decoder behind one small object: linear layers, norms, rotation, activation.

`TorchOps` is the reference: plain torch, correct on every device. The CPU kernels and CUDA replace it by an object with
the same methods, chosen once at load; the decoder never asks which. Activations are [tokens, width], in the model's
dtype; norm weights and rope tables are float32. Engine process.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class Linear:
    """A packed linear layer. `weight` is [out, in] here; kernels keep what layout they like."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(slots=True)
class Norm:
    """RMSNorm, or LayerNorm where `kind` is "layer". The offset that Gemma adds is in the weight already."""

    weight: torch.Tensor                # float32 [width]
    bias: torch.Tensor | None
    eps: float
    kind: str = "rms"


@dataclass(slots=True)
class RopeTable:
    """cos and sin, float32 [positions, dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


class Ops(Protocol):
    """What a decoder computes with. `pack*` run once at load and may keep or drop the tensors given."""

    name: str

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear: ...

    def pack_gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> Linear:
        """`weight`: [2 * n, in], the gates above the ups."""

    def pack_summed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """A layer whose products are added up over the ranks of a split model."""

    def pack_head(self, weight: torch.Tensor) -> Linear:
        """The vocabulary's matrix, or this rank's rows of it."""

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, [T, hidden]."""

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor: ...

    def gated(self, x: torch.Tensor, layer: Linear, activation: str) -> torch.Tensor:
        """act(gate) * up: [T, n]."""

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor: ...

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Over the last dimension; a new tensor of x's dtype."""

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm | None) -> torch.Tensor:
        """x += scale * delta in place, then the norm of x (x itself without one)."""

    def rotate(self, heads: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> None:
        """Rotate the leading dimensions of each head in place; heads: [T, H, D] with any stride over T."""


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class TorchOps:
    """The reference. Norms and rotations are computed in float32 and rounded once."""

    name = "torch"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(weight, bias)

    def pack_gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> Linear:
        return Linear(weight, bias)

    def pack_summed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return self.pack(weight, bias)

    def pack_head(self, weight: torch.Tensor) -> Linear:
        return self.pack(weight, None)

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return table[ids]

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def gated(self, x: torch.Tensor, layer: Linear, activation: str) -> torch.Tensor:
        gate, up = F.linear(x, layer.weight, layer.bias).chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        return ACTIVATIONS[activation](x)

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        shape = norm.weight.shape
        if norm.kind == "layer":
            return F.layer_norm(x.float(), shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
        return F.rms_norm(x.float(), shape, norm.weight, norm.eps).to(x.dtype)

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm | None) -> torch.Tensor:
        x.add_(delta, alpha=scale)
        return x if norm is None else self.norm(x, norm)

    def rotate(self, heads: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> None:
        cos = table.cos[positions].unsqueeze(1)                # [T, 1, dim / 2]
        sin = table.sin[positions].unsqueeze(1)
        half = cos.shape[-1]
        first, second = heads[..., :half], heads[..., half:2 * half]
        a, b = first.float(), second.float()
        rotated = a * cos - b * sin
        second.copy_(b * cos + a * sin)
        first.copy_(rotated)
