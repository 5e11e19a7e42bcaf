"""The seam between the runner and a device: where tensors live, how results come back, how much memory there is.

One object, chosen at load; nothing else in the engine asks what the device is. On the CPU a launch is the computation
itself, so `depth` is 0 and `fetch` has nothing to wait for. Engine process.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from pipeline.errors import StartError
from pipeline.exits import CONFIG

T = TypeVar("T", covariant=True)
R = TypeVar("R")


class Device(Protocol):
    """Where a model runs."""

    name: str
    depth: int                          # plans that may be in flight while another is launched
    torch_device: torch.device

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array's values on the device. The array may be reused once the step is collected."""

    def submit(self, work: Callable[[], R]) -> Work[R]:
        """Have the device do `work`, after what was submitted before. It may raise here or where it is waited for."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Start to bring results to the host."""

    def available_bytes(self) -> int:
        """Memory that could still be taken."""

    def default_dtype(self, native: torch.dtype) -> torch.dtype:
        """What `dtype: auto` means for a checkpoint stored as `native`."""


class Work(Protocol[T]):
    """Something that the device does, or has done."""

    def wait(self) -> T: ...


class Fetch(Protocol):
    """Results on their way to the host."""

    def wait(self) -> list[np.ndarray]: ...


class Cpu:
    """The host itself."""

    name = "cpu"
    depth = 0
    torch_device = torch.device("cpu")

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def submit(self, work: Callable[[], R]) -> Work[R]:
        return _Done(work())

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        return _Here([tensor.numpy() for tensor in tensors])

    def available_bytes(self) -> int:
        return available_memory()

    def default_dtype(self, native: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if native in (torch.bfloat16, torch.float16) else torch.float32


class _Done(Generic[R]):
    """Work that was done where it was submitted."""

    __slots__ = ("_value",)

    def __init__(self, value: R) -> None:
        self._value = value

    def wait(self) -> R:
        return self._value


class _Here:
    """Results that are there already."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays

    def wait(self) -> list[np.ndarray]:
        return self._arrays


def choose(name: str, rank: int = 0) -> Device:
    """The device of a configuration (auto, cpu or cuda) for this rank of the model."""
    if name == "cuda":
        raise StartError(CONFIG, "This build of the engine does not run on CUDA; use --device cpu.")
    return Cpu()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could still allocate: the system's estimate, cut by the limits of its control groups."""
    available = 2**33
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, usage in (("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
                         ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes")):
        most, used = _read(root / limit).strip(), _read(root / usage).strip()
        if most.isdigit() and used.isdigit():
            available = min(available, max(0, int(most) - int(used)))
    return available


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, cut by the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return max(1, cores)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
