"""The in-cluster client does what HTTP does: same answers, same errors, credit, lease, keys, several processes."""
from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import zmq

from pipeline import edge, keys
from pipeline.client import ApiError, AsyncClient, Client
from tests.serving import ROOT, Server, gguf
from tests.waiting import until

PROMPT = {"model": "null", "prompt": "hello there", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    path = f"ipc://{tmp_path_factory.mktemp('door')}/clients"
    with Server("--null-engine", "hash", "--null-step", "0.003", "--served-model-name", "null", "--frontends", "2",
                "--zmq-endpoint", path, model=str(gguf())) as server:
        yield server, path
        server.assert_idle()


@pytest.fixture
def client(door: tuple[Server, str]) -> Iterator[Client]:
    with Client(door[1] + ".0") as made:
        yield made


def test_answers_equal_those_over_http(door: tuple[Server, str], client: Client) -> None:
    with httpx.Client(base_url=door[0].url, timeout=60) as http:
        for path, call, body in (
                ("/v1/completions", client.completions, PROMPT | {"logprobs": 2, "n": 2, "echo": True}),
                ("/v1/chat/completions", client.chat, CHAT | {"logprobs": True, "top_logprobs": 1})):
            ours, theirs = call(**body), http.post(path, json=body).json()
            assert ours["choices"] == theirs["choices"] and ours["object"] == theirs["object"]
            assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]
        assert client.tokenize(prompt="hello")["tokens"].tolist() == http.post(
            "/tokenize", json={"prompt": "hello"}).json()["tokens"]
    assert client.models == ["null"] and client.health()["status"] == "ok"


def test_streams_give_text_and_ids_as_arrays(client: Client) -> None:
    whole = client.completions(**PROMPT, return_token_ids=True)["choices"][0]
    with client.stream_completions(**PROMPT) as stream:
        deltas = list(stream)
    assert "".join(d.text for d in deltas) == whole["text"]
    ids = np.concatenate([d.token_ids for d in deltas])
    assert ids.dtype == np.uint32 and ids.tolist() == whole["token_ids"]
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert stream.usage["completion_tokens"] == 12
    assert client.detokenize(ids) == whole["text"]


def test_choices_of_a_stream_are_told_apart(client: Client) -> None:
    whole = client.chat(**CHAT | {"temperature": 1.0}, n=3, seed=5)["choices"]
    texts = {0: "", 1: "", 2: ""}
    for delta in client.stream_chat(**CHAT | {"temperature": 1.0}, n=3, seed=5):
        texts[delta.index] += delta.text
    assert texts == {c["index"]: c["message"]["content"] for c in whole}


@pytest.mark.parametrize(("body", "status", "code"), [
    ({"prompt": "x", "temperature": -1}, 400, "invalid_value"),
    ({"prompt": "x", "model": "no"}, 404, "model_not_found"),
    ({"prompt": "word " * 30_000}, 400, "context_length_exceeded"), ({"prompt": "x", "suffix": "y"}, 400, None)])
def test_errors_are_those_of_http(client: Client, body: dict, status: int, code: str | None) -> None:
    with pytest.raises(ApiError) as plain:
        client.completions(**body)
    with pytest.raises(ApiError) as streamed:
        list(client.stream_completions(**body))
    for error in (plain.value, streamed.value):
        assert error.status == status and (code is None or error.code == code) and str(error)


def test_leaving_a_stream_stops_its_work(door: tuple[Server, str], client: Client) -> None:
    with client.stream_completions(**PROMPT | {"max_tokens": 5000}) as stream:
        next(stream)
        until(lambda: door[0].metric("vllm:num_requests_running") == 1, 10)
    door[0].assert_idle(5)


def test_a_slow_reader_gets_everything_merged(door: tuple[Server, str]) -> None:
    async def run() -> tuple[str, int]:
        async with AsyncClient(door[1] + ".1") as client:
            before = door[0].metric("vllm:generation_tokens_total")
            stream = await client.stream_completions(**PROMPT | {"max_tokens": 600})
            first = await stream.__anext__()
            while door[0].metric("vllm:generation_tokens_total") < before + 600:   # read nothing meanwhile
                await asyncio.sleep(0.05)
            rest = [delta async for delta in stream]
            return first.text + "".join(d.text for d in rest), 1 + len(rest)
    text, pieces = asyncio.run(run())
    with Client(door[1] + ".1") as client:
        assert text == client.completions(**PROMPT | {"max_tokens": 600})["choices"][0]["text"]
    assert pieces <= edge.CREDIT + 3


def test_many_calls_at_once_each_get_their_own(door: tuple[Server, str]) -> None:
    async def run() -> None:
        async with AsyncClient(door[1] + ".0") as client:
            async def one(number: int) -> tuple[str, str]:
                body = PROMPT | {"prompt": f"number {number}"}
                text = "".join([d.text async for d in await client.stream_completions(**body)])
                return text, (await client.completions(**body))["choices"][0]["text"]
            pairs = await asyncio.gather(*(one(n) for n in range(40)))
            assert all(a == b for a, b in pairs) and len({a for a, _ in pairs}) == 40
    asyncio.run(run())


VANISH = """
import sys, os
from pipeline.client import Client
client = Client(sys.argv[1])
stream = client.stream_completions(model="null", prompt="hello", max_tokens=8000, ignore_eos=True)
next(stream)
print("streaming", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_client_that_vanishes_has_its_work_aborted(door: tuple[Server, str]) -> None:
    gone = subprocess.run([sys.executable, "-c", VANISH, door[1] + ".0"], cwd=ROOT, capture_output=True, timeout=60)
    assert b"streaming" in gone.stdout and gone.returncode == -signal.SIGKILL
    door[0].assert_idle(edge.LEASE_MS / 1000 + 5)


def test_garbage_on_the_door_is_counted_and_harms_nobody(door: tuple[Server, str], client: Client) -> None:
    before = door[0].metric("quartet:ipc_bad_frames_total")
    with zmq.Context() as ctx, ctx.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 1000)
        raw.connect(door[1] + ".0")
        for frames in ([b""], [b"\x80pickle"], [os.urandom(64)], [b"\x91" * 1000], [b"\x92\x03\x01", b"x", b"y"]):
            raw.send_multipart(frames)
        raw.send_multipart(edge.encode(edge.Ping(1)))
        assert raw.poll(5000) and isinstance(edge.decode(raw.recv_multipart()), edge.Reset)
    until(lambda: door[0].metric("quartet:ipc_bad_frames_total") >= before + 5, 10)
    assert client.completions(**PROMPT)["choices"][0]["finish_reason"] == "length"


def test_a_frontend_that_dies_ends_its_calls_and_the_client_goes_on(door: tuple[Server, str]) -> None:
    server, path = door

    async def run() -> None:
        async with AsyncClient(path + ".0") as client:
            stream = await client.stream_completions(**PROMPT | {"max_tokens": 4000})
            await stream.__anext__()
            for pid in server.pids("frontend"):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(ApiError) as lost:
                async for _ in stream:
                    pass
            assert lost.value.code == "connection_lost"
            until(lambda: server.get("/ready")[0] == 200, 30, "ready again")
            answer = await asyncio.wait_for(client.completions(**PROMPT), 30)
            assert answer["choices"][0]["finish_reason"] == "length"
    asyncio.run(run())


def test_keys_guard_tcp(tmp_path: Path) -> None:
    import socket
    keys.make(tmp_path / "keys")
    keys.make(tmp_path / "stranger")
    (tmp_path / "stranger" / "server.pub").write_bytes((tmp_path / "keys" / "server.pub").read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Server("--null-engine", "hash", "--served-model-name", "null", "--zmq-endpoint", endpoint, "--zmq-keys",
                str(tmp_path / "keys"), "--api-key", "k1", model=str(gguf())):
        with Client(endpoint, key_dir=tmp_path / "keys", api_key="k1") as client:
            assert client.completions(**PROMPT)["choices"][0]["finish_reason"] == "length"
        with pytest.raises(ApiError) as refused:
            Client(endpoint, key_dir=tmp_path / "keys", api_key="wrong")
        assert refused.value.status == 401
        with zmq.Context() as ctx:
            for directory in (None, tmp_path / "stranger"):
                with ctx.socket(zmq.DEALER) as raw:
                    raw.setsockopt(zmq.LINGER, 0)
                    if directory is not None:
                        keys.as_client(raw, directory)
                    raw.connect(endpoint)
                    raw.send_multipart(edge.encode(edge.Hello(edge.PROTOCOL, "x", "k1")))
                    assert not raw.poll(700), "a wrong or missing key gets nothing"


def test_tcp_that_others_can_reach_needs_keys() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "serve", "--zmq-endpoint", "tcp://0.0.0.0:5570", "--null-engine", "hash"],
        cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2 and "quartet keys" in result.stderr
