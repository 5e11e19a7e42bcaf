"""The best token of each row without its logits: the compiled search of best.c.

Owns: the int8 copy of a vocabulary's matrix and the bounds that make a search through it exact. The copy takes half the
bytes of a bfloat16 matrix and is kept for matrices that are not int8 themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from engine_proc.kernels.native_decoder import check
from engine_proc.kernels.native_linear import HugePages, NativeLinear

MOST_BOUND = 1e18  # with activations as long as best.c takes them, nothing leaves float32's range


class BestToken:
    """The search in `packed`, the matrix [vocab, hidden] whose plain form is `weight`."""

    def __init__(self, library: ctypes.CDLL, memory: HugePages, packed: NativeLinear, weight: Tensor) -> None:
        assert weight.shape == (packed.n, packed.k)
        self._library, self._packed = library, packed
        self._rough: NativeLinear | None = None
        self._bounds = torch.empty(packed.n)
        if packed.kind != "int8":
            rough = NativeLinear(library, memory, weight, None, "int8", None, None, self._bounds)
            if self._bounds.max() < MOST_BOUND:  # not so where the matrix holds what is no number, or far too large
                self._rough = rough

    def bind(self, x: Tensor, ids: Tensor, values: Tensor) -> Callable[[], None]:
        """For each row of float32 x [R, hidden] its best token, int32, and that one's logit, NaN where the row holds one."""
        rows, width = x.shape
        assert x.dtype is values.dtype is torch.float32 and ids.dtype is torch.int32 and width == self._packed.k
        assert x.is_contiguous() and ids.is_contiguous() and values.is_contiguous() and len(ids) == len(values) == rows
        call, kept = self._library.q_best, (self, x, ids, values)
        arguments = (
            self._packed.address,
            self._rough.address if self._rough is not None else 0,
            self._bounds.data_ptr(),
            x.data_ptr(),
            rows,
            ids.data_ptr(),
            values.data_ptr(),
        )

        def run() -> None:
            assert kept
            check(call(*arguments), "best token")

        return run
