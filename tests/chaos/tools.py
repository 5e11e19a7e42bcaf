"""What chaos tests look at and do besides asking: labelled metrics, stopped processes, resources, raw HTTP."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline import sockets
from pipeline.beacon import BeaconWatcher
from pipeline.config import load
from pipeline.messages import Kind, Load
from tests.serving import Server, gguf
from tests.waiting import until

PIPELINE = ("tokenizer_proc", "engine_proc", "detok_proc")
STAGES = ("frontend", *PIPELINE)


def null_server(*args: str, script: str = "hash", step_s: float = 0.01) -> Server:
    """The whole pipeline around a scripted engine that takes `step_s` a step."""
    return Server("--null-engine", script, "--null-step", str(step_s), "--served-model-name", "null", *args,
                  model=str(gguf()))


def sample(server: Server, name: str, **labels: str) -> float:
    """One metric, summed over the samples that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(" ", 1)[1]) for line in str(server.get("/metrics")[1]).splitlines()
               if line.startswith((name + "{", name + " ")) and all(label in line for label in wanted))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still for the length of a block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one process holds of the operating system."""

    fds: int
    threads: int
    sockets: int
    rss_bytes: int

    @classmethod
    def of(cls, pid: int) -> Resources:
        fds = list(Path(f"/proc/{pid}/fd").iterdir())
        num_sockets = 0
        for fd in fds:
            with contextlib.suppress(OSError):
                num_sockets += os.readlink(fd).startswith("socket:")
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(len(fds), len(list(Path(f"/proc/{pid}/task").iterdir())), num_sockets,
                   pages * os.sysconf("SC_PAGE_SIZE"))


def resources(server: Server) -> dict[str, Resources]:
    """Of each stage and of the launcher; one process a stage."""
    pids = {stage: pid for stage in STAGES for pid in server.pids(stage)}
    return {name: Resources.of(pid) for name, pid in {**pids, "launcher": server.process.pid}.items()}


class Loads:
    """The load that each stage tells in its beacon, ten times a second: metrics are published once a second only."""

    def __init__(self, server: Server) -> None:
        config = load(Path(server.run_dir) / "config.json")
        self._context = sockets.context()
        self._watcher = BeaconWatcher(self._context, config, config.members())

    def __enter__(self) -> Loads:
        until(self._heard_all, 10, "a beacon of each stage")
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.close()
        self._context.destroy(linger=0)

    def _heard_all(self) -> bool:
        self._watcher.drain()
        return all((kind, 0) in self._watcher.latest for kind in list(Kind)[:4])

    def of(self, kind: Kind) -> Load:
        """What a stage said last."""
        while self._watcher.drain():
            pass
        return self._watcher.latest[kind, 0].beacon.load

    @property
    def running(self) -> int:
        return self.of(Kind.ENGINE).running

    @property
    def waiting(self) -> int:
        return self.of(Kind.ENGINE).waiting

    def until_idle(self, seconds: float = 5.0) -> None:
        """No stage holds anything, and no KV block is in use."""
        for kind in list(Kind)[:4]:
            for name in ("running", "waiting", "kv_used", "outstanding_bytes"):
                until(lambda kind=kind, name=name: getattr(self.of(kind), name) == 0, seconds, f"{kind.name} {name} 0")


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    """A TCP connection to the server, with a small window where it is asked for."""
    parts = urlsplit(server.url)
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(60)
    made.connect((parts.hostname, parts.port))
    return made


def post(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """The bytes of a POST with a JSON body."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content
