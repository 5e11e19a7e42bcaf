"""The private run directory of one launcher: fresh, 0700, locked while it lives, removed at its end.

A directory whose lock nobody holds belongs to a launcher that was killed: the next start sweeps it away. Never follows
links and never touches what belongs to another user.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pipeline.endpoints import check_run_dir
from pipeline.errors import StartError
from pipeline.exits import CONFIG

LOCK = "lock"


def parent_of_runs(chosen: str | None, environment: Mapping[str, str]) -> tuple[Path, str]:
    """(directory, name prefix) for run directories: --run-dir, XDG_RUNTIME_DIR, or the temporary directory."""
    if chosen is not None:
        return Path(chosen).expanduser().absolute(), "quartet-"
    runtime = environment.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime).absolute(), "quartet-"
    return Path(environment.get("TMPDIR") or "/tmp").absolute(), f"quartet-{os.getuid()}-"


class RunDirectory:
    """Owns the directory and its lock; a context manager that removes it."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """Make and lock a directory; StartError when it cannot be made or its path is too long for sockets."""
        check_run_dir(str(parent / f"{prefix}xxxxxxxx"))
        sweep(parent, prefix)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))     # 0700
        except OSError as error:
            raise StartError(CONFIG, f"No run directory can be made in {parent}: {error.strerror}.") from None
        # Locked under another name first: a sweep takes a `lock` that it can lock for that of a dead run.
        fresh = self.path / "lock.new"
        self._lock = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / LOCK)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Delete the directory with all that is in it; idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def log_directory(chosen: str | None, run: Path) -> Path:
    """Where log files go: the chosen directory, made if need be, or one inside the run directory."""
    path = run / "logs" if chosen is None else Path(chosen).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(CONFIG, f"The log directory {path} cannot be made: {error.strerror}.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise StartError(CONFIG, f"The log directory {path} cannot be written.")
    return path


def sweep(parent: Path, prefix: str) -> list[Path]:
    """Delete the run directories of dead launchers; the ones deleted."""
    swept = []
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            if path.name.startswith(prefix) and _is_ours(path) and _is_dead(path):
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path)
    return swept


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _is_dead(path: Path) -> bool:
    """Whether there is a lock file that nobody holds. Without one the directory is being made, or is not ours."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
