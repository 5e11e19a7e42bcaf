"""Servers that chaos tests may hurt."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import Server, gguf


@pytest.fixture(scope="module")
def slow_null() -> Iterator[Server]:
    """The null engine at 10 ms a step, so that there is time to hurt somebody."""
    with Server("--null-engine", "hash", "--null-step", "0.01", "--served-model-name", "null", "--crash-limit", "1000",
                model=str(gguf())) as server:
        yield server
        server.assert_idle(10)


@pytest.fixture(scope="module")
def real() -> Iterator[Server]:
    """The embedded model in float32: a continuation is the same text."""
    with Server("--dtype", "float32", "--kv-cache-memory-bytes", "512M", "--served-model-name", "smollm2",
                "--crash-limit", "1000", model=str(gguf())) as server:
        yield server
        server.assert_idle(10)
