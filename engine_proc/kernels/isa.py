"""Which instruction set the kernels are compiled for.

Owns: reading the processor's flags and the compiler flags of each level. Runs in the engine process at start; it never
compiles or loads anything. Levels, best first: avx512bf16 (bfloat16 dot products: Zen 4, Sapphire Rapids), avx512 (with
VNNI where present), avx2. A processor below avx2, or another architecture, has no level: the torch path serves it.
"""

from __future__ import annotations

import platform
from pathlib import Path

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
LEVELS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (*_AVX512, "avx512_bf16", "avx512_vnni"),
    "avx512vnni": (*_AVX512, "avx512_vnni"),
    "avx512": _AVX512,
    "avx2": _AVX2,
}
# For tests on a processor without the instruction: the data flow of avx512bf16, its one instruction spelled out.
EMULATED = "avx512bf16-emulated"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty when they cannot be read."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def best_level(flags: frozenset[str] | None = None, machine: str | None = None) -> str | None:
    """The best level that a processor with these flags runs, or None."""
    if (machine or platform.machine()) not in ("x86_64", "AMD64"):
        return None
    present = cpu_flags() if flags is None else flags
    return next((level for level, needed in LEVELS.items() if present.issuperset(needed)), None)


def compiler_flags(level: str) -> list[str]:
    """The compiler's target options for a level."""
    if level == EMULATED:
        return [*compiler_flags("avx512"), "-DQUARTET_EMULATE_BF16_DOT"]
    return [f"-m{flag.replace('_', '')}" for flag in LEVELS[level]]
