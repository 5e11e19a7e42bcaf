"""How the kernels come into being: the choice of a level, the cache of compiled libraries, life without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine_proc.kernels import build, isa, load
from tests.engine_proc.kernel_cases import NATIVE

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
CC = build.find_compiler()
needs_compiler = pytest.mark.skipif(not NATIVE, reason="no compiler or no AVX2 here")


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (AVX512 | {"avx512_bf16", "avx512_vnni"}, "avx512bf16"),
        (AVX512 | {"avx512_vnni"}, "avx512vnni"),
        (AVX512, "avx512"),
        (AVX512 - {"avx512vl"}, "avx2"),
        (AVX2, "avx2"),
        ({"avx2"}, None),
        (set(), None),
    ],
)
def test_the_best_level_is_the_first_whose_flags_are_all_there(flags: set[str], level: str | None) -> None:
    assert next(iter(isa.runnable(frozenset(flags), "x86_64")), None) == level
    assert isa.runnable(frozenset(flags), "aarch64") == []


@needs_compiler
def test_a_compiler_too_old_for_the_best_level_serves_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "cc"
    old.write_text(f'#!/bin/sh\ncase "$*" in *mavx512bf16*) echo "unknown option" >&2; exit 1;; esac\nexec {CC} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setattr(isa, "runnable", lambda: ["avx512bf16", "avx2"])
    kernels = load(compiler=str(old), directory=tmp_path / "cache")
    assert kernels.native and "avx2" in kernels.describe()


def test_the_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fma avx2 f16c\n\nprocessor\t: 1\nflags\t: x\n")
    assert isa.cpu_flags(cpuinfo) == AVX2 and isa.tuning(cpuinfo) == ["-DSTREAM_AHEAD=0"]
    assert isa.cpu_flags(tmp_path / "none") == frozenset() and isa.tuning(tmp_path / "none") == []


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernels = load(level="avx2", directory=tmp_path)
    assert not kernels.native and "no C compiler" in kernels.describe()
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    torch.testing.assert_close(kernels.linear(weight)(x), x @ weight.T)


def test_a_compiler_that_fails_is_reported_and_torch_serves(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cc1: out of luck" >&2\nexit 1\n')
    broken.chmod(0o755)
    kernels = load(level="avx2", compiler=str(broken), directory=tmp_path / "cache")
    assert not kernels.native and "cc1: out of luck" in kernels.describe()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(build.KernelBuildError, match="does not run"):
        build.library("avx2", compiler=str(tmp_path / "nothing"), directory=tmp_path)


@needs_compiler
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(build.KernelBuildError, match="writable by others"):
        build.library("avx2", directory=tmp_path)


@needs_compiler
def test_the_library_is_compiled_once_and_privately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "sources", lambda: [build._SOURCES / "pool.c"])
    directory = tmp_path / "deep" / "kernels"
    path = build.library("avx2", directory=directory)
    before = path.stat()
    assert (directory.stat().st_mode & 0o777, before.st_mode & 0o777) == (0o700, 0o700)
    assert build.library("avx2", directory=directory) == path and path.stat().st_ino == before.st_ino
    assert list(directory.iterdir()) == [path]
    monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-DOTHER"))
    assert build.library("avx2", directory=directory) != path


@needs_compiler
def test_the_best_level_for_bfloat16_compiles_even_where_it_cannot_run(tmp_path: Path) -> None:
    source = build._SOURCES / "tile.c"
    command = [str(CC), "-O1", "-Wall", "-Werror", "-c", str(source), "-o", str(tmp_path / "tile.o")]
    subprocess.run([*command, *isa.compiler_flags("avx512bf16")], check=True, timeout=60)


@needs_compiler
def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path))
    assert build.cache_dir() == tmp_path / "kernels"
    monkeypatch.delenv("QUARTET_CACHE")
    assert build.cache_dir() == Path.home() / ".cache" / "quartet" / "kernels"


@needs_compiler
def test_threads_can_be_changed_and_forked_children_start_afresh() -> None:
    script = """
import os, torch
from engine_proc.kernels import load
kernels = load()
assert [kernels.set_num_threads(n) for n in (3, 1, 2, 0)] == [3, 1, 2, 1]
kernels.set_num_threads(2)
x, w = torch.randn(40, 64), torch.ones(64)
expected = kernels.layer_norm(x, w, None, 1e-6)
pid = os.fork()
assert torch.equal(kernels.layer_norm(x, w, None, 1e-6), expected)
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print("fine")
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=root, env=dict(os.environ)
    )
    assert result.stdout == "fine\n", result.stderr
