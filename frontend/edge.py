"""The in-cluster side door: a ROUTER that each frontend binds on request, for `pipeline.client`.

The same bodies, schema, admission, request table and errors as HTTP. A client has a lease (silence ends it and aborts
its work) and each stream a credit (text is merged, never queued, while it is used up). Nothing here waits or blocks;
what a stranger sends is dropped and counted. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from frontend import generate, logprobs, pooling, tokens
from frontend.collector import Update
from frontend.generate import Job
from frontend.health import Health
from frontend.pool_answers import usage as pool_usage
from frontend.request import Request
from frontend.turn import Turn
from frontend.wire import dump, usage_of
from pipeline import __version__, edge, keys
from pipeline.config import EdgeConfig
from pipeline.errors import QuartetError, invalid
from pipeline.messages import AbortReason, pack_ids
from pipeline.schema import BadFrame
from pipeline.stage import Context

if TYPE_CHECKING:
    from frontend.server import Frontend

MAX_SESSIONS = 1024
SLICE = 128
TICK_S = 1.0
log = logging.getLogger(__name__)
access = logging.getLogger("frontend.access")


@dataclass(slots=True, eq=False)
class _Call:
    """One open call of a client."""

    cid: int
    task: asyncio.Task[None] | None = None
    credit: int = edge.CREDIT
    news: asyncio.Event = field(default_factory=asyncio.Event)
    taking: bool = False                     # has chunks in the message that is being put together


@dataclass(slots=True, eq=False)
class _Session:
    """One client: its open calls, when it was last heard, and the chunks of this turn of the loop."""

    identity: bytes
    label: str
    heard: float
    calls: dict[int, _Call] = field(default_factory=dict)
    pending: list[edge.Chunk] = field(default_factory=list)


def endpoint_of(config: EdgeConfig, index: int) -> str:
    """Frontend `index` takes the port plus index, or the path with its index appended."""
    assert config.endpoint is not None
    if config.endpoint.startswith("tcp://"):
        host, _, port = config.endpoint.rpartition(":")
        return f"{host}:{int(port) + index}"
    return f"{config.endpoint}.{index}"


class Edge:
    """The ROUTER of one frontend."""

    def __init__(self, context: Context, frontend: Frontend) -> None:
        config = context.config.edge
        self._context, self._frontend, self._loop = context, frontend, asyncio.get_running_loop()
        self._sessions: dict[bytes, _Session] = {}
        self._health = Health(context.config, frontend.stages, lambda: frontend.table.draining)
        self._authenticator: ThreadAuthenticator | None = None
        self._socket = context.zmq_context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 200), (zmq.ROUTER_MANDATORY, 1), (zmq.SNDHWM, 10_000), (zmq.RCVHWM, 1_000),
                              (zmq.MAXMSGSIZE, context.config.http.max_body_bytes + 65_536), (zmq.IPV6, 1),
                              (zmq.HANDSHAKE_IVL, 10_000), (zmq.HEARTBEAT_IVL, 5_000), (zmq.HEARTBEAT_TIMEOUT, 15_000)):
            self._socket.setsockopt(option, value)
        if config.key_dir is not None:
            self._lock(config)
        self._socket.bind(endpoint_of(config, context.index))
        self._descriptor = self._socket.FD
        self._loop.add_reader(self._descriptor, self._drain)
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def close(self) -> None:
        for session in list(self._sessions.values()):
            self._end(session, AbortReason.SHUTDOWN)
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()

    def _lock(self, config: EdgeConfig) -> None:
        """CURVE: only the keys in the directory's ``clients/`` may connect; they are read at each handshake."""
        directory = Path(config.key_dir or "")
        keys.as_server(self._socket, directory)

        class Known:
            def callback(self, domain: str, key: bytes) -> bool:      # Z85
                return key in keys.clients(directory)
        self._authenticator = ThreadAuthenticator(self._context.zmq_context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", Known())

    # ---- in --------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Read a slice; the descriptor is edge-triggered, so come back while there may be more."""
        for _ in range(SLICE):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(identity, edge.decode(frames))
            except BadFrame:
                self._context.bad_frames.labels(socket="edge").inc()
        self._loop.call_soon(self._drain)

    def _handle(self, identity: bytes, message: Any) -> None:
        session = self._sessions.get(identity)
        if isinstance(message, edge.Hello):
            self._greet(identity, message)
            return
        if session is None:
            self._send(identity, edge.Reset("the server does not know this client"))
            return
        session.heard = time.monotonic()
        if isinstance(message, edge.Call):
            self._call(session, message)
        elif isinstance(message, edge.Cancel):
            self._cancel(session, message.cid)
        elif isinstance(message, edge.Credit):
            call = session.calls.get(message.cid)
            if call is not None:
                if call.credit <= 0:
                    call.news.set()
                call.credit = min(edge.CREDIT, call.credit + message.add)
        elif isinstance(message, edge.Ping):
            self._send(identity, edge.Pong(message.number))
        else:
            raise BadFrame(f"{type(message).__name__} is not for a server")

    def _greet(self, identity: bytes, hello: edge.Hello) -> None:
        known = self._sessions.get(identity)
        if known is not None:
            self._end(known, AbortReason.CLIENT_GONE)
        error = None
        if hello.protocol != edge.PROTOCOL:
            error = invalid(f"This server speaks version {edge.PROTOCOL} of the client protocol.")
        elif not self._frontend.keys.allow("Bearer " + hello.key):
            error = QuartetError("invalid_api_key", "A valid API key is required.")
        elif len(self._sessions) >= MAX_SESSIONS:
            error = QuartetError("server_overloaded", "The server has too many clients already.")
        if error is not None:
            self._send(identity, edge.Reply(0, error.status, dump(error.body())))
            return
        self._sessions[identity] = _Session(identity, hello.client[:64], time.monotonic())
        names = [name for model in self._context.config.models for name in model.names]
        self._send(identity, edge.Welcome(edge.LEASE_MS, names, __version__))

    def _call(self, session: _Session, message: edge.Call) -> None:
        if message.cid in session.calls or message.cid == 0 or len(session.calls) >= edge.MAX_CALLS:
            error = QuartetError("server_overloaded", "This call number is taken, or there are too many open calls.")
            self._send(session.identity, edge.Reply(message.cid, error.status, dump(error.body())))
            return
        call = session.calls[message.cid] = _Call(message.cid)
        call.task = self._loop.create_task(self._serve(session, call, message))

    def _cancel(self, session: _Session, cid: int) -> None:
        call = session.calls.get(cid)
        if call is not None and call.task is not None:
            call.task.cancel()

    # ---- one call --------------------------------------------------------------------------------------------

    async def _serve(self, session: _Session, call: _Call, message: edge.Call) -> None:
        """Answer one call; whatever goes wrong is its error and nobody else's."""
        start, status = time.monotonic(), 200
        try:
            if message.op in generate.JOBS:
                job = generate.JOBS[message.op](message.body_json, self._context.config)
                await self._generate(session, call, message, job, start)
            elif message.op in pooling.KINDS:
                await self._pool(session, call, message)
            else:
                value = await self._plain(message)
                self._send(session.identity, edge.Reply(call.cid, 200, dump(value)))
        except QuartetError as error:
            status = error.status
            self._flush(session)
            self._send(session.identity, edge.Reply(call.cid, status, dump(error.body())))
            self._frontend.metrics.rejected(error)
        except asyncio.CancelledError:
            status = 499
            raise
        except Exception:
            status = 500
            log.exception("call %d of %s failed unexpectedly", call.cid, session.label)
            hidden = QuartetError("internal_error", "The server failed to process the request.")
            self._send(session.identity, edge.Reply(call.cid, status, dump(hidden.body())))
        finally:
            session.calls.pop(call.cid, None)
            op = message.op if message.op in OPERATIONS else "other"
            self._frontend.metrics.http("zmq:" + op, "CALL", status, time.monotonic() - start)
            access.info("zmq %s %d", op, status, extra={"fields": {
                "client": session.label, "total_ms": round((time.monotonic() - start) * 1000, 1)}})

    async def _plain(self, message: edge.Call) -> dict[str, Any]:
        if message.op == "tokenize":
            return await tokens.tokenize(self._frontend, message.body_json)
        if message.op == "detokenize":
            return await tokens.detokenize(self._frontend, message.body_json)
        if message.op == "health":
            ok, value = self._health.ready()
            if not ok:
                raise QuartetError("engine_unavailable", f"The server is {value['status']}.")
            return value
        raise QuartetError("not_found", "There is no such operation.", "op")

    async def _generate(self, session: _Session, call: _Call, message: edge.Call, job: Job, start: float) -> None:
        frontend, ask = self._frontend, job.ask
        request = generate.open_request(frontend, ask, len(message.body_json), call.news.set)
        reason = AbortReason.CLIENT_GONE
        try:
            if ask.spec.stream:
                await self._stream(session, call, job, request)
            else:
                await generate.finished(request, call.news)
                identity = {"id": job.prefix + (message.request_id or job.label or secrets.token_hex(12)),
                            "created": int(time.time()), "system_fingerprint": frontend.fingerprint(ask.model)}
                self._send(session.identity, edge.Reply(call.cid, 200, dump(job.body(ask, request, identity))))
            frontend.metrics.generated(request, ask.spec.sampling.max_tokens, time.monotonic() - start)
        except QuartetError:
            reason = AbortReason.ERROR
            raise
        finally:
            frontend.table.close(request, reason)

    async def _pool(self, session: _Session, call: _Call, message: edge.Call) -> None:
        """Vectors go out as they are, everything else as the JSON of the HTTP API."""
        if message.stream:
            raise invalid("Answers made of numbers are not streamed.", "stream")
        kind, frontend = pooling.KINDS[message.op], self._frontend
        ask = kind.read(message.body_json, frontend.config, frontend.stages)
        async with pooling.computed(frontend, ask, len(message.body_json)) as request:
            if message.op in ("embeddings", "pooling"):
                rows, usage = request.results(), dump(pool_usage(request.prompt_tokens))
                data = rows[0] if len(rows) == 1 else np.concatenate(rows)
                self._send(session.identity, edge.Vectors(call.cid, pack_ids(map(len, rows)), data, usage))
            else:
                answer = await pooling.written(kind, ask, request, message.request_id or ask.label or secrets.token_hex(12))
                self._send(session.identity, edge.Reply(call.cid, 200, answer.body))

    async def _stream(self, session: _Session, call: _Call, job: Job, request: Request) -> None:
        """Chunks as they come, within the credit; then the end with the usage."""
        piece = _pieces(job, request)
        while True:
            await call.news.wait()
            call.news.clear()
            if request.error is not None:
                raise request.error
            if call.credit <= 0:
                continue                                     # merged in the table's buffers meanwhile
            chunks = [chunk for update in request.take() if (chunk := piece(call.cid, update)) is not None]
            if chunks:
                self._queue(session, call, chunks)
            if request.done:
                self._flush(session)
                self._send(session.identity, edge.End(call.cid, dump(usage_of(request))))
                return

    # ---- out -------------------------------------------------------------------------------------------------

    def _queue(self, session: _Session, call: _Call, chunks: list[edge.Chunk]) -> None:
        """All chunks of one turn of the loop go to a client as one message."""
        if not session.pending:
            self._loop.call_soon(self._flush, session)
        if not call.taking:
            call.taking = True
            call.credit -= 1
        session.pending.extend(chunks)

    def _flush(self, session: _Session) -> None:
        if session.pending:
            chunks, session.pending = session.pending, []
            for call in session.calls.values():
                call.taking = False
            self._send(session.identity, edge.Chunks(chunks))

    def _send(self, identity: bytes, message: Any) -> None:
        """A client that cannot take a message (it is gone, or reads nothing) is dropped with its work."""
        try:
            self._socket.send_multipart([identity, *edge.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            session = self._sessions.get(identity)
            if session is not None:
                self._end(session, AbortReason.CLIENT_GONE)
        self._loop.call_soon(self._drain)                    # a send may swallow the edge of the descriptor

    def _tick(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if now - session.heard > edge.LEASE_MS / 1000:
                self._end(session, AbortReason.CLIENT_GONE)
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _end(self, session: _Session, reason: AbortReason) -> None:
        """Forget a client; its calls are cancelled, which closes their requests."""
        self._sessions.pop(session.identity, None)
        session.pending.clear()
        for call in list(session.calls.values()):
            if call.task is not None:
                call.task.cancel()


OPERATIONS = frozenset({*generate.JOBS, *pooling.KINDS, "tokenize", "detokenize", "health"})


def _pieces(job: Job, request: Request) -> Callable[[int, Update], edge.Chunk | None]:
    """Turns updates into chunks; echo rides with the first piece of each choice."""
    ask = job.ask
    completion = [logprobs.CompletionLogprobs(ask.tokens_as_ids) for _ in request.choices]
    turns = [Turn(ask, choice.index) for choice in request.choices]
    begun: set[int] = set()

    def piece(cid: int, update: Update) -> edge.Chunk | None:
        text, choice, turn, deltas = update.text, request.choices[update.index], turns[update.index], b""
        if update.spans:                     # all of the text is in the deltas
            text, deltas = "", ("[" + ",".join(turn.deltas(update)) + "]").encode()
        if update.index not in begun:
            begun.add(update.index)
            text = (choice.prompt.echo or "") + text if not job.chat else (ask.echo or "") + text
        ids, found = turn.tokens(update)
        told = b""
        if ask.logprobs is not None and found is not None:
            value: Any = ({"content": logprobs.chat_content(found, ids, ask.tokens_as_ids), "refusal": None}
                          if job.chat else completion[update.index].piece([(found, ids)]))
            told = json.dumps(value, allow_nan=False).encode()
        if not text and not update.ids and not update.finish:
            return None
        return edge.Chunk(cid, update.index, text, ids.tobytes(), turn.reason(update), update.stop, told, deltas)
    return piece
