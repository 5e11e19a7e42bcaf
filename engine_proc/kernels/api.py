"""The CPU kernels as the engine sees them: one interface, two implementations.

Owns: the contract of each kernel (shapes, types, what is written) and nothing else. `native.py` calls the compiled
library, `fallback.py` is plain torch; `load()` in the package picks one. Tensors are on the CPU, float32 or bfloat16,
contiguous in their last dimension; index tensors are int32. Results are computed in float32 and rounded once. A row's
result never depends on the other rows of the call (native: bit for bit). Arguments are checked by `assert`: callers are
our own layers. An object is for one thread at a time unless said otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine_proc.kernels.decoder import Decoder, DecoderModel

WeightType = Literal["bfloat16", "float32", "int8"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "tanh"]  # gelu: the exact one, by the error function


class PackedLinear(ABC):
    """A linear layer whose weight was packed once; callable. Built by `Kernels.linear`.

    `n` outputs (of a gated layer: of each half), `k` inputs, `nbytes` of packed weight.
    """

    n: int
    k: int
    nbytes: int

    @abstractmethod
    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, k] -> [T, n], written into `out` (float32 or bfloat16) or a new tensor of x's type."""


class Kernels(ABC):
    """Every kernel of the CPU path."""

    native: bool

    @abstractmethod
    def describe(self) -> str:
        """One line for the log: instruction set and threads, or why torch is used."""

    @abstractmethod
    def set_num_threads(self, count: int) -> int:
        """Sets how many threads a kernel uses, the caller's included; returns the number reached."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on huge pages where there are some: for the KV cache."""

    @abstractmethod
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
        """Packs weight [N, K] (float32 or bfloat16; copied) with an optional bias [N].

        `dtype` is the stored type, by default the weight's; int8 has one scale per output and 64 inputs
        and quantises activations per row and 32 inputs. With `gate` the weight is [2n, K], n gate rows and then n up
        rows, and the layer returns act(gate) * up, [T, n]; with `post` instead it returns post(outputs). `light`: where it
        pays, keep bfloat16 weights a second time in three quarters of their bytes, for steps of a few rows; the same bits.
        """

    @abstractmethod
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
        """LayerNorm of x [T, D]; weight, bias float32 [D]. With `add` x += add in place first. `out` may be x."""

    @abstractmethod
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
        """Attention to both sides over sequences that lie one behind another; float32 throughout.

        q [T, H * head_dim], k and v [T, Hkv * head_dim]; sequence s has the rows starts[s] to starts[s + 1] (int32
        [S + 1]). `window` > 0: a token sees so many to either side. `bias` [H, 2 * span + 15] is added to the scores by
        key - query position + span - 1, for sequences of up to `span`; what lies behind 2 * span - 1 is padding.
        """

    @abstractmethod
    def int16_attention(
        self, q: Tensor, k: Tensor, v: Tensor, head_dim: int, *, scale: float, heads: range, out: Tensor
    ) -> None:
        """Attention of one sequence to all of itself, on the calling thread alone, for `heads` only.

        q, k, v [T, H * head_dim] float32, head_dim a multiple of 16 up to 128. The products are of 16-bit integers (12
        to 15 bits and a sign): about 1e-3 of relative error. May be called by several threads at once.
        """

    @abstractmethod
    def set_spin(self, microseconds: float) -> None:
        """How long a thread without work spins before it lets others run: less is kinder to other processes."""

    @abstractmethod
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
        """Rotates q [T, Hq * D] and k [T, Hkv * D] in place and writes k and v into the paged cache.

        cos, sin: float32 [positions, R / 2], the first R of the D elements rotate in the GPT-NeoX pairing (i with
        i + R / 2); None: no rotation. positions int32 [T]. Caches [blocks, block_size, Hkv, D]; slots int32 [T] is
        block * block_size + offset, negative for a row that is not cached, None when none is. q_norm, k_norm
        float32 [D]: RMSNorm of each head before the rotation.
        """

    @abstractmethod
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
        """Paged attention of packed query rows q [T, Hq, D] (or [T, Hq * D]); returns the shape of q.

        Sequence s has the query rows query_starts[s] to query_starts[s + 1] (int32 [S + 1]), which are the last tokens
        of its context_lens[s] (int32 [S], new tokens included, already in the cache). block_tables int32
        [S, max_blocks]. `window` > 0: a token sees itself and the window - 1 before it. `softcap` > 0:
        softcap * tanh(score / softcap). Slots outside what a row may see are never read.
        """

    @abstractmethod
    def decoder(self, model: DecoderModel) -> Decoder:
        """A step of a whole dense decoder as one call (native) or as a row of kernels; its linear layers are ours."""

    @abstractmethod
    def mask(self, logits: Tensor, which: Tensor, allowed: Tensor) -> None:
        """Rows `which` (int64 [n], each once) of logits (float32 [T, V], in place) become minus infinity where the bits
        of `allowed` (int32 [n, at least V / 32], lowest first) are clear."""

    @abstractmethod
    def argmax(self, logits: Tensor, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of logits [T, V]: the ids (int32 [T], lowest of equals), their log-probabilities (float32 [T]) if asked for,
        and whether the row holds a NaN (bool [T]; its id is 0)."""


def is_supported(tensor: Tensor) -> bool:
    """Whether this is a CPU tensor of a type the kernels read, contiguous in the last dimension."""
    return (
        tensor.is_cpu
        and (tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16)
        and tensor.stride()[-1] == 1
    )
