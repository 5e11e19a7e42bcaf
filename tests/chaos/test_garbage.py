"""Bytes that nobody of ours would send, on every socket and in every body: dropped, counted, and of no consequence."""
from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zmq

from pipeline import codec
from tests.chaos.frames import Garbage
from tests.chaos.streams import Seen, bodies, gather, undisturbed
from tests.chaos.tools import STAGES, null_server, resources, sample
from tests.serving import Server
from tests.waiting import until

INBOXES = ("frontend.0.in", "tokenizer.0.in", "engine.0.in", "engine.0.ctl", "detokenizer.0.in")
BEACONS = ("frontend.0.beacon", "tokenizer.0.beacon", "engine.0.beacon", "detokenizer.0.beacon", "launcher.0.beacon")
BATCH = 200


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with null_server("--crash-limit", "1000", script="hash;eos_after=40", step_s=0.005) as made:
        yield made
        made.assert_idle(15)                                               # what looked genuine is an orphan for 5 s


def pids(server: Server) -> dict[str, list[int]]:
    return {stage: server.pids(stage) for stage in STAGES}


async def pour(server: Server, count: int, garbage: Garbage) -> None:
    """`count` frames over all inboxes, each from a sender of its own."""
    with zmq.Context() as context:
        senders = []
        for name in INBOXES:
            sender = context.socket(zmq.PUSH)
            sender.setsockopt(zmq.LINGER, 10_000)
            sender.connect(f"ipc://{server.run_dir}/{name}")
            senders.append(sender)
        try:
            for number in range(count):
                sender, frames = garbage.rng.choice(senders), garbage.frames()
                while True:
                    try:
                        sender.send_multipart(frames, zmq.NOBLOCK)
                        break
                    except zmq.Again:                                      # the stage is behind: it must catch up
                        await asyncio.sleep(0.01)
                if number % BATCH == 0:
                    await asyncio.sleep(0)
        finally:
            await asyncio.to_thread(lambda: [sender.close() for sender in senders])


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_garbage_on_every_inbox_disturbs_nobody(server: Server, count: int) -> None:
    requests, before = bodies("null", 6, 400), pids(server)
    clean = undisturbed(asyncio.run(gather(server.url, requests)))
    bad = {name: sample(server, "quartet:ipc_bad_frames_total", socket=name) for name in ("in", "ctl")}

    async def run() -> list[tuple[Any, ...]]:
        poured = asyncio.create_task(pour(server, count, Garbage(count)))
        answers = []
        while not poured.done():                                           # streams all the while
            answers.append(undisturbed(await gather(server.url, requests)))
        await poured
        return answers
    for answer in asyncio.run(run()):
        assert answer == clean
    assert pids(server) == before
    for name in bad:
        until(lambda name=name: sample(server, "quartet:ipc_bad_frames_total", socket=name) > bad[name] + count / 20,
              20, f"bad frames of '{name}' counted")
    assert undisturbed(asyncio.run(gather(server.url, requests))) == clean
    for name, held in resources(server).items():
        assert held.sockets < 100, (name, held)                            # no socket for a peer that does not exist


def test_frames_that_are_too_large_are_dropped(server: Server) -> None:
    before = pids(server)
    size = codec.MAX_HEADER + 1
    bad = sample(server, "quartet:ipc_bad_frames_total")
    with zmq.Context() as context:
        for name in INBOXES:
            with context.socket(zmq.PUSH) as sender:
                sender.setsockopt(zmq.LINGER, 30_000)
                sender.connect(f"ipc://{server.run_dir}/{name}")
                sender.send(b"\x91" * size)
    until(lambda: sample(server, "quartet:ipc_bad_frames_total") >= bad + len(INBOXES), 60, "all of them counted")
    assert undisturbed(asyncio.run(gather(server.url, bodies("null", 3, 20))))
    assert pids(server) == before


def test_bytes_that_are_no_zeromq_and_strange_subscribers(server: Server) -> None:
    rng, before = random.Random(5), pids(server)
    requests = bodies("null", 3, 20)
    clean = undisturbed(asyncio.run(gather(server.url, requests)))
    for name in INBOXES + BEACONS:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(5000), b"\xff\0\0\0\0\0\0\0\1\x7f" + rng.randbytes(200)):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(Path(server.run_dir) / name))
                try:
                    raw.sendall(data)
                except OSError:                                            # it has hung up on us, as it may
                    pass
    with zmq.Context() as context:
        for name in BEACONS:
            with context.socket(zmq.XSUB) as subscriber:
                subscriber.connect(f"ipc://{server.run_dir}/{name}")
                for data in (b"\x01b", b"\x01" + rng.randbytes(100), b"\x00never", rng.randbytes(50), b""):
                    subscriber.send(data)
    assert undisturbed(asyncio.run(gather(server.url, requests))) == clean
    assert pids(server) == before and server.get("/health")[0] == 200


# ---- HTTP ----------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e308, -0.0, 2**31, 2**63, -(2**63), 10**30, "", "a", "null", "\x00", "\u20ac" * 50,
    "x" * 5000, [], [[]], [None], [1], [-1], [2**40], [1.5], ["a"], ["a", 1], [[1, 2], [3]], {}, {"a": 1}, {"type": "text"},
    {"role": "user"}, [{}], [{"role": "user", "content": "x"}], [{"role": 1, "content": []}], {"1": 1, "x": -200},
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])
FIELDS = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
          "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "seed", "logit_bias",
          "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
          "tools", "tool_choice", "response_format", "user", "best_of", "suffix", "chat_template", "chat_template_kwargs",
          "add_generation_prompt", "continue_final_message", "priority", "cache_salt", "truncate_prompt_tokens",
          "return_token_ids", "request_id", "unknown_field", "guided_json", "documents", "metadata")
COMPLETION = {"model": "null", "prompt": "once upon", "max_tokens": 8, "temperature": 0, "stop": ["zz"], "seed": 1,
              "logit_bias": {"5": 1.0}, "stream_options": {"include_usage": True}, "stream": True}
CHAT = {"model": "null", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": [
    {"type": "text", "text": "hello"}]}], "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "logprobs": True,
    "top_logprobs": 2, "chat_template_kwargs": {"a": 1}}


def mutated(rng: random.Random, base: dict[str, Any]) -> bytes:
    """A body that is a few steps away from a good one, in its values, its shape or its bytes."""
    body = json.loads(json.dumps(base))
    for _ in range(rng.choice((1, 1, 2, 5))):
        here: Any = body
        key: Any = rng.choice([*here, rng.choice(FIELDS)])
        while rng.random() < 0.5 and isinstance(here, dict) and isinstance(here.get(key), (dict, list)) and here[key]:
            here = here[key]
            if isinstance(here, list):
                break
            key = rng.choice(list(here))
        if isinstance(here, list):
            here[rng.randrange(len(here))] = copy.deepcopy(rng.choice(VALUES))
        elif rng.random() < 0.15:
            here.pop(key, None)
        else:
            here[key] = copy.deepcopy(rng.choice(VALUES))
    data = json.dumps(body).encode()
    dice = rng.random()
    if dice < 0.1:
        return data[:rng.randrange(len(data))]
    if dice < 0.2:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if dice < 0.25:
        return rng.choice((b"", b"null", b"[]", b"NaN", b'{"a":' * 5000, b"[" * 100_000, b'{"prompt":1e999}', b"\xff\xfe{}",
                           b'{"prompt":"\\ud800","model":"null"}', data + data, b"\xef\xbb\xbf" + data))
    return data


async def mutate(server: Server, count: int) -> dict[int, int]:
    """How many mutated bodies were answered with each status; every answer is checked."""
    rng, statuses = random.Random(count), dict[int, int]()
    work = iter([(path, mutated(rng, base)) for _ in range(count // 2)
                 for path, base in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT))])

    async def worker(session: aiohttp.ClientSession) -> None:
        for path, data in work:
            async with session.post(server.url + path, data=data, headers={"Content-Type": "application/json"}) as answer:
                content = await answer.read()
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            assert answer.status < 500, (data, content)
            if answer.content_type == "text/event-stream":
                assert content.endswith(b"data: [DONE]\n\n") or b'"error"' in content[-500:], (data, content[-500:])
                assert b'"server_error"' not in content, (data, content[-500:])
            elif answer.status == 200:
                assert json.loads(content)["choices"], (data, content)
            else:
                error = json.loads(content)["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"], (data, content)
                assert error["type"] in ("invalid_request_error", "rate_limit_error"), (data, content)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:   # nothing may hang
        await asyncio.gather(*(worker(session) for _ in range(8)))
    return statuses


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_bodies_are_answered_or_refused_in_form(server: Server, count: int) -> None:
    before = pids(server)
    statuses = asyncio.run(mutate(server, count))
    print(f"{count} mutated bodies: {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) == count and statuses[200] > count / 20 and statuses[400] > count / 4
    assert pids(server) == before and server.get("/health")[0] == 200
    seen: list[Seen] = asyncio.run(gather(server.url, bodies("null", 3, 20)))
    assert undisturbed(seen)
