"""Children of the launcher: a child that is to give way does, also where the kernel shares processors out by session."""
from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.procs import Child


def test_a_nice_child_gives_way_as_a_process_and_as_a_session(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"], environment=dict(os.environ),
                  output=tmp_path / "out", nice=7)
    try:
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(19, os.nice(0) + 7)
        group = Path(f"/proc/{child.pid}/autogroup")
        shown = group.read_text() if group.exists() else ""
        assert not shown or shown.endswith(" nice 7\n")          # a kernel without such groups shows nothing
    finally:
        child.destroy()
