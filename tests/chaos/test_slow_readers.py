"""Clients that read slowly or not at all, and those that write slowly: nobody waits for them, and they cost little."""
from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.streams import Seen, bodies, gather, undisturbed
from tests.chaos.tools import Loads, Resources, connect, null_server, post, sample
from tests.serving import Server
from tests.waiting import until

MB = 2**20
TOKENS = 1000
RECEIVE_BUFFER = 4096                # bytes; with the server's own send buffer much less than a stream
# 5 log-probabilities make chunks so large that no kernel buffer holds the whole stream.
BODY: dict[str, Any] = {"model": "null", "prompt": "a long story", "max_tokens": TOKENS, "temperature": 0, "logprobs": 5,
                        "ignore_eos": True, "stream": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with null_server(step_s=0.002) as made:
        yield made
        made.assert_idle(10)


def read_to_the_end(connection: socket.socket) -> tuple[bytes, bytes]:
    """(head, body) of a chunked answer; the connection is kept open by its end."""
    data = bytearray()
    while not data.endswith(b"\r\n0\r\n\r\n"):
        piece = connection.recv(1 << 16)
        assert piece, data[-500:]
        data += piece
    head, _, rest = bytes(data).partition(b"\r\n\r\n")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[:int(size, 16)]
        rest = rest[int(size, 16) + 2:]
    return head, bytes(body)


def seen_of(body: bytes) -> tuple[Seen, int]:
    """What the events of a stream say, and how many chunks they are."""
    seen, chunks = Seen(status=200), 0
    for event in body.split(b"\n\n"):
        if event == b"data: [DONE]":
            seen.done += 1
        elif event.startswith(b"data: "):
            chunks += 1
            for choice in json.loads(event[6:])["choices"]:
                seen.take(choice)
    return seen, chunks


@pytest.mark.parametrize("readers", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_readers_that_do_not_read_cost_the_others_nothing_and_get_the_whole_text(server: Server, readers: int) -> None:
    clean = undisturbed(asyncio.run(gather(server.url, [BODY])))
    (frontend,) = server.pids("frontend")
    before = Resources.of(frontend).rss_bytes
    slow = [connect(server, RECEIVE_BUFFER) for _ in range(readers)]
    with Loads(server) as loads:
        tokens = sample(server, "vllm:generation_tokens_total")
        for connection in slow:
            connection.sendall(post("/v1/completions", BODY))
        until(lambda: loads.running, 10, "the streams running")
        normal = undisturbed(asyncio.run(gather(server.url, [BODY])))      # beside them, to its end
        until(lambda: sample(server, "vllm:generation_tokens_total") >= tokens + (readers + 1) * TOKENS,
              60 + readers, "all computed")
        until(lambda: not loads.running, 5, "the engine waits for nobody")
        assert normal == clean
        grown = Resources.of(frontend).rss_bytes - before
        print(f"{readers} readers that do not read: the frontend grew by {grown / MB:.1f} MB")
        assert grown < 20 * MB + readers * MB, grown                       # the text and its log-probabilities, merged
        for connection in slow:
            with connection:
                head, body = read_to_the_end(connection)
            seen, chunks = seen_of(body)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert undisturbed([seen])[0] == clean[0] and chunks < TOKENS / 2
        loads.until_idle()
    assert sample(server, "quartet:aborts_total", reason="slow_client") == 0


def test_a_stream_beside_readers_that_do_not_read_keeps_its_pace(server: Server) -> None:
    request = bodies("null", 1, 300)
    slow = [connect(server, RECEIVE_BUFFER) for _ in range(5)]
    alone = asyncio.run(gather(server.url, request))
    for connection in slow:
        connection.sendall(post("/v1/completions", BODY))
    beside = asyncio.run(gather(server.url, request))
    for connection in slow:
        connection.close()
    assert undisturbed(beside) == undisturbed(alone)
    assert beside[0].longest_gap_s < 2                                     # a blocked writer would make it a minute


def test_a_client_blocked_for_too_long_is_dropped_and_counted() -> None:
    with null_server("--slow-client-timeout", "1.5", step_s=0.002) as server, Loads(server) as loads:
        reader = connect(server, RECEIVE_BUFFER)
        with reader:
            reader.sendall(post("/v1/completions", BODY | {"n": 2, "temperature": 1, "seed": 1}))
            start = time.monotonic()
            until(lambda: sample(server, "quartet:aborts_total", reason="slow_client") == 1, 30, "given up")
            assert time.monotonic() - start > 1
            loads.until_idle()
            data = bytearray()
            with pytest.raises(ConnectionResetError):                      # cut, so that no end looks like one
                while True:
                    data += reader.recv(1 << 16) or pytest.fail("the stream was ended in good order")
            assert b"[DONE]" not in data and not data.endswith(b"0\r\n\r\n")
        clean = asyncio.run(gather(server.url, bodies("null", 1, 5)))
        assert undisturbed(clean) and sample(server, "quartet:aborts_total", reason="client_gone") == 0
        server.assert_idle()


@pytest.mark.parametrize("part", [b"POST /v1/completions HTT", post("/v1/completions", BODY)[:-30]],
                         ids=["headers", "body"])
def test_clients_that_never_finish_their_request_hinder_nobody(server: Server, part: bytes) -> None:
    slow = [connect(server) for _ in range(200)]
    for connection in slow:
        connection.sendall(part)
    answers = asyncio.run(gather(server.url, bodies("null", 6, 20)))
    assert undisturbed(answers)
    with Loads(server) as loads:
        loads.until_idle()                                                 # they hold no permit and no place
    for connection in slow:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", [b"POST /v1/completions HTT", post("/v1/completions", BODY)[:-30]],
                         ids=["headers", "body"])
def test_a_request_that_does_not_come_to_an_end_is_closed_after_a_minute(server: Server, part: bytes) -> None:
    with connect(server) as connection:
        connection.settimeout(100)
        connection.sendall(part)
        start, data = time.monotonic(), bytearray()
        while piece := connection.recv(4096):
            data += piece
        assert 50 < time.monotonic() - start < 90
        assert data.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in data
