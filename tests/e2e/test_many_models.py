"""Four models behind one port, each with an engine of its own: none notices what happens to another."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pipeline.client import ApiError, Client
from tests.serving import ROOT, Server, gguf
from tests.waiting import until

BERT = str(ROOT / "examples/models/bert-tiny-sentiment")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Null engines: two replicas of the embedder, one engine for each other model.

    A large request keeps the embedder busy for longer than engines need to tell of their counts (a second).
    """
    file = tmp_path_factory.mktemp("many") / "quartet.yaml"
    file.write_text(json.dumps({"crash-limit": 50, "models": [
        {"name": "chat", "path": str(gguf()), "null-engine": "hash", "null-step": 0.005},
        {"name": "embedder", "path": BERT, "task": "embed", "null-engine": "dimension=8", "null-step": 0.3, "replicas": 2},
        {"name": "moods", "path": BERT, "null-engine": "labels=2"},
        {"name": "ranker", "path": BERT, "task": "score", "null-engine": ""}]}))
    with Server("--config", str(file), "--zmq-endpoint", f"ipc://{file.parent}/clients") as server:
        yield server


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def engine(server: Server, index: int) -> int:
    """The process id of an engine."""
    for pid in server.pids("engine_proc"):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[words.index("--index") + 1] == str(index):
                return pid
    raise AssertionError(f"engine {index} does not run")


def test_every_model_answers_what_it_is_for(many: Server) -> None:
    entries = many.get("/v1/models")[1]["data"]
    assert [(e["id"], e["task"]) for e in entries] == [
        ("chat", "generate"), ("embedder", "embed"), ("moods", "classify"), ("ranker", "score")]
    assert many.get("/ready") == (200, {"status": "ok", "missing": [], "models": {
        "chat": True, "embedder": True, "moods": True, "ranker": True}})
    assert len(post(many, "/v1/completions", model="chat", prompt="hi", max_tokens=3)["choices"]) == 1
    assert len(post(many, "/v1/embeddings", model="embedder", input="hi")["data"][0]["embedding"]) == 8
    assert post(many, "/classify", model="moods", input="hi")["data"][0]["num_classes"] == 2
    ranked = post(many, "/rerank", model="ranker", query="the capital of France", documents=[
        "horses and cows", "the capital of France is Paris"])
    assert ranked["results"][0]["index"] == 1
    near = post(many, "/score", model="embedder", text_1="red car", text_2=["red car", "blue sky"])
    assert near["data"][0]["score"] == pytest.approx(1, abs=1e-6) and near["data"][1]["score"] < 0.99
    assert any("serves 4 models" in line for line in many.lines)


def test_pooling_engines_give_way_to_chats(many: Server) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    behind = min(19, ours + 5)
    assert [os.getpriority(os.PRIO_PROCESS, engine(many, i)) for i in range(5)] == [ours, *[behind] * 4]


def test_the_openai_client_gets_equal_vectors_from_both_replicas(many: Server) -> None:
    texts = [f"text number {i}" for i in range(100)]
    with openai.OpenAI(base_url=many.url + "/v1", api_key="none") as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.embeddings.create(model="embedder", input=texts), range(8)))
    first = np.array([d.embedding for d in answers[0].data])
    assert first.shape == (100, 8) and all(np.array_equal(first, [d.embedding for d in a.data]) for a in answers)


def test_the_death_of_one_engine_is_no_business_of_the_others(many: Server) -> None:
    """Its callers are answered after the restart; a chat stream and the classifier go on meanwhile."""
    texts = [f"text number {i}" for i in range(400)]
    expected = post(many, "/v1/embeddings", model="embedder", input=texts)["data"]
    stop, counts = threading.Event(), {"moods": 0}

    def classify() -> None:
        while not stop.wait(0.05):
            assert post(many, "/classify", model="moods", input="hi")["data"][0]["num_classes"] == 2
            counts["moods"] += 1

    with openai.OpenAI(base_url=many.url + "/v1", api_key="none", max_retries=0) as client, ThreadPoolExecutor(8) as pool:
        chat = pool.submit(lambda: len(list(client.completions.create(
            model="chat", prompt="hi", max_tokens=300, stream=True, extra_body={"ignore_eos": True}))))
        calm = pool.submit(classify)
        try:
            done = many.metric("quartet:pooled_inputs_total")
            callers = [pool.submit(post, many, "/v1/embeddings", model="embedder", input=texts) for _ in range(6)]
            until(lambda: many.metric("quartet:pooled_inputs_total") > done, 20, "embeddings under way")
            for index in (1, 2):
                os.kill(engine(many, index), signal.SIGKILL)
            assert all(caller.result(60)["data"] == expected for caller in callers)
            assert chat.result(60) > 0
        finally:
            stop.set()
        calm.result(30)
    assert counts["moods"] > 0 and many.metric("quartet:resubmissions_total") >= 1
    until(lambda: many.get("/ready")[0] == 200 and not many.get("/ready")[1]["missing"], 20, "both engines back")


def test_the_death_of_the_tokenizer_loses_nothing(many: Server) -> None:
    texts = [f"text number {i}" for i in range(2000)]
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(post, many, "/v1/embeddings", model="embedder", input=texts)
        before = many.metric("quartet:open_requests")
        os.kill(many.pids("tokenizer_proc")[0], signal.SIGKILL)
        data = caller.result(60)["data"]
    assert [d["index"] for d in data] == list(range(2000)) and before >= 0
    assert all(len(d["embedding"]) == 8 for d in data)


def test_one_query_waits_for_a_batch_and_not_for_two_thousand_inputs(many: Server) -> None:
    texts = [f"a longer text of some words, number {i}" for i in range(2048)]
    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(post, many, "/v1/embeddings", model="embedder", input=texts)
        done = many.metric("quartet:pooled_inputs_total")
        until(lambda: many.metric("quartet:pooled_inputs_total") > done, 20, "the large request under way")
        post(many, "/v1/embeddings", model="embedder", input="a query")
        assert not large.done(), "the query overtook"
        assert len(large.result(60)["data"]) == 2048


def test_the_in_cluster_client_gets_arrays(many: Server) -> None:
    endpoint = next(word for word in many.args if word.startswith("ipc://")) + ".0"
    with Client(endpoint) as client:
        assert client.models == ["chat", "embedder", "moods", "ranker"]
        texts = [f"text {i}" for i in range(50)]
        vectors = client.embed(texts, model="embedder")
        over_http = [d["embedding"] for d in post(many, "/v1/embeddings", model="embedder", input=texts)["data"]]
        assert vectors.dtype == np.float32 and np.array_equal(vectors, np.array(over_http, np.float32))
        ids = np.array([101, 2000, 102], np.uint32)
        assert np.array_equal(client.embed([ids, ids], model="embedder", add_special_tokens=False)[1],
                              client.embed(ids, model="embedder", add_special_tokens=False)[0])
        per_token = client.pooling(["one", "one two"], model="embedder", task="token_embed")
        assert [v.shape for v in per_token] == [(3, 8), (4, 8)]
        assert client.classify("hi", model="moods")["data"][0]["num_classes"] == 2
        assert client.score("a b", ["a b", "c d"], model="ranker").tolist() == sorted(
            client.score("a b", ["a b", "c d"], model="ranker").tolist(), reverse=True)
        assert client.rerank("a b", ["c d", "a b"], model="ranker", top_n=1)["results"][0]["index"] == 1
        with pytest.raises(ApiError) as error:
            client.embed("hi", model="chat")
        assert error.value.status == 400 and "'embedder'" in str(error.value)
