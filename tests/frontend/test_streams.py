"""Streams and disconnects over real sockets: what a client sees, and that its leaving stops the work."""
from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError

from frontend import streaming
from frontend.sse import CompletionStream
from pipeline.config import HttpConfig
from pipeline.errors import QuartetError
from pipeline.messages import AbortReason, Kind, State
from tests.frontend.served import Served, served


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Let the loop turn until the condition holds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "not within the time"
        await asyncio.sleep(0.005)


class RawClient:
    """A connection on which a test sees every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def post(cls, server: Served, path: str, body: dict[str, Any], *, receive_buffer: int = 0) -> RawClient:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**14)
        data = json.dumps(body).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return cls(reader, writer)

    async def head(self) -> str:
        return (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode()

    async def chunk(self) -> str:
        """The next HTTP chunk; empty at the end."""
        size = int(await asyncio.wait_for(self.reader.readline(), 5), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2].decode()

    def reset(self) -> None:
        self.writer.transport.abort()


def completion(**body: Any) -> dict[str, Any]:
    return {"prompt": "hi", "stream": True, **body}


def data_of(events: str) -> list[Any]:
    """The JSON of the events in a chunk."""
    return [json.loads(e[6:]) for e in events.split("\n\n") if e.startswith("data: {")]


# ---- the form of a stream ----

async def test_events_come_as_they_are_made() -> None:
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say a|b"))
        await until(lambda: server.pipeline.submits)
        server.pipeline.step()                               # admitted: nothing to see
        server.pipeline.step()
        head = (await client.head()).lower()
        for line in ("http/1.1 200 ok", "content-type: text/event-stream; charset=utf-8", "cache-control: no-cache",
                     "x-accel-buffering: no", "transfer-encoding: chunked", "x-request-id: "):
            assert line in head
        assert [c["choices"][0]["text"] for c in data_of(await client.chunk())] == ["a"]
        server.pipeline.step()
        last = await client.chunk()
        assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in data_of(last)] == [("b", "stop")]
        assert last.endswith("data: [DONE]\n\n") and await client.chunk() == ""
        client.writer.close()


async def test_what_comes_while_the_reader_sleeps_is_merged() -> None:
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say a|b|c|d"))
        await until(lambda: server.pipeline.submits)
        server.pipeline.run()                                # all within one turn of the loop
        await client.head()
        body = await client.reader.readuntil(b"[DONE]\n\n")
        assert [c["choices"][0]["text"] for c in data_of(body.decode())] == ["abcd"]
        client.writer.close()


@pytest.mark.parametrize("by_hand_s", [60.0, 0.0])
async def test_tokens_in_the_middle_come_by_turns_of_the_loop_whoever_writes_them(
        by_hand_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BY_HAND_S", by_hand_s)
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say a|b|c|d|e", n=2))
        await until(lambda: server.pipeline.submits)
        texts = []
        for steps in (3, 2, 4, 2):
            for _ in range(steps):
                server.pipeline.step()
            if not texts:
                await client.head()
            texts.append([(c["choices"][0]["index"], c["choices"][0]["text"]) for c in data_of(await client.chunk())])
        assert texts == [[(0, "a"), (1, "a")], [(0, "b"), (1, "b")], [(0, "cd"), (1, "cd")], [(0, "e"), (1, "e")]]
        assert await client.chunk() == ""
        client.writer.close()


async def test_a_chunk_that_cannot_be_written_ends_its_stream_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CompletionStream.events

    def events(self: CompletionStream, updates: list[Any]) -> bytes:
        if any(update.text == "bad" for update in updates):
            raise ArithmeticError("as you asked")
        return real(self, updates)
    monkeypatch.setattr(CompletionStream, "events", events)
    async with served() as server:
        paper = server.pipeline
        paper.manual = True
        clients = []
        for prompt in ("say a|bad|c", "say a|b|c"):
            clients.append(await RawClient.post(server, "/v1/completions", completion(prompt=prompt)))
            await until(lambda: len(paper.submits) == len(clients))
            paper.next_one()
            paper.step()                                     # admitted, and the first token
            paper.step()
            await clients[-1].head()
            await clients[-1].chunk()
        for _ in clients:                                    # both go on in one turn of the loop
            paper.next_one()
            paper.step()
        assert data_of(await clients[1].chunk())[0]["choices"][0]["text"] == "b"
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await asyncio.wait_for(clients[0].reader.readexactly(1), 5)
        assert len(server.table) == 1
        paper.run()
        assert data_of(await clients[1].chunk())[0]["choices"][0]["text"] == "c"
        for client in clients:
            client.writer.close()


async def test_errors_before_the_first_token_are_plain_http() -> None:
    async with served() as server:
        client = await RawClient.post(server, "/v1/completions", completion(prompt="fail context_length_exceeded"))
        assert (await client.head()).startswith("HTTP/1.1 400")
        client.writer.close()


async def test_errors_after_the_headers_are_an_event_and_an_end_without_done() -> None:
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion())
        await until(lambda: server.pipeline.submits)
        server.pipeline.step()
        server.pipeline.step()
        await client.head()
        await client.chunk()
        server.table.fail_all(QuartetError("engine_unavailable", "gone"))
        rest = (await asyncio.wait_for(client.reader.read(), 5)).decode()
        assert '{"error":{"message":"gone","type":"server_error","param":null,"code":"engine_unavailable"}}' in rest
        assert "[DONE]" not in rest and rest.endswith("0\r\n\r\n")     # a clean end, and the connection is closed


async def test_quiet_streams_get_headers_and_comments() -> None:
    async with served(http=HttpConfig(keep_alive_s=0.05)) as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say a"))
        assert (await client.head()).startswith("HTTP/1.1 200")
        assert [await client.chunk() for _ in range(3)] == [": keep-alive\n\n"] * 3
        server.pipeline.run()
        chunk = await client.chunk()
        while chunk.startswith(":"):
            chunk = await client.chunk()
        assert data_of(chunk)[0]["choices"][0]["text"] == "a"
        client.writer.close()


async def test_an_error_after_a_comment_is_an_event() -> None:
    async with served(http=HttpConfig(keep_alive_s=0.05)) as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="fail numerical_error"))
        await client.head()
        await client.chunk()
        server.pipeline.run()
        rest = (await asyncio.wait_for(client.reader.read(), 5)).decode()
        assert '"code":"numerical_error"' in rest and "[DONE]" not in rest


# ---- clients that leave ----

@pytest.mark.parametrize("body", [completion(prompt="hang"), {"prompt": "hang"}, {"prompt": ["hang", "hang"], "n": 3},
                                  {"prompt": "hang", "cache_salt": "x" * 100, "user": "x" * 300_000}])
@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_leaving_aborts_everything(body: dict[str, Any], leave: str) -> None:
    async with served() as server:
        client = await RawClient.post(server, "/v1/completions", body)
        await until(lambda: len(server.pipeline.submits) == (2 if isinstance(body["prompt"], list) else 1))
        if leave == "reset":
            client.reset()
        else:
            client.writer.close()
        await until(lambda: not len(server.table))
        assert server.pipeline.aborted == {s.rid for s in server.pipeline.submits}
        for _ in range(10):
            await asyncio.sleep(0)                           # what Sanic does after its task was cancelled
        count = server.registry.get_sample_value
        route = {"handler": "/v1/completions", "method": "POST"}
        assert count("http_requests_total", {**route, "status": "4xx"}) == 1      # 499 in the log, and no 5xx anywhere
        assert count("http_requests_total", {"handler": "other", "method": "POST", "status": "5xx"}) is None
        assert count("quartet:aborts_total", {"reason": "client_gone"}) == 1


async def test_leaving_in_the_middle_of_a_stream() -> None:
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "hi"}], "stream": True})
        await until(lambda: server.pipeline.submits)
        server.pipeline.step()
        server.pipeline.step()
        await client.head()
        client.reset()
        await until(lambda: not len(server.table))
        assert server.pipeline.aborted == {server.pipeline.submits[0].rid}


async def test_leaving_while_the_engine_is_away() -> None:
    async with served() as server:
        server.latest[Kind.ENGINE, 0].beacon.state = State.STARTING
        client = await RawClient.post(server, "/v1/completions", {"prompt": "x"})
        await until(lambda: len(server.table) == 1)
        client.reset()
        await until(lambda: not len(server.table))
        assert server.pipeline.submits == []


async def test_a_storm_of_clients_that_leave_spares_the_one_that_stays() -> None:
    async with served() as server:
        clients = [await RawClient.post(server, "/v1/completions", completion(prompt="hang", n=2)) for _ in range(50)]
        stays = await RawClient.post(server, "/v1/completions", {"prompt": "say all|there"})
        for client in clients:
            client.reset()
        assert "200" in await stays.head()
        stays.writer.close()
        await server.idle()
        assert len(server.pipeline.aborted) == 50


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    async with served(http=HttpConfig(slow_client_s=0.2)) as server:
        reasons: list[AbortReason | None] = []
        closed = server.frontend.metrics.closed
        server.frontend.metrics.closed = (  # type: ignore[method-assign]
            lambda request, reason: (reasons.append(reason), closed(request, reason))[1])
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(
            prompt="say " + "|".join(["x" * 2**18] * 16)), receive_buffer=4096)
        await until(lambda: server.pipeline.submits)
        while server.pipeline.step():
            await asyncio.sleep(0.01)
        await until(lambda: not len(server.table))
        assert reasons == [AbortReason.SLOW_CLIENT]
        client.reset()


async def test_a_slow_reader_gets_the_whole_text() -> None:
    async with served() as server:
        server.pipeline.manual = True
        client = await RawClient.post(server, "/v1/completions", completion(prompt="say " + "|".join(
            f"{i:06d}" * 30_000 for i in range(16)), max_tokens=100), receive_buffer=4096)
        await until(lambda: server.pipeline.submits)
        while server.pipeline.step():
            await asyncio.sleep(0)
        await client.head()
        text, events = "", ""
        while chunk := await client.chunk():
            events += chunk
        chunks = data_of(events)
        text = "".join(c["choices"][0]["text"] for c in chunks)
        assert text == "".join(f"{i:06d}" * 30_000 for i in range(16)) and len(chunks) < 16
        client.writer.close()


# ---- the official client ----

async def test_the_openai_client() -> None:
    async with served(http=HttpConfig(api_keys=("sesame",))) as server:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "say Par|is"}]
            chat = await client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2,
                                                        n=2, max_completion_tokens=10)
            assert [c.message.content for c in chat.choices] == ["Paris", "Paris"] and chat._request_id
            assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
            assert [t.token for t in chat.choices[0].logprobs.content] == ["Par", "is"]
            assert chat.usage and chat.usage.completion_tokens == 4 and chat.usage.prompt_tokens_details
            text, reasons, usage = "", [], None
            async for chunk in await client.chat.completions.create(
                    model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}):
                assert chunk.id.startswith("chatcmpl-")
                usage = chunk.usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    reasons.append(choice.finish_reason)
            assert text == "Paris" and reasons[-1] == "stop" and usage and usage.completion_tokens == 2
            done = await client.completions.create(model="tiny", prompt=["say a", "say b"], echo=True, logprobs=1)
            assert [c.text for c in done.choices] == ["say aa", "say bb"]
            assert [m.id async for m in client.models.list()] == ["tiny", "alias"]
            with pytest.raises(BadRequestError) as bad:
                await client.chat.completions.create(model="tiny", messages=messages, temperature=9)
            assert bad.value.param == "temperature" and bad.value.code == "invalid_value"
            with pytest.raises(NotFoundError) as missing:
                await client.chat.completions.create(model="gpt", messages=messages)
            assert missing.value.code == "model_not_found"
            with pytest.raises(InternalServerError):
                await client.completions.create(model="tiny", prompt="fail internal_error")


async def test_the_openai_client_sees_a_broken_stream_as_an_error() -> None:
    async with served(http=HttpConfig(keep_alive_s=0.02)) as server:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            stream = await client.completions.create(model="tiny", prompt="hang", stream=True)
            server.table.fail_all(QuartetError("timeout", "too late"))
            with pytest.raises(APIError, match="too late"):
                async for _ in stream:
                    pass
