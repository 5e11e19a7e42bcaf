"""POST /v1/embeddings, /pooling, /classify, /score and /rerank: requests whose answer is numbers.

A handler holds its request by scope, as those that generate do: whatever ends it closes the request, which aborts what
is unfinished and releases the permit. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend import pool_answers, pool_params, scoring
from frontend.admission import BYTES_PER_TOKEN
from frontend.call import Call
from frontend.ingress import Ingress
from frontend.pool_answers import Answer
from frontend.pool_params import PoolAsk
from frontend.pools import PoolRequest
from frontend.stages import Stages
from pipeline.config import ServerConfig

if TYPE_CHECKING:
    from frontend.server import Frontend

Read = Callable[[bytes, ServerConfig, Stages], PoolAsk]
Write = Callable[[Any, PoolRequest, dict[str, Any]], Awaitable[Answer]]


async def _embeddings(ask: PoolAsk, request: PoolRequest, head: dict[str, Any]) -> Answer:
    return await pool_answers.vectors(ask, request, head, "embedding")


async def _pooled(ask: PoolAsk, request: PoolRequest, head: dict[str, Any]) -> Answer:
    return await pool_answers.vectors(ask, request, head, "pooling")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: how its body is read, how its answer is written, and what ids begin with."""

    read: Read
    write: Write
    prefix: str


KINDS: Mapping[str, Kind] = MappingProxyType({
    "embeddings": Kind(pool_params.embedding, _embeddings, "embd-"),
    "pooling": Kind(pool_params.pooling, _pooled, "pool-"),
    "classify": Kind(pool_params.classify, pool_answers.classes, "classify-"),
    "score": Kind(scoring.score, scoring.score_answer, "score-"),
    "rerank": Kind(scoring.rerank, scoring.rerank_answer, "rerank-"),
})
ROUTES: Mapping[str, str] = MappingProxyType({
    "/v1/embeddings": "embeddings", "/pooling": "pooling", "/classify": "classify", "/score": "score",
    "/v1/score": "score", "/rerank": "rerank", "/v1/rerank": "rerank", "/v2/rerank": "rerank"})


class Pooling:
    """The routes."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def register(self, ingress: Ingress) -> None:
        for path, name in ROUTES.items():
            ingress.post(path, self._handler(KINDS[name]))

    def _handler(self, kind: Kind) -> Callable[[Call], Awaitable[HTTPResponse]]:
        async def handle(call: Call) -> HTTPResponse:
            frontend = self._frontend
            ask = kind.read(call.body, frontend.config, frontend.stages)
            num_bytes, call.body = len(call.body), b""
            call.fields.update(model=ask.model, inputs=len(ask.spec.inputs))
            label = call.request_id if call.labelled or ask.label is None else ask.label
            async with computed(frontend, ask, num_bytes) as request:
                call.fields["prompt_tokens"] = request.prompt_tokens
                answer = await written(kind, ask, request, label)
            return HTTPResponse(answer.body, content_type=answer.content_type, headers=answer.headers)
        return handle


async def written(kind: Kind, ask: PoolAsk, request: PoolRequest, label: str) -> Answer:
    """The whole answer of a request that was computed."""
    return await kind.write(ask, request, pool_answers.identity(kind.prefix, ask, label, int(time.time())))


@asynccontextmanager
async def computed(frontend: Frontend, ask: PoolAsk, num_bytes: int) -> AsyncIterator[PoolRequest]:
    """The request with every result, or its error; closed at the end of the block."""
    spec, news, started = ask.spec, asyncio.Event(), time.monotonic()
    limit = frontend.config.models[spec.model].max_model_len
    tokens = min(spec.num_bytes // BYTES_PER_TOKEN + len(spec.inputs), len(spec.inputs) * limit)
    request = frontend.table.pool(spec, news.set, frontend.admission.acquire(num_bytes, tokens))
    try:
        while not request.done:
            await news.wait()
            news.clear()
        if request.error is not None:
            raise request.error
        yield request
        frontend.metrics.pooled(request, time.monotonic() - started)
    finally:
        frontend.table.pools.close(request)
