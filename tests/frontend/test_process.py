"""``python -m frontend`` as the launcher starts it, between peers of paper that speak real ZeroMQ."""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import zmq

from pipeline import codec, sockets
from pipeline.beacon import BEACON_TOPIC
from pipeline.config import HttpConfig, ServerConfig, TimeoutsConfig, save
from pipeline.endpoints import beacon_endpoint, endpoint
from pipeline.messages import Kind, State
from pipeline.transport import Address
from tests.frontend.served import PaperPipeline
from tests.frontend.test_streams import RawClient, completion, until
from tests.frontend.world import beacon, config

PEERS = (Kind.TOKENIZER, Kind.ENGINE, Kind.DETOKENIZER)
ROOT = Path(__file__).parent.parent.parent


class Peers(PaperPipeline):
    """Tokenizer, engine and detokenizer as sockets in the test's loop."""

    def __init__(self, server: ServerConfig) -> None:
        super().__init__()
        self.ctx = sockets.context()
        self.epochs = dict.fromkeys(PEERS, 1)
        self.to_frontend = sockets.push(self.ctx, endpoint(server, Address(Kind.FRONTEND, 0)))
        self._inboxes = [sockets.pull(self.ctx, endpoint(server, address)) for address in (
            Address(Kind.TOKENIZER, 0), Address(Kind.ENGINE, 0), Address(Kind.ENGINE, 0, "ctl"))]
        self._beacons = {kind: sockets.publisher(self.ctx, beacon_endpoint(server, kind, 0)) for kind in PEERS}
        self._task = asyncio.create_task(self._turn())

    def _handle(self, message: Any) -> None:
        self.to_frontend.send_multipart(codec.encode(message), zmq.NOBLOCK)

    def announce(self) -> None:
        for kind, publisher in self._beacons.items():
            told = beacon(kind, 0, self.epochs[kind], State.READY)
            publisher.send_multipart([BEACON_TOPIC, *codec.encode(told)], zmq.NOBLOCK)

    async def _turn(self) -> None:
        while True:
            self.announce()
            for _ in range(10):
                for inbox in self._inboxes:
                    with contextlib.suppress(zmq.Again):
                        while True:
                            self.send(Address(Kind.TOKENIZER, 0), codec.decode(inbox.recv_multipart(zmq.NOBLOCK)))
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.ctx.destroy(linger=0)


class Running:
    """A frontend process and its peers; what tests talk to like a `Served`."""

    def __init__(self, process: asyncio.subprocess.Process, peers: Peers, port: int, directory: Path) -> None:
        self.process, self.pipeline, self.port, self.directory = process, peers, port, directory
        self.url = f"http://127.0.0.1:{port}"

    async def metric(self, name: str) -> float:
        async with httpx.AsyncClient() as client:
            lines = (await client.get(self.url + "/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 20)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Running]:
    """Start the process, wait until it is ready, and let nothing outlive the test."""
    with tempfile.TemporaryDirectory(prefix="qf-") as name:
        directory = Path(name)
        server = config(run_dir=str(directory), log_dir=str(directory / "logs"), **changes)
        save(server, directory / "config.json")
        sock = socket.create_server(("127.0.0.1", 0), reuse_port=True)
        peers = Peers(server)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "frontend", "--config", str(directory / "config.json"), "--index", "0",
            "--epoch", "7", "--listen-fd", str(sock.fileno()), pass_fds=[sock.fileno()], cwd=ROOT)
        found = Running(process, peers, sock.getsockname()[1], directory)
        try:
            async with httpx.AsyncClient(timeout=20) as client:
                while (await client.get(found.url + "/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
            yield found
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await peers.close()
            sock.close()


async def test_it_serves_over_zeromq_stays_light_and_ends_cleanly() -> None:
    async with running() as server, httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        answer = await client.post("/v1/completions", json={"prompt": "count 200", "max_tokens": 256})
        assert answer.json()["choices"][0]["text"] == "".join(f"{i} " for i in range(200))
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert not [lib for lib in ("libtorch", "tokenizers.abi3", "transformers") if lib in maps]
        assert server.pipeline.submits[0].rid >> 45 & 0xFFF == 7          # ids carry the epoch
        server.process.send_signal(signal.SIGTERM)
        assert await server.ended() == 0
        assert not [p.name for p in server.directory.iterdir() if p.name.startswith("frontend")]


async def test_garbage_is_dropped_and_counted_while_real_traffic_flows() -> None:
    async with running() as server, httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        rng = random.Random(1)
        good = codec.encode(beacon(Kind.ENGINE, 0))              # a message that no frontend receives
        for i in range(200):
            server.pipeline.to_frontend.send_multipart([
                good[0] if i % 4 == 0 else rng.randbytes(rng.randrange(60)), *[b"x"] * (i % 3)])
        answer = await client.post("/v1/completions", json={"prompt": "say fine"})
        assert answer.json()["choices"][0]["text"] == "fine"
        for _ in range(100):
            if await server.metric("quartet:ipc_bad_frames_total") >= 200:
                break
            await asyncio.sleep(0.05)
        assert await server.metric("quartet:ipc_bad_frames_total") == 200


async def test_an_engine_that_restarts_is_given_the_rest_of_the_stream() -> None:
    async with running() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say a|b|c"))  # type: ignore[arg-type]
        await until(lambda: server.pipeline.submits)
        for _ in range(2):
            server.pipeline.step()
        await client.head()
        assert '"text":"a"' in await client.chunk()
        server.pipeline.epochs[Kind.ENGINE] = 2
        await until(lambda: len(server.pipeline.submits) == 2)
        old, new = server.pipeline.submits
        assert new.route.engine_epoch == 2 and new.history == b"\n\0\0\0" and new.ids and new.text is None
        await until(lambda: old.rid in server.pipeline.aborted)
        client.reset()
        await until(lambda: new.rid in server.pipeline.aborted)


async def test_a_drain_lets_streams_finish_and_refuses_new_requests() -> None:
    async with running() as server, httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        server.pipeline.manual = True
        stream = await RawClient.post(server, "/v1/completions", completion(prompt="say a|b"))  # type: ignore[arg-type]
        await until(lambda: server.pipeline.submits)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(500):
            if (await client.get("/ready")).status_code == 503:
                break
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        server.pipeline.run()
        assert "200" in await stream.head()
        rest = (await asyncio.wait_for(stream.reader.read(), 5)).decode()
        events = [line for line in rest.splitlines() if line.startswith("data: ")]
        assert "".join(json.loads(e[6:])["choices"][0]["text"] for e in events[:-1]) == "ab"
        assert events[-1] == "data: [DONE]"
        assert await server.ended() == 0


async def test_a_drain_ends_what_does_not_finish_with_an_error_event() -> None:
    timeouts = TimeoutsConfig(shutdown_s=0.3)
    async with running(timeouts=timeouts, http=HttpConfig(keep_alive_s=0.05)) as server:
        stream = await RawClient.post(server, "/v1/completions", completion(prompt="hang"))  # type: ignore[arg-type]
        plain = await RawClient.post(server, "/v1/completions", {"prompt": "hang"})  # type: ignore[arg-type]
        await until(lambda: len(server.pipeline.submits) == 2)
        await stream.head()
        server.process.send_signal(signal.SIGTERM)
        rest = (await asyncio.wait_for(stream.reader.read(), 5)).decode()
        assert '"code":"draining"' in rest and "[DONE]" not in rest
        assert (await plain.head()).startswith("HTTP/1.1 503")
        assert await server.ended() == 0
        assert server.pipeline.aborted == {s.rid for s in server.pipeline.submits}


async def test_a_second_signal_means_now() -> None:
    async with running() as server:
        client = await RawClient.post(server, "/v1/completions", {"prompt": "hang"})  # type: ignore[arg-type]
        await until(lambda: server.pipeline.submits)
        server.process.send_signal(signal.SIGTERM)
        written = server.directory / "logs/frontend.0.log"           # by a thread of its own, with the first record
        await until(lambda: written.exists() and "draining" in written.read_text())
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.process.wait(), 3) == 0
        client.reset()


async def test_sighup_reloads_keys_and_closes_no_stream() -> None:
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name) / "keys"
        keys.write_text("old\n")
        os.chmod(keys, 0o600)
        async with running(http=HttpConfig(api_key_file=str(keys))) as server, \
                httpx.AsyncClient(base_url=server.url, timeout=10) as client:
            server.pipeline.manual = True
            stream = asyncio.create_task(client.post("/v1/completions", json={"prompt": "say a"},
                                                     headers={"Authorization": "Bearer old"}))
            await until(lambda: server.pipeline.submits)
            keys.write_text("new\n")
            server.process.send_signal(signal.SIGHUP)
            for _ in range(500):
                status = (await client.get("/v1/models", headers={"Authorization": "Bearer new"})).status_code
                if status == 200:
                    break
                await asyncio.sleep(0.01)
            assert status == 200
            assert (await client.get("/v1/models", headers={"Authorization": "Bearer old"})).status_code == 401
            server.pipeline.run()
            assert (await stream).status_code == 200
