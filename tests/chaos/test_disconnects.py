"""Clients that leave at any moment: their work stops at once, nothing of it stays, and nobody else notices."""
from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipeline.messages import Kind
from tests.chaos.streams import bodies, gather, undisturbed
from tests.chaos.tools import Loads, connect, null_server, post, sample
from tests.serving import Server
from tests.waiting import until

LONG: dict[str, Any] = {"model": "null", "prompt": "tell me everything", "max_tokens": 1900, "ignore_eos": True}
CHAT = {"model": "null", "messages": [{"role": "user", "content": "tell me everything"}], "max_tokens": 1900,
        "ignore_eos": True}
SOON_S = 3.0                     # an engine step and a beacon are 0.1 s; the machine may be busy


@pytest.fixture(scope="module")
def wide() -> Iterator[Server]:
    """A request of 1,900 tokens would take 40 seconds."""
    with null_server(step_s=0.02) as server:
        yield server
        server.assert_idle(10)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """One sequence at a time: a second request waits."""
    with null_server("--max-num-seqs", "1", step_s=0.02) as server:
        yield server
        server.assert_idle(10)


def reset(connection: socket.socket) -> None:
    """Leave without a word: RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextlib.contextmanager
def asked(server: Server, body: dict[str, Any], path: str = "/v1/completions",
          leave: Callable[[socket.socket], None] = socket.socket.close) -> Iterator[socket.socket]:
    """A client that has sent a request, and leaves at the end of the block."""
    connection = connect(server)
    try:
        connection.sendall(post(path, body))
        yield connection
    finally:
        leave(connection)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["fin", "rst"])
@pytest.mark.parametrize(("path", "body", "choices"), [
    ("/v1/completions", LONG | {"stream": True}, 1),
    ("/v1/completions", LONG, 1),
    ("/v1/chat/completions", CHAT | {"stream": True, "n": 4, "temperature": 1}, 4),
    ("/v1/chat/completions", CHAT | {"n": 4, "temperature": 1}, 4),
    ("/v1/completions", LONG | {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1, "stream": True}, 6),
    ("/v1/completions", LONG | {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1}, 6),
], ids=["stream", "plain", "stream-n4", "plain-n4", "stream-batch", "plain-batch"])
def test_a_client_that_leaves_takes_its_work_with_it(
        wide: Server, path: str, body: dict[str, Any], choices: int, leave: Callable[[socket.socket], None]) -> None:
    with Loads(wide) as loads:
        with asked(wide, body, path, leave) as connection:
            if body.get("stream"):
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            until(lambda: loads.running == choices, SOON_S, "all choices running")
            until(lambda: loads.of(Kind.FRONTEND).running == 1, SOON_S, "one request open")
            assert loads.of(Kind.ENGINE).kv_used > 0
        loads.until_idle(SOON_S)


@pytest.mark.parametrize("body", [LONG, LONG | {"stream": True}, LONG | {"n": 3, "temperature": 1}],
                         ids=["plain", "stream", "n3"])
def test_a_queued_request_whose_client_leaves_is_never_computed(narrow: Server, body: dict[str, Any]) -> None:
    computed = narrow.metric("vllm:prompt_tokens_total")
    with Loads(narrow) as loads:
        with asked(narrow, LONG | {"prompt": [1000, 1001, 1002]}):
            until(lambda: loads.running == 1, SOON_S, "one runs")
            with asked(narrow, body):
                until(lambda: loads.waiting == body.get("n", 1), SOON_S, "the other waits")
            until(lambda: loads.waiting == 0, SOON_S, "the other forgotten")
            assert loads.running == 1
        loads.until_idle(SOON_S)
    after = {"model": "null", "prompt": [1000, 1001], "max_tokens": 5, "ignore_eos": True}
    undisturbed(asyncio.run(gather(narrow.url, [after])))
    until(lambda: narrow.metric("vllm:prompt_tokens_total") >= computed + 5, SOON_S, "metrics published")
    assert narrow.metric("vllm:prompt_tokens_total") == computed + 5       # the first one's and the last one's


def test_those_who_left_are_counted(wide: Server) -> None:
    gone = sample(wide, "quartet:aborts_total", reason="client_gone")
    with Loads(wide) as loads:
        for body in (LONG, LONG | {"stream": True}):
            with asked(wide, body):
                until(lambda: loads.running == 1, SOON_S, "running")
            loads.until_idle(SOON_S)
    until(lambda: sample(wide, "quartet:aborts_total", reason="client_gone") == gone + 2, SOON_S, "counted")


@pytest.mark.parametrize("part", [b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
                                  post("/v1/completions", LONG)[:-20]], ids=["line", "headers", "body"])
def test_a_client_that_leaves_in_mid_request_leaves_nothing(wide: Server, part: bytes) -> None:
    for leave in (socket.socket.close, reset) * 10:
        connection = connect(wide)
        connection.sendall(part)
        leave(connection)
    undisturbed(asyncio.run(gather(wide.url, bodies("null", 1, 5))))
    with Loads(wide) as loads:
        loads.until_idle(SOON_S)


async def visit(host: str, port: int, rng: random.Random) -> None:
    """Connect, send (a part of) a request, read or not, and leave at a random phase."""
    content = post("/v1/completions", LONG | {
        "stream": rng.random() < 0.5, "n": rng.choice((1, 1, 2, 4)), "temperature": 1,
        "prompt": rng.choice(("x", ["x", "y"], "word " * rng.randrange(1, 500)))})
    await asyncio.sleep(rng.random())                                      # not all at the same moment
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return
    phase = rng.random()
    try:
        if phase < 0.1:
            return
        writer.write(content if phase > 0.25 else content[:rng.randrange(1, len(content))])
        await writer.drain()
        if phase > 0.4:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(rng.randrange(1, 4000)), rng.random())
    except ConnectionError:
        return
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


@pytest.mark.parametrize(("clients", "rounds"), [(100, 1), pytest.param(500, 10, marks=pytest.mark.slow)])
def test_a_storm_of_disconnects_leaves_nothing_and_a_survivor_right(wide: Server, clients: int, rounds: int) -> None:
    parts, rng = urlsplit(wide.url), random.Random(clients)
    survivors = bodies("null", 3, 100)
    clean = undisturbed(asyncio.run(gather(wide.url, survivors)))

    async def run() -> list[Any]:
        task = asyncio.create_task(gather(wide.url, survivors))
        for _ in range(rounds):
            await asyncio.gather(*(visit(parts.hostname, parts.port, rng) for _ in range(clients)))
        return undisturbed(await task)
    assert asyncio.run(run()) == clean
    with Loads(wide) as loads:
        loads.until_idle(SOON_S)
