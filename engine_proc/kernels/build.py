"""Compiles the C sources into one shared library, once per machine.

Owns: the cache directory of compiled kernels ($QUARTET_CACHE or ~/.cache/quartet, folder kernels/). The file name is a
digest of the sources, the compiler, its options and the processor's flags, so a stale library is never loaded; it
appears by an atomic rename, so engines that start together do not disturb each other. Directory and file must belong to
this user and be writable by nobody else: the library is code that we are about to run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine_proc.kernels import isa

_SOURCES = Path(__file__).parent
# -O3 takes twice the time of -O2 for this file and makes it no faster: what must be unrolled says so.
_MODEST = ("attention_core.c",)
_OPTIONS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled or stored here; the message is one sentence that says why."""


def find_compiler() -> str | None:
    """Path of the C compiler: $CC, gcc, cc or clang, the first that exists."""
    names = [os.environ.get("CC") or "gcc", "gcc", "cc", "clang"]
    return next((path for path in map(shutil.which, names) if path), None)


def cache_dir() -> Path:
    """Where compiled kernels live."""
    root = os.environ.get("QUARTET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "quartet") / "kernels"


def library(level: str, *, compiler: str | None = None, directory: Path | None = None) -> Path:
    """The shared library for an instruction-set level, compiled first if this machine has not done so yet.

    Raises KernelBuildError without a compiler, when it fails, or when the cache cannot be trusted.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise KernelBuildError("no C compiler found (looked for $CC, gcc, cc, clang)")
    directory = directory or cache_dir()
    options = [*_OPTIONS, *isa.compiler_flags(level), *isa.tuning()]
    target = directory / f"quartet-{level}-{_digest(compiler, options)}.so"
    try:
        _require_private(directory)
        if not target.exists():
            _compile(compiler, options, target)
        _check_owner(target)
    except OSError as error:
        raise KernelBuildError(f"cannot use the kernel cache {directory}: {error}") from error
    return target


def sources() -> list[Path]:
    """The C files, in a fixed order."""
    return sorted(_SOURCES.glob("*.c"))


def _digest(compiler: str, options: Sequence[str]) -> str:
    hasher = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.[ch]")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"the C compiler {compiler} does not run: {error}") from error
    hasher.update(b"\0".join([compiler.encode(), version, " ".join([*options, *_MODEST]).encode()]))
    hasher.update(" ".join(sorted(isa.cpu_flags())).encode())
    return hasher.hexdigest()[:24]


def _require_private(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(directory)


def _check_owner(path: Path) -> None:
    info = path.stat()
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise KernelBuildError(f"{path} belongs to another user or is writable by others")


def _compile(compiler: str, options: Sequence[str], target: Path) -> None:
    with _scratch_folder(target.parent) as folder:
        objects = [folder / f"{source.stem}.o" for source in sources()]
        commands = [
            [compiler, *options, *(("-O2",) if source.name in _MODEST else ()), "-c", str(source), "-o", str(object_)]
            for source, object_ in zip(sources(), objects, strict=True)
        ]
        _run_together(commands)
        result = folder / "quartet.so"
        _run_together([[compiler, "-shared", "-pthread", "-o", str(result), *map(str, objects), "-lm"]])
        result.chmod(0o700)
        result.replace(target)


def _run_together(commands: list[list[str]]) -> None:
    """Runs commands, as many at a time as there are processors; raises on the first that fails."""
    width = max(1, min(len(commands), len(os.sched_getaffinity(0))))
    running: list[tuple[subprocess.Popen[bytes], list[str]]] = []
    waiting = list(reversed(commands))
    try:
        while running or waiting:
            while waiting and len(running) < width:
                command = waiting.pop()
                running.append((subprocess.Popen(command, stderr=subprocess.PIPE), command))
            process, command = running[0]
            _, errors = process.communicate(timeout=180)
            if process.returncode:
                first = errors.decode(errors="replace").strip().splitlines()
                raise KernelBuildError(f"{command[0]} failed: {first[0] if first else process.returncode}")
            running.pop(0)
    except subprocess.TimeoutExpired as error:
        raise KernelBuildError(f"{error.cmd[0]} took more than {error.timeout} s") from error
    except OSError as error:
        raise KernelBuildError(f"the C compiler does not run: {error}") from error
    finally:
        for process, _ in running:
            process.kill()
            process.communicate()


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
