"""Linear layers packed for the compiled library, and the memory that they lie in.

Owns: the size of a packed weight and its C description (linear_weight in linear.h).
"""

from __future__ import annotations

import ctypes
import math
import struct

import torch
from torch import Tensor

from engine_proc.kernels.api import Activation, PackedLinear, WeightType, is_supported
from engine_proc.kernels.native_decoder import check

ACTS: dict[str | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "tanh": 5}
_PANEL = 32  # outputs of a panel (tile.h)
_KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
_PACK_MULTIPLE = {"float32": 1, "bfloat16": 2, "int8": 64}
WORTH = 0.85  # of the bytes: a light copy that is larger is not read faster by enough
_WEIGHT = struct.Struct("2q5q2q")  # linear_weight in linear.h


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
        bounds: Tensor | None = None,
        light: bool = False,
    ) -> None:
        """`bounds` [rows] of an int8 layer without a gate are filled; see best.c. `light`: also the copy of light.c."""
        assert not (gate and post) and (bounds is None or (dtype == "int8" and not gate))
        assert weight.dim() == 2 and is_supported(weight)
        weight = weight.detach().contiguous()
        self.kind = stored = dtype or str(weight.dtype).removeprefix("torch.")
        rows, self.k = weight.shape
        assert rows > 0 and self.k > 0 and (not gate or rows % 2 == 0)
        self.n = rows // 2 if gate else rows
        panels = -(-self.n // (_PANEL // 2 if gate else _PANEL))
        inputs = -(-self.k // _PACK_MULTIPLE[stored]) * _PACK_MULTIPLE[stored]
        inputs += inputs // 64 * 2 if stored == "int8" else 0  # a bfloat16 scale per 64 bytes
        storage = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}[stored]
        self._panels = memory.empty((panels * inputs * _PANEL,), storage)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        assert self._bias is None or self._bias.shape == (rows,)
        fields = (
            self._panels.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            self.n,
            self.k,
            _KINDS[stored],
            ACTS[gate],
            ACTS[post],
        )
        self._struct = ctypes.create_string_buffer(_WEIGHT.pack(*fields, 0, 0))
        self.address = ctypes.addressof(self._struct)  # of the C struct, for the fused decoder
        self._q_linear = library.q_linear
        source = (self.address, weight.data_ptr(), weight.dtype is torch.bfloat16)
        if stored == "int8":
            library.q_pack_int8(*source, 0 if bounds is None else bounds.data_ptr())
        else:
            library.q_pack(*source)
        self.nbytes = self._panels.nbytes
        if light and stored == "bfloat16":
            self._make_light(library, memory, fields, panels)

    def _make_light(self, library: ctypes.CDLL, memory: HugePages, fields: tuple[int, ...], panels: int) -> None:
        """The copy in fewer bytes of light.c, where the processor and the weights are such that it pays."""
        sizes = torch.zeros(panels, dtype=torch.int64)
        if not library.q_count_light(self.address, sizes.data_ptr()) or sizes.sum() > WORTH * self._panels.nbytes:
            return
        self._light_at = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
        self._light = memory.empty((int(sizes.sum()),), torch.uint8)
        _WEIGHT.pack_into(self._struct, 0, *fields, self._light.data_ptr(), self._light_at.data_ptr())
        library.q_pack_light(self.address, self._light.data_ptr())

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows, inputs = x.shape
        if out is None:
            out = torch.empty((rows, self.n), dtype=x.dtype)
        assert inputs == self.k and (*out.shape,) == (rows, self.n) and is_supported(x) and is_supported(out)
        failed = rows and self._q_linear(
            self.address,
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            x.stride(0),
            rows,
            out.data_ptr(),
            out.dtype is torch.bfloat16,
            out.stride(0),
        )
        check(failed, "linear")
        return out


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
