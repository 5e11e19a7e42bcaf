"""Clients of embeddings and rerank, unmodified: all of them see the same vectors and the same order."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.clients.conftest import Run
from tests.e2e.test_docs_pooling import minilm  # noqa: F401
from tests.serving import Server

pytestmark = pytest.mark.clients
MODEL, QUERY = "all-minilm-l6-v2", "What is the capital of France?"


@pytest.fixture(scope="module")
def embedder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    file = tmp_path_factory.mktemp("embedder") / "quartet.yaml"
    file.write_text(json.dumps({"models": [{"name": MODEL, "path": str(minilm), "dtype": "float32"}]}))
    with Server("--config", str(file)) as server:
        yield server


def test_every_client_sees_the_same_vectors_and_the_same_order(embedder: Server, pooling_clients: Run) -> None:
    with openai.OpenAI(base_url=embedder.url + "/v1", api_key="none") as client:
        expected = np.array(client.embeddings.create(model=MODEL, input=QUERY).data[0].embedding)
    found = pooling_clients("with_pooling.py", embedder, MODEL)
    for name in ("langchain", "llama_index", "litellm"):
        for vector in found[name]:
            assert np.allclose(vector, expected, atol=1e-5), name
    first, second = found["cohere"]
    assert [k for k, _ in first] == [1, 0, 2] and second == first[:2]
    assert found["cohere_text"] == "The capital of France is Paris."
    assert found["litellm_rerank"] == first
    assert [score for _, score in found["langchain_rerank"]] == [score for _, score in second]
    assert found["langchain_rerank"] == found["llama_index_rerank"]
