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
    compiled libraries are kept; by default the best that compiles, the system's and
    build.cache_dir(). Call it once per process: each library has threads of its own. Where the result is native, give
    torch one thread (torch.set_num_threads(1)): two teams that spin for the same processors slow each other threefold.
    """
    if level == "torch":
        return TorchKernels("asked for")
    reason = "this processor has no AVX2"
    for candidate in [level] if level else isa.runnable():
        try:
            return NativeKernels(build.library(candidate, compiler=compiler, directory=directory), candidate)
        except (build.KernelBuildError, OSError) as error:  # an old compiler may still manage the next level
            reason = str(error)
            logger.warning("no CPU kernels for %s: %s", candidate, error)
    return TorchKernels(reason)
