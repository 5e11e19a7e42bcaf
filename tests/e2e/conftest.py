"""Servers shared by the end-to-end tests: one with the real embedded model, one with the null engine."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serving import Server, gguf


@pytest.fixture(scope="package")
def smollm() -> Iterator[Server]:
    """The embedded model in float32, where answers are exactly reproducible."""
    with Server("--dtype", "float32", "--kv-cache-memory-bytes", "512M", model=str(gguf()),
                env={"QUARTET_SERVED_MODEL_NAME": "smollm2,smollm2-135m-instruct"}) as server:
        yield server
        server.assert_idle()


@pytest.fixture(scope="package")
def null() -> Iterator[Server]:
    """The whole pipeline with scripted tokens."""
    with Server("--null-engine", "hash", "--frontends", "2", "--tokenizers", "2", "--served-model-name", "null",
                model=str(gguf())) as server:
        yield server
        server.assert_idle()


@pytest.fixture
def client(smollm: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=smollm.url + "/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made
