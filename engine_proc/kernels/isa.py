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
    return frozenset(_field("flags", cpuinfo).split())


def _field(name: str, cpuinfo: Path) -> str:
    """Of the first processor."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def runnable(flags: frozenset[str] | None = None, machine: str | None = None) -> list[str]:
    """The levels that a processor with these flags runs, best first."""
    if (machine or platform.machine()) not in ("x86_64", "AMD64"):
        return []
    present = cpu_flags() if flags is None else flags
    return [level for level, needed in LEVELS.items() if present.issuperset(needed)]


def tuning(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Options that depend on the maker. AMD's own prefetcher follows a stream of weights best undisturbed (measured on
    Zen 4); on Intel's (Ice Lake) asking 4 KB ahead gave 10 to 40 % more bandwidth."""
    return ["-DSTREAM_AHEAD=0"] if _field("vendor_id", cpuinfo) == "AuthenticAMD" else []


def compiler_flags(level: str) -> list[str]:
    """The compiler's target options for a level."""
    if level == EMULATED:
        return [*compiler_flags("avx512"), "-DQUARTET_EMULATE_BF16_DOT"]
    return [f"-m{flag.replace('_', '')}" for flag in LEVELS[level]]
