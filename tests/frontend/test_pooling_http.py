"""/v1/embeddings, /pooling, /classify, /score and /rerank over real sockets: every form, shape and refusal."""
from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from frontend.pool_schema import MAX_INPUTS
from pipeline.beacon import Heard
from pipeline.config import ModelConfig
from pipeline.messages import Kind, State
from tests.frontend.served import Served, served
from tests.frontend.test_http import assert_error, client
from tests.frontend.world import beacon

MODELS = (
    ModelConfig(names=("chatter",), path="/", vocab_size=1000, max_model_len=256),
    ModelConfig(names=("embedder", "e"), path="/", task="embed", max_model_len=64,
                prompts={"query": "a", "document": "b"}),
    ModelConfig(names=("classifier",), path="/", task="classify", max_model_len=64),
    ModelConfig(names=("ranker",), path="/", task="score", max_model_len=64),
    ModelConfig(names=("second-embedder",), path="/", task="embed", max_model_len=64),
    ModelConfig(names=("judge",), path="/", task="score", max_model_len=64, pair_template="{{ query }}{{ document }}"),
    ModelConfig(names=("reader",), path="/", task="embed", max_model_len=64, max_embed_len=640, long_inputs="chunk",
                prompts={"query": "ask "}, default_prompt="query", include_prompt=False),
)
FACTS: dict[int, dict[str, Any]] = {
    1: {"dimension": 4, "matryoshka": [2, 3], "tasks": ["embed", "token_embed"], "late_interaction": False},
    2: {"labels": ["AAA", "BBB"], "tasks": ["classify", "token_classify"]},
    3: {"labels": ["LABEL_0"], "tasks": ["score"]},
    4: {"dimension": 4, "matryoshka": None, "tasks": ["embed", "token_embed"], "late_interaction": True},
    5: {"labels": ["LABEL_0"], "tasks": ["score"]},
    6: {"dimension": 4, "matryoshka": None, "tasks": ["embed", "token_embed"], "late_interaction": False},
}
SCORERS = ["embedder", "ranker", "second-embedder", "judge", "reader"]
UNIT = [0.70710677, 0.70710677, 0.0, 0.0]                # "ab"


def pooling(**changes: Any) -> Any:
    return served(models=MODELS, **changes)


def tell(server: Served) -> Served:
    """The engines have said what they loaded."""
    for index, facts in FACTS.items():
        server.latest[Kind.ENGINE, index] = Heard(
            beacon(Kind.ENGINE, index, facts_json=json.dumps(facts).encode()), server.latest[Kind.ENGINE, index].at_ns)
    return server


async def post(server: Served, path: str, **body: Any) -> httpx.Response:
    async with client(tell(server)) as http:
        return await http.post(path, json=body)


async def good(server: Served, path: str, **body: Any) -> dict[str, Any]:
    response = await post(server, path, **body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


# ---- embeddings ----

async def test_embeddings_of_every_form_of_input() -> None:
    async with pooling() as server:
        body = await good(server, "/v1/embeddings", model="e", input="ab")
        created, name = body.pop("created"), body.pop("id")
        assert created > 1e9 and name.startswith("embd-")
        assert body == {"object": "list", "model": "embedder",
                        "data": [{"index": 0, "object": "embedding", "embedding": UNIT}],
                        "usage": {"prompt_tokens": 2, "total_tokens": 2, "completion_tokens": 0,
                                  "prompt_tokens_details": None}}
        many = await good(server, "/v1/embeddings", model="e", input=["a", "b", "abc"], request_id="mine")
        assert many["id"] == "embd-mine" and [d["index"] for d in many["data"]] == [0, 1, 2]
        assert [d["embedding"][:2] for d in many["data"]][:2] == [[1, 0], [0, 1]] and many["usage"]["total_tokens"] == 5
        ids = await good(server, "/v1/embeddings", model="e", input=[97, 98])
        assert ids["data"][0]["embedding"] == UNIT
        lists = await good(server, "/v1/embeddings", model="e", input=[[97], [97, 98]])
        assert [d["embedding"] for d in lists["data"]] == [[1, 0, 0, 0], UNIT]
        assert server.pipeline.pools[-1].add_special is True
        chat = await good(server, "/v1/embeddings", model="e", messages=[{"role": "user", "content": "ab"}])
        assert chat["data"][0]["embedding"] == UNIT
        submit = server.pipeline.pools[-1]
        assert submit.add_special is False and submit.inputs[0].chat.add_generation_prompt is False
        chats = await good(server, "/v1/embeddings", model="e", messages=[
            [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]])
        assert len(chats["data"]) == 2


async def test_embeddings_as_numbers_base64_and_bytes_of_every_type() -> None:
    async with pooling() as server:
        text = await good(server, "/v1/embeddings", model="e", input="ab", encoding_format="base64")
        assert np.frombuffer(base64.b64decode(text["data"][0]["embedding"]), "<f4").tolist() == [np.float32(x) for x in UNIT]
        half = await good(server, "/v1/embeddings", model="e", input="ab", encoding_format="base64", embed_dtype="float16",
                          endianness="big")
        assert np.frombuffer(base64.b64decode(half["data"][0]["embedding"]), ">f2")[0] == np.float16(UNIT[0])
        raw = await post(server, "/v1/embeddings", model="e", input=["a", "ab"], encoding_format="bytes",
                         embed_dtype="bfloat16")
        assert raw.headers["content-type"] == "application/octet-stream" and len(raw.content) == 16
        told = json.loads(raw.headers["metadata"])
        assert told["data"][1] == {"index": 1, "embed_dtype": "bfloat16", "endianness": "native", "start": 8, "end": 16,
                                   "shape": [4]}
        assert told["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert np.frombuffer(raw.content, "<u2")[0] == 0x3F80
        bare = await post(server, "/v1/embeddings", model="e", input=["a", "ab"], encoding_format="bytes_only",
                          embed_dtype="fp8_e4m3")
        assert bare.content[0] == 0x38 and len(bare.content) == 8 and "metadata" not in bare.headers
        assert_error(await post(server, "/v1/embeddings", model="e", input=["a"] * 65, encoding_format="bytes"),
                     400, "invalid_value", "encoding_format")


async def test_the_openai_client_and_its_base64() -> None:
    async with pooling() as server, openai.AsyncOpenAI(base_url=tell(server).url + "/v1", api_key="x") as sdk:
        answer = await sdk.embeddings.create(model="embedder", input=["a", "ab"])
        assert [d.index for d in answer.data] == [0, 1] and answer.usage.prompt_tokens == 3
        assert answer.data[1].embedding == pytest.approx(UNIT)
        cut = await sdk.embeddings.create(model="embedder", input="ab", dimensions=2, encoding_format="float")
        assert len(cut.data[0].embedding) == 2


async def test_what_embeddings_pass_on() -> None:
    async with pooling() as server:
        await good(server, "/v1/embeddings", model="e", input="ab", truncate_prompt_tokens=-1, truncation_side="left",
                   add_special_tokens=False, normalize=False, cache_salt="x", user="u", padding="do_not_pad")
        submit = server.pipeline.pools[-1]
        assert (submit.truncate, submit.truncate_left, submit.add_special) == (-1, True, False)
        assert submit.params.activation is False and submit.params.task == "embed" and submit.params.dimensions == 0
        await good(server, "/v1/embeddings", model="e", input="b", prompt_name="query")
        assert server.pipeline.pools[-1].inputs[0].text == "ab"
        await good(server, "/v1/embeddings", model="e", input="ab", dimensions=3)
        assert server.pipeline.pools[-1].params.dimensions == 3


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "invalid_request", "input"), ({"input": []}, "invalid_value", "input"),
    ({"input": [1, "a"]}, "invalid_value", "input"),
    ({"input": [[1], []]}, "invalid_value", "input"), ({"input": [True]}, "invalid_value", "input"),
    ({"input": [-1]}, "invalid_value", "input"), ({"input": [2**32]}, "invalid_value", "input"),
    ({"input": ["x"] * (MAX_INPUTS + 1)}, "invalid_value", "input"), ({"input": 5}, "invalid_value", "input"),
    ({"input": "a", "dimensions": 2, "model": "second-embedder"}, "invalid_value", "dimensions"),
    ({"input": "a", "dimensions": 1}, "invalid_value", "dimensions"),
    ({"input": "a", "dimensions": 5}, "invalid_value", "dimensions"),
    ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
    ({"input": "a", "embed_dtype": "int8"}, "invalid_value", "embed_dtype"),
    ({"input": "a", "truncate_prompt_tokens": 65}, "invalid_value", "truncate_prompt_tokens"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
    ({"input": "a", "normalize": True, "use_activation": False}, "invalid_value", "use_activation"),
    ({"input": "a", "prompt_name": "nope"}, "invalid_value", "prompt_name"),
    ({"input": "a", "priority": 3}, "unsupported_parameter", "priority"),
    ({"input": "a", "padding": "max_length"}, "invalid_value", "padding"),
    ({"input": "a", "mm_processor_kwargs": {}}, "unsupported_parameter", "mm_processor_kwargs"),
    ({"messages": []}, "invalid_value", "messages"), ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"input": "fail context_length_exceeded"}, "context_length_exceeded", "input"),
    ({"input": ["a", "fail context_length_exceeded"]}, "context_length_exceeded", "input[1]"),
    ({"input": "a", "model": "nope"}, "model_not_found", "model"), ({"input": "a", "model": ""}, "invalid_value", "model"),
]


async def test_what_embeddings_refuse() -> None:
    async with pooling() as server:
        for body, code, param in REFUSED:
            response = await post(server, "/v1/embeddings", **{"model": "embedder", **body})
            assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param), response.text
            assert response.status_code == (404 if code == "model_not_found" else 400)
        assert len(server.pipeline.pools) == 2                                        # those that "fail" in the pipeline
        whole = await good(server, "/v1/embeddings", model="second-embedder", input="a", dimensions=4)
        assert len(whole["data"][0]["embedding"]) == 4


async def test_the_largest_request_comes_back_in_order() -> None:
    async with pooling() as server:
        body = await good(server, "/v1/embeddings", model="e", input=["a" * (i % 7) + "b" for i in range(MAX_INPUTS)])
        assert [d["index"] for d in body["data"]] == list(range(MAX_INPUTS))
        assert all(d["embedding"][1] == pytest.approx(1 / np.hypot(1, i % 7), abs=1e-6) for i, d in enumerate(body["data"]))


async def test_a_caller_that_leaves_is_aborted() -> None:
    async with pooling() as server, client(tell(server)) as http:
        task = asyncio.create_task(http.post("/v1/embeddings", json={"model": "e", "input": "hang"}))
        while not server.pipeline.pools:
            await asyncio.sleep(0.01)
        task.cancel()
        while not server.pipeline.aborted:
            await asyncio.sleep(0.01)
        assert server.pipeline.aborted == {server.pipeline.pools[0].rid}


# ---- models of the wrong kind ----

async def test_a_model_of_the_wrong_kind_names_those_that_fit() -> None:
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("/v1/chat/completions", {"model": "e", "messages": [{"role": "user", "content": "x"}]}, ["chatter"]),
        ("/v1/completions", {"model": "ranker", "prompt": "x"}, ["chatter"]),
        ("/v1/embeddings", {"model": "classifier", "input": "x"}, ["embedder", "second-embedder", "reader"]),
        ("/classify", {"model": "e", "input": "x"}, ["classifier", "ranker", "judge"]),
        ("/score", {"model": "classifier", "text_1": "x", "text_2": "y"}, SCORERS),
        ("/v1/rerank", {"model": "chatter", "query": "x", "documents": ["y"]}, SCORERS),
        ("/pooling", {"model": "chatter", "input": "x"}, [
            "embedder", "classifier", "ranker", "second-embedder", "judge", "reader"]),
    ]
    async with pooling() as server:
        for path, body, fitting in cases:
            message = assert_error(await post(server, path, **body), 400, "invalid_value", "model")["message"]
            assert message.endswith(": " + ", ".join(f"'{name}'" for name in fitting) + ".")


async def test_models_are_listed_with_their_tasks() -> None:
    async with pooling() as server, client(server) as http:
        entries = (await http.get("/v1/models")).json()["data"]
        assert [(e["id"], e["task"]) for e in entries[:3]] == [("chatter", "generate"), ("embedder", "embed"), ("e", "embed")]
        assert (await http.get("/v1/models/ranker")).json()["max_model_len"] == 64


async def test_one_model_without_engine_leaves_the_others() -> None:
    async with pooling() as server, client(tell(server)) as http:
        assert (await http.get("/ready")).status_code == 200
        server.latest[Kind.ENGINE, 1] = Heard(beacon(Kind.ENGINE, 1, 2, State.STARTING), server.latest[Kind.ENGINE, 1].at_ns)
        body = (await http.get("/ready")).json()
        assert body["models"]["embedder"] is False and body["models"]["ranker"] is True and body["missing"] == ["engine.1"]
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post("/score", json={"model": "ranker", "text_1": "a", "text_2": "a"})).status_code == 200


# ---- pooling and classify ----

async def test_pooling_gives_nested_data() -> None:
    async with pooling() as server:
        body = await good(server, "/pooling", model="e", input=["ab", "b"], task="token_embed")
        assert body["id"].startswith("pool-") and body["data"][0] == {
            "index": 0, "object": "pooling", "data": [[1, 0, 0, 0], [0, 1, 0, 0]]}
        assert (await good(server, "/pooling", model="e", input="ab"))["data"][0]["data"] == UNIT
        assert (await good(server, "/pooling", model="classifier", input="aab"))["data"][0]["data"] == pytest.approx([2/3, 1/3])
        text = await good(server, "/pooling", model="e", input="ab", task="token_embed", encoding_format="base64")
        assert len(base64.b64decode(text["data"][0]["data"])) == 2 * 4 * 4
        wrong = await post(server, "/pooling", model="e", input="a", task="classify")
        assert "token_embed" in assert_error(wrong, 400, "invalid_value", "task")["message"]


async def test_classify_in_the_shape_of_the_seed() -> None:
    async with pooling() as server:
        body = await good(server, "/classify", model="classifier", input=["aab", "b"])
        assert body.pop("created") and body.pop("id").startswith("classify-")
        assert body == {"object": "list", "model": "classifier", "data": [
            {"index": 0, "label": "AAA", "probs": [0.6666667, 0.33333334], "num_classes": 2},
            {"index": 1, "label": "BBB", "probs": [0.0, 1.0], "num_classes": 2}], "usage": {
                "prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0, "prompt_tokens_details": None}}
        one = await good(server, "/classify", model="classifier", input="a", activation=False)
        assert one["data"][0]["label"] == "AAA" and server.pipeline.pools[-1].params.activation is False
        chat = await good(server, "/classify", model="classifier", messages=[{"role": "user", "content": "b"}])
        assert chat["data"][0]["label"] == "BBB"
        assert_error(await post(server, "/classify", model="classifier", input="a", softmax=True, activation=False), 400,
                     "invalid_value", "use_activation")


# ---- score ----

async def test_scores_of_one_to_one_one_to_many_and_many_to_many() -> None:
    async with pooling() as server:
        one = await good(server, "/score", model="ranker", text_1="ab", text_2="ac", encoding_format="float")
        assert one.pop("created") and one.pop("id").startswith("score-")
        assert one == {"object": "list", "model": "ranker", "data": [{"index": 0, "object": "score", "score": 0.5}],
                       "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0, "prompt_tokens_details": None}}
        many = await good(server, "/v1/score", model="ranker", text_1="ab", text_2=["ab", "cd"])
        assert [d["score"] for d in many["data"]] == [1, 0]
        pairs = await good(server, "/score", model="ranker", text_1=["a", "b"], text_2=["b", "b"])
        assert [d["score"] for d in pairs["data"]] == [0, 1]
        other = await good(server, "/score", model="ranker", queries="ab", documents=[
            {"text": "a"}, {"content": [{"type": "text", "text": "c"}]}])
        assert [d["score"] for d in other["data"]] == [1, 0]
        await good(server, "/score", model="ranker", data_1="ab", data_2="a", max_tokens_per_query=3, max_tokens_per_doc=4)
        assert (server.pipeline.pools[-1].inputs[0].keep, server.pipeline.pools[-1].inputs[0].keep_pair) == (3, 4)


async def test_embedding_models_score_by_cosine_and_late_interaction_by_best_matches() -> None:
    async with pooling() as server:
        body = await good(server, "/score", model="e", text_1="b", text_2=["", "cc", "a"])
        sent = server.pipeline.pools[-1]
        assert [t.text for t in sent.inputs] == ["ab", "b", "bcc", "ba"]              # with the model's prompts, each once
        assert [d["score"] for d in body["data"]] == pytest.approx([2**-0.5, (1 / 10)**0.5, 1])
        assert body["usage"]["prompt_tokens"] == 2 + 1 + 3 + 2
        late = await good(server, "/score", model="second-embedder", text_1="ab", text_2=["ba", "a", "c"])
        assert server.pipeline.pools[-1].params.task == "token_embed"
        assert [d["score"] for d in late["data"]] == [2, 1, 0]


async def test_a_model_that_scores_through_a_template_gets_its_variables() -> None:
    async with pooling() as server:
        await good(server, "/score", model="judge", text_1="a", text_2=["b", "c"], instruction="find",
                   chat_template_kwargs={"tone": "kind", "instruction": "lost"}, max_tokens_per_doc=5)
        sent = server.pipeline.pools[-1].inputs
        assert [(t.text, t.pair, t.keep_pair) for t in sent] == [("a", "b", 5), ("a", "c", 5)]
        assert all(t.chat and json.loads(t.chat.kwargs_json) == {"tone": "kind", "instruction": "find"} for t in sent)
        await good(server, "/rerank", model="judge", query="a", documents=["b"])
        assert server.pipeline.pools[-1].inputs[0].chat is not None and not server.pipeline.pools[-1].inputs[0].chat.kwargs_json


async def test_long_inputs_in_parts_and_prompts_out_of_pooling_are_passed_on() -> None:
    async with pooling() as server:
        for body, longest in (({}, 640), ({"truncate_prompt_tokens": -1}, 0), ({"truncate_prompt_tokens": 9}, 0)):
            await good(server, "/v1/embeddings", model="reader", input="ab", **body)
            assert server.pipeline.pools[-1].longest == longest
        assert [(t.text, t.lead) for t in server.pipeline.pools[-1].inputs] == [("ask ab", 4)]
        await good(server, "/pooling", model="reader", input="ab", task="token_embed")
        assert server.pipeline.pools[-1].longest == 0, "vectors of tokens have no mean"
        await good(server, "/v1/embeddings", model="e", input="ab")
        assert server.pipeline.pools[-1].longest == 0 and server.pipeline.pools[-1].inputs[0].lead == 0


async def test_what_score_refuses() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"), ({"text_1": ["a", "b"], "text_2": ["a"] * 3}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"), ({"text_1": "a", "text_2": [5]}, "text_2"),
        ({"text_1": "a", "text_2": {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}}, "text_2"),
        ({"queries": ["a", "b"], "documents": ["a"]}, "queries"),
        ({"text_1": "a", "text_2": "b", "max_tokens_per_doc": 64}, "max_tokens_per_doc"),
        ({"text_1": "a", "text_2": "b", "instruction": "x"}, "instruction"),
        ({"text_1": "a", "text_2": "b", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"text_1": "a", "text_2": "b", "model": "e", "use_activation": False}, "use_activation"),
        ({"text_1": "a", "text_2": ["a", "fail context_length_exceeded"], "model": "second-embedder"}, "text_2[1]"),
    ]
    async with pooling() as server:
        for body, param in cases:
            response = await post(server, "/score", **{"model": "ranker", **body})
            assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


# ---- rerank ----

@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank_in_the_shapes_of_jina_and_cohere(path: str) -> None:
    async with pooling() as server:
        documents = ["cd", {"text": "ab"}, "ac", "ca"]
        body = await good(server, path, model="ranker", query="ab", documents=documents)
        assert body.pop("id").startswith("rerank-")
        assert body == {
            "model": "ranker", "usage": {"prompt_tokens": 16, "total_tokens": 16}, "results": [
                {"index": 1, "document": {"text": "ab"}, "relevance_score": 1.0},
                {"index": 2, "document": {"text": "ac"}, "relevance_score": 0.5},
                {"index": 3, "document": {"text": "ca"}, "relevance_score": 0.5},
                {"index": 0, "document": {"text": "cd"}, "relevance_score": 0.0}],
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}}
        best = await good(server, path, model="ranker", query="ab", documents=documents, top_n=1, return_documents=False,
                          rank_fields=["text"], max_chunks_per_doc=1)
        assert best["results"] == [{"index": 1, "relevance_score": 1.0}]
        by_cosine = await good(server, path, model="second-embedder", query="ab", documents=["a", "ab"], top_n=0)
        assert [r["index"] for r in by_cosine["results"]] == [1, 0]
        for wrong, param in (({"documents": []}, "documents"), ({"top_n": -1}, "top_n"),
                             ({"rank_fields": ["title"]}, "rank_fields"),
                             ({"query": 5}, "query"), ({"max_chunks_per_doc": 3}, "max_chunks_per_doc")):
            response = await post(server, path, **{"model": "ranker", "query": "x", "documents": ["y"], **wrong})
            assert response.status_code == 400 and response.json()["error"]["param"] == param
