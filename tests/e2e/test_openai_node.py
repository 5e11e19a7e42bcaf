"""The openai package of Node, unmodified; the package is fetched once by npm (tests/packages.py)."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packages import unpacked
from tests.serving import Server

VERSION = "6.49.0"


def test_it_answers_streams_calls_fails_and_aborts(smollm: Server) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on this machine")
    package = unpacked("openai", VERSION) / "index.mjs"
    done = subprocess.run([node, str(Path(__file__).with_name("quick.mjs"))], capture_output=True, text=True, timeout=300,
                          env={"PATH": os.environ["PATH"], "OPENAI_PACKAGE": package.as_uri(), "QUARTET_URL": smollm.url})
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert "Paris" in found["text"] and found["helped"] == found["text"]
    assert found["helpedUsage"]["completion_tokens"] == found["usage"]["completion_tokens"] > 0
    [call] = found["calls"]
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert found["error"] == ["BadRequestError", 400, "temperature", "invalid_value"] and found["seen"] >= 3
