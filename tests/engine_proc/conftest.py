"""Fixtures of the engine's tests: the embedded default model, prepared as the launcher prepares it."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint import cache_root
from tests.serving import gguf


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The prepared directory of SmolLM2-135M-Instruct, in the cache that the launcher uses too."""
    done = subprocess.run(
        [sys.executable, "-m", "engine_proc.prepare", "--source", str(gguf()), "--out-root", str(cache_root())],
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])
