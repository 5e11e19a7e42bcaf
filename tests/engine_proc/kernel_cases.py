"""Levels, inputs and tolerances that the kernel tests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from engine_proc.kernels import Kernels, build, isa, load

DTYPES = [torch.float32, torch.bfloat16]


Setup = tuple[str, int]  # instruction-set level, threads


def _native() -> list[Setup]:
    """The best level this processor runs, alone and with company, and AVX2."""
    levels = isa.runnable()
    if not levels or build.find_compiler() is None:
        return []
    return [(levels[0], 1), (levels[0], 2), ("avx2", 2)]


NATIVE = _native()
ALL: list[Setup] = [*NATIVE, ("torch", 1)]
# For what multiplies bfloat16: the dot product of newer processors, emulated where AVX-512 carries it.
EMULATED: list[Setup] = [(isa.EMULATED, 2)] if NATIVE and "avx512f" in isa.cpu_flags() else []


@functools.cache
def loaded(level: str) -> Kernels:
    kernels = load(level=level)
    assert kernels.native == (level != "torch"), kernels.describe()
    return kernels


def prepared(setup: Setup) -> Iterator[Kernels]:
    """The kernels of a setup; torch's threads rest meanwhile, or both teams would spin for the same processors."""
    level, threads = setup
    kernels, before = loaded(level), torch.get_num_threads()
    torch.set_num_threads(1)
    assert not kernels.native or kernels.set_num_threads(threads) == threads
    yield kernels
    torch.set_num_threads(before)


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
