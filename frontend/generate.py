"""POST /v1/completions and /v1/chat/completions, streamed and plain.

A handler holds its request by scope: whatever ends it (an answer, an error, a client that has gone) closes the request,
and closing aborts what is unfinished and releases the permit. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend import answers, params
from frontend.admission import estimate_tokens
from frontend.bodies import parse_object, validate
from frontend.call import Call
from frontend.ingress import Ingress, json_response
from frontend.params import Ask
from frontend.request import Request
from frontend.schema import ChatBody, CompletionBody
from frontend.sse import ChatStream, CompletionStream, Events
from frontend.streaming import Stream
from pipeline.messages import AbortReason

if TYPE_CHECKING:
    from frontend.server import Frontend

Body = Callable[[Ask, Request, dict[str, Any]], dict[str, Any]]
Chunks = Callable[[Ask, Request, dict[str, Any]], Events]


class Generate:
    """The two routes that generate text."""

    def __init__(self, frontend: Frontend, ingress: Ingress) -> None:
        self._frontend, self._ingress = frontend, ingress

    def register(self) -> None:
        self._ingress.post("/v1/completions", self.completions)
        self._ingress.post("/v1/chat/completions", self.chat)

    async def completions(self, call: Call) -> HTTPResponse | None:
        raw = parse_object(call.body)
        body = validate(CompletionBody, raw)
        ask = params.completion(body, self._frontend.config, time.monotonic_ns())
        return await self._answer(call, ask, "cmpl-", body.request_id, answers.completion, CompletionStream)

    async def chat(self, call: Call) -> HTTPResponse | None:
        raw = parse_object(call.body)
        body = validate(ChatBody, raw)
        ask = params.chat(body, raw, self._frontend.config, time.monotonic_ns())
        return await self._answer(call, ask, "chatcmpl-", body.request_id, answers.chat, ChatStream)

    async def _answer(self, call: Call, ask: Ask, prefix: str, label: str | None, body: Body,
                      chunks: Chunks) -> HTTPResponse | None:
        frontend, spec = self._frontend, ask.spec
        call.fields["model"] = ask.model
        limit = frontend.config.models[spec.model].max_model_len
        permit = frontend.admission.acquire(len(call.body), estimate_tokens(
            sum(p.num_bytes for p in spec.prompts), len(spec.prompts), spec.n, ask.max_tokens, limit))
        call.body = b""
        news = asyncio.Event()
        request = frontend.table.open(spec, news.set, permit)
        reason = AbortReason.CLIENT_GONE
        try:
            identity = {"id": prefix + (call.request_id if call.labelled or label is None else label),
                        "created": int(time.time()), "system_fingerprint": frontend.fingerprint(ask.model)}
            if spec.stream:
                stream = Stream(call, request, news, chunks(ask, request, identity), frontend.config.http,
                                self._ingress.headers_of)
                complete = await stream.run()
                reason = stream.reason
            else:
                await _finished(request, news)
                complete = True
            if complete:
                frontend.metrics.generated(request, spec.sampling.max_tokens, call.elapsed_s)
            return None if spec.stream else json_response(body(ask, request, identity))
        finally:
            frontend.table.close(request, reason)
            _describe(call, request)


async def _finished(request: Request, news: asyncio.Event) -> None:
    """Wait for the terminal event; raises the request's error."""
    while not request.done:
        await news.wait()
        news.clear()
    if request.error is not None:
        raise request.error


def _describe(call: Call, request: Request) -> None:
    """For the access log."""
    call.fields["prompt_tokens"] = request.prompt_tokens
    call.fields["cached_tokens"] = request.cached_tokens
    call.fields["completion_tokens"] = request.completion_tokens
    if request.first_token_ns:
        call.fields["ttft_ms"] = round((request.first_token_ns - request.arrival_ns) / 1e6, 1)
    if request.ended is not None:
        call.fields["aborted"] = request.ended.name.lower()
