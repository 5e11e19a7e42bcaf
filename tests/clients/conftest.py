"""Third-party clients, unmodified, against the embedded model: each in an environment of its own.

The environments are made on first use under the tests' cache (pip and npm fetch the packages), and kept. They are behind
`-m clients`; what the test environment itself has (OpenAI's Python client) is tested in tests/e2e.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.packages import cache
from tests.serving import Server, gguf

SCRIPTS = Path(__file__).parent / "scripts"
# litellm imports mcp as soon as tools are in a request, and does not ask for it itself.
PYTHON_PACKAGES = ("langchain-openai>=1.0", "litellm>=1.80", "mcp", "instructor>=1.13")
POOLING_PACKAGES = ("cohere>=5", "langchain-openai>=1.0", "litellm>=1.80", "llama-index-embeddings-openai-like")
BARE_PACKAGES = ("langchain-cohere", "llama-index-postprocessor-cohere-rerank")    # they ask for older releases of cohere
NODE_PACKAGES = ("openai@^6", "ai@^6", "@ai-sdk/openai-compatible", "zod@^4")
INSTALL_S = 900
MODEL = "smollm2"
Run = Callable[..., Any]


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with Server("--dtype", "float32", "--kv-cache-memory-bytes", "256M", "--served-model-name", MODEL,
                "--max-model-len", "2048", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
                model=str(gguf())) as made:
        yield made
        made.assert_idle()


def _place(name: str, packages: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:10]
    return cache() / "clients" / f"{name}-{digest}"


def _made(place: Path, make: Callable[[Path], subprocess.CompletedProcess[str]]) -> Path:
    """The environment at `place`, made if need be; the test is skipped where the registry cannot be reached."""
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        done = make(place)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            pytest.skip(f"the packages of these clients could not be installed: {done.stderr.strip()[-200:]}")
        (place / "complete").touch()
    return place


def _run(command: list[str], server: Server, **environment: str) -> Any:
    """What a script printed as its last line, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={
        "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "QUARTET_URL": server.url,
        "QUARTET_MODEL": MODEL, **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(name: str, packages: tuple[str, ...], bare: tuple[str, ...] = ()) -> Path:
    """The interpreter of a virtual environment that has these packages."""
    def make(place: Path) -> subprocess.CompletedProcess[str]:
        subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True, timeout=INSTALL_S)
        pip = [str(place / "venv/bin/pip"), "install", "--quiet"]
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, timeout=INSTALL_S)
        if bare and not done.returncode:
            done = subprocess.run([*pip, "--no-deps", *bare], capture_output=True, text=True, timeout=INSTALL_S)
        return done
    return _made(_place(name, packages + bare), make) / "venv/bin/python"


def _python(name: str, packages: tuple[str, ...], bare: tuple[str, ...] = ()) -> Run:
    python = environment(name, packages, bare)
    return lambda script, server, model=MODEL: _run(
        [str(python), str(SCRIPTS / script)], server, QUARTET_MODEL=model,
        LITELLM_LOCAL_MODEL_COST_MAP="True")


@pytest.fixture(scope="session")
def python_clients() -> Run:
    return _python("python", PYTHON_PACKAGES)


@pytest.fixture(scope="session")
def pooling_clients() -> Run:
    return _python("pooling", POOLING_PACKAGES, BARE_PACKAGES)


@pytest.fixture(scope="session")
def node_clients() -> Run:
    if shutil.which("npm") is None:
        pytest.skip("npm is not on this machine")

    def make(place: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place), *NODE_PACKAGES],
                              capture_output=True, text=True, timeout=INSTALL_S)
    place = _made(_place("node", NODE_PACKAGES), make)

    def run(script: str, server: Server) -> Any:
        shutil.copy(SCRIPTS / script, place / script)        # node finds packages beside the script
        return _run(["node", str(place / script)], server)
    return run
