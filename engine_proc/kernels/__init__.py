"""CPU kernels of the engine: compiled from C at first use, plain torch where that is impossible.

Owns: the choice between the two. `load()` compiles for the best instruction set of this processor (seconds, once per
machine; see build.py) and never fails: without a compiler, or on an unknown processor, the torch implementation with
the same interface (api.py) serves.
"""

from __future__ import annotations

import logging
from pathlib import Path

from engine_proc.kernels import build, isa
from engine_proc.kernels.api import Activation, Kernels, PackedLinear, WeightType
from engine_proc.kernels.decoder import Decoder, DecoderLayer, DecoderModel, StepInput
from engine_proc.kernels.fallback import TorchKernels
from engine_proc.kernels.native import NativeKernels

__all__ = [
    "Activation",
    "Decoder",
    "DecoderLayer",
    "DecoderModel",
    "Kernels",
    "PackedLinear",
    "StepInput",
    "WeightType",
    "load",
]

logger = logging.getLogger(__name__)


def load(*, level: str | None = None, compiler: str | None = None, directory: Path | None = None) -> Kernels:
    """The kernels for this machine.

    `level` forces an instruction set (isa.LEVELS; "torch" for the fallback), `compiler` a C compiler, `directory` where
    compiled libraries are kept; by default the best, the system's and build.cache_dir(). Call it once per process: each
    library that is loaded has threads of its own.
    """
    level = level or isa.best_level()
    if level is None:
        return TorchKernels("this processor has no AVX2")
    if level == "torch":
        return TorchKernels("asked for")
    try:
        return NativeKernels(build.library(level, compiler=compiler, directory=directory), level)
    except (build.KernelBuildError, OSError) as error:
        logger.warning("the CPU kernels are not available, torch is used instead: %s", error)
        return TorchKernels(str(error))
