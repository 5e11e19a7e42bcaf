"""POST /v1/completions and /v1/chat/completions, streamed and plain.

A handler holds its request by scope: whatever ends it (an answer, an error, a client that has gone) closes the request,
and closing aborts what is unfinished and releases the permit. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend import answers, params
from frontend.admission import estimate_tokens
from frontend.bodies import parse_object, validate
from frontend.call import Call
from frontend.collector import Update
from frontend.ingress import Ingress, json_response
from frontend.load_report import LOAD_ASKED, LOAD_GIVEN, load_report
from frontend.params import Ask
from frontend.request import Request
from frontend.request_log import RequestLog
from frontend.schema import ChatBody, CompletionBody
from frontend.sse import ChatStream, CompletionStream, Events
from frontend.streaming import Bell, Stream
from pipeline.config import ServerConfig
from pipeline.messages import AbortReason

if TYPE_CHECKING:
    from frontend.server import Frontend

Body = Callable[[Ask, Request, dict[str, Any]], dict[str, Any]]
Chunks = Callable[[Ask, Request, dict[str, Any]], Events[Update]]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked body: what to ask of the table, and how its answer is written."""

    ask: Ask
    chat: bool
    prefix: str                  # of the answer's id
    label: str | None            # the caller's own id, from the body
    body: Body
    chunks: Chunks


def completion_job(content: bytes, config: ServerConfig) -> Job:
    body = validate(CompletionBody, parse_object(content))
    ask = params.completion(body, config, time.monotonic_ns())
    return Job(ask, False, "cmpl-", body.request_id, answers.completion, CompletionStream)


def chat_job(content: bytes, config: ServerConfig) -> Job:
    raw = parse_object(content)
    body = validate(ChatBody, raw)
    ask = params.chat(body, raw, config, time.monotonic_ns())
    return Job(ask, True, "chatcmpl-", body.request_id, answers.chat, ChatStream)


JOBS: Mapping[str, Callable[[bytes, ServerConfig], Job]] = MappingProxyType(
    {"completions": completion_job, "chat": chat_job})


def open_request(frontend: Frontend, ask: Ask, num_bytes: int, wake: Callable[[], None]) -> Request:
    """Take a permit and accept the request; QuartetError where there is no room or no way."""
    spec = ask.spec
    limit = frontend.config.models[spec.model].max_model_len
    permit = frontend.admission.acquire(num_bytes, estimate_tokens(
        sum(p.num_bytes for p in spec.prompts), len(spec.prompts), spec.n, ask.max_tokens, limit))
    return frontend.table.open(spec, wake, permit)


class Generate:
    """The two routes that generate text."""

    def __init__(self, frontend: Frontend, ingress: Ingress) -> None:
        self._frontend, self._ingress = frontend, ingress
        self._log = RequestLog(frontend.config.http.log)

    def register(self) -> None:
        self._ingress.post("/v1/completions", self.completions)
        self._ingress.post("/v1/chat/completions", self.chat)

    async def completions(self, call: Call) -> HTTPResponse | None:
        return await self._answer(call, completion_job(call.body, self._frontend.config))

    async def chat(self, call: Call) -> HTTPResponse | None:
        return await self._answer(call, chat_job(call.body, self._frontend.config))

    async def _answer(self, call: Call, job: Job) -> HTTPResponse | None:
        frontend, ask, spec = self._frontend, job.ask, job.ask.spec
        call.fields["model"] = ask.model
        news = Bell()
        request = open_request(frontend, ask, len(call.body), news.ring)
        call.body = b""
        stream: Stream[Update] | None = None
        try:
            self._log.received(call.request_id, ask)
            label = call.request_id if call.labelled or job.label is None else job.label
            identity = {"id": job.prefix + label, "created": int(time.time()),
                        "system_fingerprint": frontend.fingerprint(ask.model)}
            if spec.stream:
                events = self._log.streamed(call.request_id, job.chunks(ask, request, identity))
                stream = Stream(call, request, news, events, frontend.config.http, self._ingress.headers_of)
                complete = await stream.run()
            else:
                await finished(request, news)
                complete = True
            if complete:
                frontend.metrics.generated(request, spec.sampling.max_tokens, call.elapsed_s)
            if spec.stream:
                return None
            body = job.body(ask, request, identity)
            self._log.answered(call.request_id, body)
            response = json_response(body)
            report = load_report(frontend.stages, spec.model, call.http.headers.getone(LOAD_ASKED, ""))
            if report is not None:
                response.headers[LOAD_GIVEN] = report
            return response
        finally:
            frontend.table.close(request, AbortReason.CLIENT_GONE if stream is None else stream.reason)
            _describe(call, request)


async def finished(request: Request, news: asyncio.Event) -> None:
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
