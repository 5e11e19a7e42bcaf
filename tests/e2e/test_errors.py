"""Bad input gets a clear, OpenAI-shaped error before it costs anything, and harms nobody else."""
from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator

import httpx
import pytest

from tests.serving import Server

COMPLETION = {"model": "null", "prompt": "hello", "max_tokens": 4}
CHAT = {"model": "null", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

BAD = [
    ("/v1/completions", {**COMPLETION, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {**COMPLETION, "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {**COMPLETION, "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {**COMPLETION, "top_p": 1.5}, 400, "top_p"),
    ("/v1/completions", {**COMPLETION, "n": 10**9}, 400, "n"),
    ("/v1/completions", {**COMPLETION, "n": 0}, 400, "n"),
    ("/v1/completions", {**COMPLETION, "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {**COMPLETION, "max_tokens": "5"}, 400, "max_tokens"),
    ("/v1/completions", {**COMPLETION, "min_tokens": 9}, 400, "min_tokens"),
    ("/v1/completions", {**COMPLETION, "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {**COMPLETION, "stop": ["x"] * 17}, 400, "stop"),
    ("/v1/completions", {**COMPLETION, "stop": ""}, 400, "stop"),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/completions", {**COMPLETION, "stop_token_ids": [2**31]}, 400, "stop_token_ids"),
    ("/v1/completions", {**COMPLETION, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("/v1/completions", {**COMPLETION, "presence_penalty": 3}, 400, "presence_penalty"),
    ("/v1/completions", {**COMPLETION, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", {**COMPLETION, "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {**COMPLETION, "prompt": [10**7]}, 400, "prompt"),
    ("/v1/completions", {**COMPLETION, "prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"model": "null"}, 400, "prompt"),
    ("/v1/completions", {**COMPLETION, "suffix": "x"}, 400, "suffix"),
    ("/v1/completions", {**COMPLETION, "use_beam_search": True, "stream": True}, 400, "use_beam_search"),
    ("/v1/completions", {**COMPLETION, "use_beam_search": True, "temperature": 0.5}, 400, "temperature"),
    ("/v1/completions", {**COMPLETION, "bad_words": [f"w{i}" for i in range(100)]}, 400, "bad_words"),
    ("/v1/completions", {**COMPLETION, "allowed_token_ids": []}, 400, "allowed_token_ids"),
    ("/v1/completions", {**COMPLETION, "model": "other"}, 404, "model"),
    ("/v1/completions", {**COMPLETION, "prompt": "word " * 30000}, 400, None),
    ("/v1/chat/completions", {**CHAT, "messages": "hi"}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
        "url": "data:image/png;base64,AA=="}}]}]}, 400, None),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json"}}, 400, "response_format"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f f"}}]}, 400,
     "tools"),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ("/v1/chat/completions", {**CHAT, "add_generation_prompt": True, "continue_final_message": True}, 400, None),
    ("/tokenize", {"model": "null"}, 400, None),
    ("/detokenize", {"model": "null", "tokens": [-4]}, 400, "tokens"),
]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


def assert_openai_error(answer: httpx.Response, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    if param is not None:
        assert (error["param"] or "").split(".")[0].split("[")[0] == param, error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_values_are_refused_by_name(
        null: Server, http: httpx.Client, path: str, body: dict, status: int, param: str, stream: bool) -> None:
    if stream and path.startswith("/v1"):
        body = {**body, "stream": True}
        if "stream_options" in body or "use_beam_search" in body:
            return                                         # allowed then, or refused for being streamed
    assert_openai_error(http.post(null.url + path, json=body), status, param)


@pytest.mark.parametrize(("content", "headers", "status"), [
    (b"{", {"content-type": "application/json"}, 400), (b"", {"content-type": "application/json"}, 400),
    (b"[1]", {"content-type": "application/json"}, 400), (b"\xff\xfe", {"content-type": "application/json"}, 400),
    (b"[" * 100_000, {"content-type": "application/json"}, 400),
    (b'{"model":"null","prompt":"x","temperature":NaN}', {"content-type": "application/json"}, 400),
    (json.dumps(COMPLETION).encode(), {"content-type": "text/plain"}, 415)])
def test_bad_bodies(null: Server, content: bytes, headers: dict[str, str], status: int) -> None:
    assert_openai_error(httpx.post(null.url + "/v1/completions", content=content, headers=headers), status, None)


def test_unknown_routes_and_methods(null: Server) -> None:
    assert_openai_error(httpx.get(null.url + "/v1/nothing"), 404, None)
    wrong = httpx.get(null.url + "/v1/completions")
    assert_openai_error(wrong, 405, None)
    assert "POST" in wrong.headers["allow"]


def test_a_declared_huge_body_is_refused_unread(null: Server) -> None:
    import socket
    host, port = null.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 1000000000000\r\n\r\n")
        head = raw.recv(4096)
    assert b" 413 " in head.split(b"\r\n")[0]


def test_foreign_hosts_are_refused_on_loopback(null: Server) -> None:
    assert httpx.get(null.url + "/v1/models", headers={"host": "evil.test"}).status_code == 403
    assert httpx.get(null.url + "/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_request_ids_come_back_and_are_never_a_header_split(null: Server) -> None:
    assert httpx.get(null.url + "/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("x" * 200, "a b", "é".encode("latin-1")):
        assert httpx.get(null.url + "/v1/models", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_bad_requests_do_not_disturb_a_neighbour(null: Server, http: httpx.Client) -> None:
    body = {"model": "null", "prompt": "neighbour", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

    def text() -> str:
        return http.post(null.url + "/v1/completions", json=body).json()["choices"][0]["text"]
    alone = text()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        neighbour = pool.submit(text)
        list(pool.map(lambda case: http.post(null.url + case[0], json=case[1]), BAD * 3))
        assert neighbour.result() == alone


def test_fifty_requests_with_one_id_get_their_own_answers(null: Server, http: httpx.Client) -> None:
    def ask(number: int) -> str:
        body = {"model": "null", "prompt": f"prompt {number}", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = http.post(null.url + "/v1/completions", json=body, headers={"x-request-id": "same"})
        return answer.json()["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(50)))
    assert together == [ask(number) for number in range(50)]
