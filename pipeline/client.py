"""The in-cluster client: the HTTP API's calls over ZeroMQ and msgpack, without HTTP.

`AsyncClient` lives in an asyncio loop; `Client` is the same for synchronous callers, on a thread of its own. Requests
take the keyword arguments of the HTTP bodies. Streams give `Delta` records whose token ids are numpy arrays. An
error answer raises `ApiError` with the HTTP status and the OpenAI-shaped error. Standalone: imports no stage.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq

from pipeline import edge, keys
from pipeline.schema import BadFrame

T = TypeVar("T")
CONNECT_S = 10.0


@dataclass(eq=False)
class ApiError(Exception):
    """An error answer: HTTP status and the body's `error` object."""

    status: int
    error: dict[str, Any]

    def __str__(self) -> str:
        return str(self.error.get("message", ""))

    @property
    def code(self) -> str | None:
        return self.error.get("code")


@dataclass(slots=True)
class Delta:
    """A piece of one choice of a stream."""

    index: int
    text: str
    token_ids: np.ndarray                     # uint32 [n]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)     # chat with tools or reasoning: HTTP's deltas, all of it


@dataclass(slots=True, eq=False)
class _Call:
    """One call in flight: what has come and was not taken yet; at most CREDIT messages of it."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    chunks: deque[list[edge.Chunk]] = field(default_factory=deque)
    end: edge.Reply | edge.End | edge.Vectors | ApiError | None = None

    def finish(self, end: edge.Reply | edge.End | edge.Vectors | ApiError) -> None:
        self.end = self.end or end
        self.ready.set()


def _lost(reason: str) -> ApiError:
    return ApiError(503, {"message": f"The connection to the server was lost: {reason}.", "type": "server_error",
                          "param": None, "code": "connection_lost"})


class Stream:
    """The deltas of one streamed call: iterate it. `usage` is there at the end; `cancel` or leaving aborts the work."""

    def __init__(self, client: AsyncClient, cid: int, call: _Call) -> None:
        self._client, self._cid, self._call = client, cid, call
        self._pending: deque[edge.Chunk] = deque()
        self._owed = 0                                    # messages taken since the last Credit
        self.usage: dict[str, Any] | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        try:
            while not self._pending:
                if self._call.chunks:
                    self._pending.extend(self._call.chunks.popleft())
                    self._owed += 1
                    if self._owed >= edge.CREDIT // 2:
                        self._client.send(edge.Credit(self._cid, self._owed))
                        self._owed = 0
                elif self._call.end is not None:
                    self._finish(self._call.end)
                else:
                    self._call.ready.clear()
                    await self._call.ready.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        chunk = self._pending.popleft()
        parts = json.loads(chunk.deltas_json) if chunk.deltas_json else []
        text = chunk.text + "".join(part["content"] or "" for part in parts)
        return Delta(chunk.index, text, np.frombuffer(chunk.ids, dtype="<u4"), chunk.finish, chunk.stop,
                     json.loads(chunk.logprobs_json) if chunk.logprobs_json else None, parts)

    def cancel(self) -> None:
        """Stop the work of this call. Idempotent."""
        self._client.forget(self._cid, self._call)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _finish(self, end: edge.Reply | edge.End | edge.Vectors | ApiError) -> None:
        self._client.forget(self._cid, self._call)
        if isinstance(end, ApiError):
            raise end
        if isinstance(end, edge.Reply):
            raise ApiError(end.status, json.loads(end.body_json).get("error", {}))
        assert isinstance(end, edge.End)
        self.usage = json.loads(end.usage_json)
        raise StopAsyncIteration


class AsyncClient:
    """`async with AsyncClient("ipc:///run/quartet.0") as client: await client.chat(...)`.

    `key_dir`: a directory made by ``quartet keys``, needed for TCP that is not loopback.
    """

    def __init__(self, endpoint: str, *, api_key: str = "", key_dir: str | Path | None = None) -> None:
        self._endpoint, self._api_key = endpoint, api_key
        self._key_dir = Path(key_dir) if key_dir is not None else None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._calls: dict[int, _Call] = {}
        self._cids = itertools.count(1)
        self._welcome: asyncio.Future[edge.Welcome] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = time.monotonic()
        self._label = f"{socket.gethostname()}:{os.getpid()}"[:64]
        self.models: list[str] = []

    # ---- life ------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Greet the server; ApiError when it does not answer within 10 s or refuses the key."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 1000)
        self._socket.setsockopt(zmq.RCVHWM, 10_000)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if self._key_dir is not None:
            keys.as_client(self._socket, self._key_dir)
        self._socket.connect(self._endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._drain)
        self._greet()
        self._tasks = [asyncio.create_task(self._keep_alive())]
        try:
            assert self._welcome is not None
            self.models = (await asyncio.wait_for(asyncio.shield(self._welcome), CONNECT_S)).models
        except TimeoutError:
            await self.close()
            raise _lost("no answer from " + self._endpoint) from None
        except ApiError:
            await self.close()
            raise

    async def close(self) -> None:
        """Abort what is open and leave."""
        for cid, call in list(self._calls.items()):
            self.forget(cid, call)
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context is not None:
            self._loop.remove_reader(self._socket.FD)
            self._context.destroy(linger=200)
            self._context = None

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- calls -----------------------------------------------------------------------------------------------

    async def chat(self, *, request_id: str = "", **body: Any) -> dict[str, Any]:
        """POST /v1/chat/completions: the whole answer."""
        return await self._whole("chat", body, request_id)

    async def completions(self, *, request_id: str = "", **body: Any) -> dict[str, Any]:
        """POST /v1/completions: the whole answer."""
        return await self._whole("completions", body, request_id)

    async def stream_chat(self, *, request_id: str = "", **body: Any) -> Stream:
        """POST /v1/chat/completions as a stream of deltas."""
        return self._stream("chat", body, request_id)

    async def stream_completions(self, *, request_id: str = "", **body: Any) -> Stream:
        """POST /v1/completions as a stream of deltas."""
        return self._stream("completions", body, request_id)

    async def tokenize(self, **body: Any) -> dict[str, Any]:
        """POST /tokenize; `tokens` is a uint32 array."""
        answer = await self._whole("tokenize", body, "")
        return answer | {"tokens": np.asarray(answer["tokens"], dtype=np.uint32)}

    async def detokenize(self, tokens: Any, **body: Any) -> str:
        """POST /detokenize: the text of token ids (any integer sequence or array)."""
        answer = await self._whole("detokenize", body | {"tokens": np.asarray(tokens).tolist()}, "")
        return str(answer["prompt"])

    async def embed(self, input: Any, *, request_id: str = "", **body: Any) -> np.ndarray:
        """POST /v1/embeddings: float32 [inputs, dimensions]. `input`: texts, or token ids as lists or arrays."""
        return (await self._vectors("embeddings", body | {"input": _plain(input)}, request_id))[0]

    async def pooling(self, input: Any, *, request_id: str = "", **body: Any) -> list[np.ndarray]:
        """POST /pooling: of each input float32 [rows, width]; a row per token with a task such as token_embed."""
        data, rows = await self._vectors("pooling", body | {"input": _plain(input)}, request_id)
        return np.split(data, np.cumsum(rows)[:-1])

    async def classify(self, input: Any, *, request_id: str = "", **body: Any) -> dict[str, Any]:
        """POST /classify: the whole answer."""
        return await self._whole("classify", body | {"input": _plain(input)}, request_id)

    async def score(self, text_1: Any, text_2: Any, *, request_id: str = "", **body: Any) -> np.ndarray:
        """POST /score: float32, one per pair."""
        answer = await self._whole("score", body | {"text_1": text_1, "text_2": text_2}, request_id)
        return np.asarray([entry["score"] for entry in answer["data"]], dtype=np.float32)

    async def rerank(self, query: str, documents: list[Any], *, request_id: str = "", **body: Any) -> dict[str, Any]:
        """POST /rerank: the whole answer; `results` has the best document first."""
        return await self._whole("rerank", body | {"query": query, "documents": documents}, request_id)

    async def health(self) -> dict[str, Any]:
        """GET /health; ApiError 503 when the server cannot answer requests."""
        return await self._whole("health", {}, "")

    # ---- inside ----------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Never waits; what a dead connection does not take is lost, and the lease tells the rest."""
        if self._context is not None:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(edge.encode(message), zmq.NOBLOCK)
            self._loop.call_soon(self._drain)              # a send may swallow the edge of the socket's descriptor

    def forget(self, cid: int, call: _Call) -> None:
        """The caller is done with a call; what is unfinished of it is cancelled."""
        if self._calls.pop(cid, None) is not None and call.end is None:
            self.send(edge.Cancel(cid))
            call.finish(_lost("the call was cancelled"))

    def _greet(self) -> None:
        self._welcome = asyncio.get_running_loop().create_future()
        self.send(edge.Hello(edge.PROTOCOL, self._label, self._api_key))

    def _open(self, op: str, body: dict[str, Any], stream: bool, request_id: str) -> tuple[int, _Call]:
        if len(self._calls) >= edge.MAX_CALLS:
            raise ApiError(429, {"message": f"This client has {edge.MAX_CALLS} calls open already.", "param": None,
                                 "type": "rate_limit_error", "code": "server_overloaded"})
        cid, call = next(self._cids) & 0xFFFFFFFF, _Call()
        self._calls[cid] = call
        self.send(edge.Call(cid, op, json.dumps(body).encode(), stream, request_id))
        return cid, call

    async def _ended(self, op: str, body: dict[str, Any], request_id: str) -> edge.Reply | edge.Vectors:
        """The answer of a call that is no stream; ApiError for an error."""
        cid, call = self._open(op, body, False, request_id)
        try:
            await call.ready.wait()
        finally:
            self.forget(cid, call)
        end = call.end
        if isinstance(end, ApiError):
            raise end
        assert isinstance(end, (edge.Reply, edge.Vectors))
        if isinstance(end, edge.Reply) and end.status >= 400:
            raise ApiError(end.status, json.loads(end.body_json).get("error", {}))
        return end

    async def _whole(self, op: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        end = await self._ended(op, body, request_id)
        assert isinstance(end, edge.Reply)
        return dict(json.loads(end.body_json))

    async def _vectors(self, op: str, body: dict[str, Any], request_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of all inputs, and how many each has."""
        end = await self._ended(op, body, request_id)
        assert isinstance(end, edge.Vectors)
        return end.data, np.frombuffer(end.rows, dtype="<u4")

    def _stream(self, op: str, body: dict[str, Any], request_id: str) -> Stream:
        return Stream(self, *self._open(op, body | {"stream": True}, True, request_id))

    def _drain(self) -> None:
        """Read until the socket is empty: its descriptor is edge-triggered."""
        while self._context is not None:
            try:
                message = edge.decode(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            except BadFrame:
                continue
            self._heard = time.monotonic()
            self._handle(message)

    def _handle(self, message: Any) -> None:
        if isinstance(message, edge.Chunks):
            groups: dict[int, list[edge.Chunk]] = {}
            for chunk in message.items:
                groups.setdefault(chunk.cid, []).append(chunk)
            for cid, chunks in groups.items():
                call = self._calls.get(cid)
                if call is not None:
                    call.chunks.append(chunks)
                    call.ready.set()
        elif isinstance(message, (edge.Reply, edge.End, edge.Vectors)):
            call = self._calls.get(message.cid)
            if call is not None:
                call.finish(message)
            elif isinstance(message, edge.Reply) and message.cid == 0 and self._welcome and not self._welcome.done():
                self._welcome.set_exception(ApiError(message.status, json.loads(message.body_json).get("error", {})))
        elif isinstance(message, edge.Welcome):
            if self._welcome is not None and not self._welcome.done():
                self._welcome.set_result(message)
        elif isinstance(message, edge.Reset):
            self._lose(message.reason)
            self._greet()

    def _lose(self, reason: str) -> None:
        for call in self._calls.values():
            call.finish(_lost(reason))

    async def _keep_alive(self) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(edge.PING_MS / 1000)
            self.send(edge.Ping(number & 0xFFFFFFFF))
            if time.monotonic() - self._heard > edge.LEASE_MS / 1000:
                self._lose(f"nothing was heard for {edge.LEASE_MS // 1000} s")


def _plain(value: Any) -> Any:
    """Token ids in arrays as lists, texts as they are."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return [ids.tolist() for ids in value]
    return value


class SyncStream:
    """A Stream for synchronous callers."""

    def __init__(self, client: Client, stream: Stream) -> None:
        self._client, self._stream = client, stream

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        delta = self._client._run(_next(self._stream))
        if delta is None:
            raise StopIteration
        return delta

    def cancel(self) -> None:
        self._client._loop.call_soon_threadsafe(self._stream.cancel)

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def usage(self) -> dict[str, Any] | None:
        return self._stream.usage


async def _next(stream: Stream) -> Delta | None:
    async for delta in stream:
        return delta
    return None


class Client:
    """The synchronous client; safe to share between threads."""

    def __init__(self, endpoint: str, *, api_key: str = "", key_dir: str | Path | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="quartet-client", daemon=True)
        self._thread.start()
        self._client = AsyncClient(endpoint, api_key=api_key, key_dir=key_dir)
        try:
            self._run(self._client.connect())
        except BaseException:
            self._stop()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def models(self) -> list[str]:
        return self._client.models

    def chat(self, **body: Any) -> dict[str, Any]:
        return self._run(self._client.chat(**body))

    def completions(self, **body: Any) -> dict[str, Any]:
        return self._run(self._client.completions(**body))

    def stream_chat(self, **body: Any) -> SyncStream:
        return SyncStream(self, self._run(self._client.stream_chat(**body)))

    def stream_completions(self, **body: Any) -> SyncStream:
        return SyncStream(self, self._run(self._client.stream_completions(**body)))

    def tokenize(self, **body: Any) -> dict[str, Any]:
        return self._run(self._client.tokenize(**body))

    def detokenize(self, tokens: Any, **body: Any) -> str:
        return self._run(self._client.detokenize(tokens, **body))

    def embed(self, input: Any, **body: Any) -> np.ndarray:
        return self._run(self._client.embed(input, **body))

    def pooling(self, input: Any, **body: Any) -> list[np.ndarray]:
        return self._run(self._client.pooling(input, **body))

    def classify(self, input: Any, **body: Any) -> dict[str, Any]:
        return self._run(self._client.classify(input, **body))

    def score(self, text_1: Any, text_2: Any, **body: Any) -> np.ndarray:
        return self._run(self._client.score(text_1, text_2, **body))

    def rerank(self, query: str, documents: list[Any], **body: Any) -> dict[str, Any]:
        return self._run(self._client.rerank(query, documents, **body))

    def health(self) -> dict[str, Any]:
        return self._run(self._client.health())

    def close(self) -> None:
        self._run(self._client.close())
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
