"""Finds the ranks of a split model among the processes of this machine."""
from __future__ import annotations

import os
import select
from pathlib import Path


def children(pid: int | None = None) -> list[int]:
    """Ranks that a process (by default this one) has started."""
    pid = os.getpid() if pid is None else pid
    found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
             for child in (task / "children").read_text().split()]
    return [child for child in found if b"engine_proc.parallel" in Path(f"/proc/{child}/cmdline").read_bytes()]


def assert_ended(pidfd: int) -> None:
    """Wait for a process that is not our child."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(60_000)
    os.close(pidfd)
