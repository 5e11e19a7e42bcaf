"""Very many requests, a third of which are given up by their clients: no process grows, nothing stays open.

`SOAK_REQUESTS` changes the size of the long run (pytest -m slow); its figures are printed (-s).
"""
from __future__ import annotations

import asyncio
import os
import random
import re
import time
from urllib.parse import urlsplit

import pytest

from tests.chaos.streams import bodies, gather, undisturbed
from tests.chaos.tools import Loads, Resources, null_server, post, resources
from tests.serving import Server
from tests.waiting import until

MB = 2**20
CONNECTIONS = 32
ABORTED = 0.3
SAMPLES = 40
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def body(rng: random.Random) -> dict[str, object]:
    """Short requests of both kinds and all sizes."""
    made: dict[str, object] = {"model": "null", "prompt": "word " * rng.randrange(1, 60), "ignore_eos": True,
                               "max_tokens": rng.randrange(1, 17), "stream": rng.random() < 0.5}
    return made | rng.choice(({}, {}, {"n": 2}, {"stop": ["zq"]}, {"logprobs": 1}))


async def answered(reader: asyncio.StreamReader) -> None:
    """Read one whole answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    length = LENGTH.search(head)
    if length is not None:
        await reader.readexactly(int(length.group(1)))
    else:
        data = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), data[-300:]


class Soak:
    """Clients on connections that are kept, but for those that leave in the middle of an answer."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        self._host, self._port = parts.hostname, parts.port
        self.sent = self.aborted = 0

    async def run(self, count: int) -> None:
        self._goal = self.sent + count
        await asyncio.gather(*(self._client(random.Random(number)) for number in range(CONNECTIONS)))

    async def _client(self, rng: random.Random) -> None:
        writer: asyncio.StreamWriter | None = None
        while self.sent < self._goal:
            self.sent += 1
            if writer is None:
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=4 * MB)
            if rng.random() < ABORTED:
                self.aborted += 1
                writer.write(post("/v1/completions", body(rng) | {"max_tokens": 400}))
                await asyncio.sleep(rng.random() * 0.02)                   # any phase of the request
                writer.transport.abort()
                writer = None
            else:
                writer.write(post("/v1/completions", body(rng)))
                await asyncio.wait_for(answered(reader), 60)
        if writer is not None:
            writer.close()


def settled(server: Server) -> dict[str, Resources]:
    """What every process holds while nothing is going on."""
    with Loads(server) as loads:
        loads.until_idle(15)
    return resources(server)


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares: bytes per request."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    return (sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points))


def assert_flat(before: dict[str, Resources], after: dict[str, Resources]) -> None:
    """No descriptors, threads or sockets more than before: the connections of this test's own calls may differ."""
    for name, held in after.items():
        was = before[name]
        assert held.threads <= was.threads, (name, was, held)
        assert held.fds <= was.fds + 2 and held.sockets <= was.sockets + 2, (name, was, held)


def test_three_thousand_requests_leave_nothing_open() -> None:
    with null_server(step_s=0.001) as server:
        soak = Soak(server)
        asyncio.run(soak.run(500))
        before = settled(server)
        asyncio.run(soak.run(3000))
        assert soak.aborted > 0.25 * soak.sent
        with Loads(server) as loads:
            loads.until_idle()
        until(lambda: resources(server)["frontend"].fds <= before["frontend"].fds + 2, 10, "connections closed")
        after = settled(server)
        assert_flat(before, after)
        for name, held in after.items():
            assert held.rss_bytes - before[name].rss_bytes < 12 * MB, (name, before[name], held)
        assert undisturbed(asyncio.run(gather(server.url, bodies("null", 6, 20))))
        server.assert_idle()


@pytest.mark.slow
def test_a_hundred_thousand_requests_do_not_make_any_process_grow() -> None:
    count = int(os.environ.get("SOAK_REQUESTS", "100000"))
    with null_server(step_s=0.001) as server:
        soak, start = Soak(server), time.monotonic()
        asyncio.run(soak.run(count // 5))                                  # warm-up: caches and allocators fill up
        before, points = settled(server), dict[str, list[tuple[int, int]]]()
        for _ in range(SAMPLES):
            asyncio.run(soak.run(4 * count // 5 // SAMPLES))
            for name, held in resources(server).items():
                points.setdefault(name, []).append((soak.sent, held.rss_bytes))
        seconds = time.monotonic() - start
        print(f"{soak.sent} requests, {soak.aborted} of them aborted, in {seconds:.0f} s")
        growth = {name: 1e4 * slope(line) / MB for name, line in points.items()}
        for name, line in points.items():
            print(f"  {name}: {line[0][1] / MB:.1f} MB to {line[-1][1] / MB:.1f} MB, {growth[name]:+.2f} MB per 10^4")
        after = settled(server)
        assert_flat(before, after)
        assert max(growth.values()) < 1.0, growth
        server.assert_idle()
