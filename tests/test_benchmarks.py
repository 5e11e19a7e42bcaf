"""Every benchmark that is on the performance page starts: what one shares with another must not break it unseen."""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"
IMPORTS_A_PEER = {"speech_peer"}         # run by speech.py in the peer's own environment
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - {"__init__"} - IMPORTS_A_PEER)


@pytest.mark.parametrize("name", NAMES)
def test_it_tells_how_it_is_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0 and f"benchmarks.{name}" in capsys.readouterr().out
