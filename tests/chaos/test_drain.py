"""SIGTERM and SIGHUP with streams open: what can end in time does, the rest is told, and a reload closes nothing."""
from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.chaos.streams import Seen, ask, bodies, gather, undisturbed
from tests.chaos.tools import PIPELINE, null_server
from tests.serving import Server
from tests.waiting import until

SHUTDOWN_S = 4.0
STEP_S = 0.02


def request(tokens: int, *, stream: bool = True) -> dict[str, Any]:
    return bodies("null", 1, tokens, stream=stream)[0]


def call(connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Status, headers (names in small letters) and JSON of a POST."""
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())


async def streaming(server: Server, requests: list[dict[str, Any]], then: Any) -> tuple[list[Seen], Any]:
    """What each of the streams saw, and what `then` (in a thread, once all of them stream) gave."""
    chunks = dict.fromkeys(range(len(requests)), 0)
    async with httpx.AsyncClient(timeout=120) as client:
        tasks = [asyncio.create_task(ask(client, server.url, body, lambda count, n=n: chunks.update({n: count})))
                 for n, body in enumerate(requests)]
        while any(not chunks[n] for n, body in enumerate(requests) if body.get("stream")):
            await asyncio.wait(tasks, timeout=0.02)
        found = await asyncio.to_thread(then)
        return await asyncio.gather(*tasks), found


def test_a_drain_finishes_what_it_can_and_tells_the_rest() -> None:
    with null_server("--shutdown-timeout", str(SHUTDOWN_S), step_s=STEP_S) as server:
        clean = undisturbed(asyncio.run(gather(server.url, [request(100)])))
        parts = urlsplit(server.url)
        kept = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        assert call(kept, request(1, stream=False))[0] == 200

        def terminate() -> list[tuple[int, dict[str, str], Any]]:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.get("/health")[0] == 503, 10, "draining")
            assert server.get("/live")[0] == 200
            fresh = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
            return [call(kept, request(1, stream=False)), call(fresh, request(1))]
        start = time.monotonic()
        (short, long, plain), refusals = asyncio.run(streaming(
            server, [request(100), request(4000), request(4000, stream=False)], terminate))

        assert undisturbed([short]) == clean                               # 2 s of 4
        assert long.error["code"] == "draining" and long.done == 0 and not long.finishes
        assert clean[0][0][0] == long.texts[0][:len(clean[0][0][0])]       # what it got is right
        assert plain.status == 503 and plain.error["code"] == "draining"
        assert plain.headers["connection"] == "close"
        for status, headers, value in refusals:
            assert status == 503 and value["error"]["code"] == "draining"
            assert headers["connection"] == "close" and int(headers["retry-after"]) >= 1
        assert server.process.wait(30) == 0
        assert SHUTDOWN_S < time.monotonic() - start < 30


def test_a_drain_without_work_does_not_wait_for_kept_connections() -> None:
    with null_server("--shutdown-timeout", "60") as server:
        parts = urlsplit(server.url)
        kept = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        assert call(kept, request(1, stream=False))[0] == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        with pytest.raises((http.client.HTTPException, OSError)):
            call(kept, request(1, stream=False))


def test_a_stage_that_dies_during_the_drain_is_started_again() -> None:
    """A drain is no excuse: the stream still ends right, though the engine dies in the middle of it."""
    with null_server("--shutdown-timeout", "60", step_s=STEP_S) as server:
        clean = undisturbed(asyncio.run(gather(server.url, [request(150)])))

        def terminate_and_kill() -> None:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.get("/health")[0] == 503, 10, "draining")
            for stage in PIPELINE:
                os.kill(server.pids(stage)[0], signal.SIGKILL)
        (seen,), _ = asyncio.run(streaming(server, [request(150)], terminate_and_kill))
        assert undisturbed([seen]) == clean
        assert server.process.wait(30) == 0


def test_sighup_reloads_the_key_file_and_closes_no_stream(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old-key-1\n")

    def status(key: str) -> int:
        return httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    def reload() -> None:
        keys.write_text("# rotated\nnew-key-1\nnew-key-2\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: status("new-key-1") == 200, 10, "the new keys in force")
        assert status("new-key-2") == 200 and status("old-key-1") == 401
        keys.write_text("")                                                # a file without a key changes nothing
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "stay as they are" in server.logs(), 10, "the bad file noticed")
        assert status("new-key-1") == 200 and status("old-key-1") == 401 and status("none") == 401
    with null_server("--api-key-file", str(keys), "--metrics-need-key", step_s=STEP_S) as server:
        pids = {stage: server.pids(stage) for stage in ("frontend", *PIPELINE)}

        async def run() -> Seen:
            async with httpx.AsyncClient(timeout=60, headers={"Authorization": "Bearer old-key-1"}) as client:
                seen: list[int] = []
                task = asyncio.create_task(ask(client, server.url, request(200), seen.append))
                while not seen and not task.done():
                    await asyncio.wait([task], timeout=0.02)
                await asyncio.to_thread(reload)
                assert not task.done()                                     # 4 s of stream: reloading took less
                return await task
        undisturbed([asyncio.run(run())])
        assert {stage: server.pids(stage) for stage in ("frontend", *PIPELINE)} == pids
        assert "new-key" not in server.logs() + " ".join(server.lines)
