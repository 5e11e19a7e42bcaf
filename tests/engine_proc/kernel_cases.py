"""Levels, inputs and tolerances that the kernel tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from engine_proc.kernels import Kernels, build, isa, load

DTYPES = [torch.float32, torch.bfloat16]


def _native_levels() -> list[str]:
    """The best level this processor runs, AVX2, and the bfloat16 dot product emulated where AVX-512 carries it."""
    runs = [level for level, needed in isa.LEVELS.items() if isa.cpu_flags().issuperset(needed)]
    if isa.best_level() is None or build.find_compiler() is None:
        return []
    return list(dict.fromkeys([runs[0], "avx2"] + [isa.EMULATED] * ("avx512" in runs)))


NATIVE = _native_levels()


def load_level(level: str) -> Kernels:
    kernels = load(level=level)
    assert kernels.native == (level != "torch"), kernels.describe()
    return kernels


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(actual: Tensor, exact: Tensor, *, loose: bool = False, absolute: float = 0.0) -> None:
    """`actual` is `exact` (usually float64) up to its own rounding and float32 sums; `loose` allows a second rounding,
    `absolute` what cancellation near zero may leave."""
    unit = 2.0**-8 if actual.dtype == torch.bfloat16 or loose else 2.0**-16
    tolerance = unit * (1 + (2 if loose else 0)) * (exact.abs() + exact.abs().mean()) + absolute
    worst = ((actual.double() - exact).abs() - tolerance).max() if actual.numel() else 0.0
    assert not actual.isnan().any() and worst <= 0, f"off by {worst:.3g} beyond the tolerance"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())
