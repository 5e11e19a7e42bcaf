"""POST /v1/audio/transcriptions and /v1/audio/translations.

A handler holds its upload and its request by scope: whatever ends it deletes the spool file, aborts what is unfinished
and releases the permit. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sanic.response import HTTPResponse

from frontend import speech_answers, speech_params
from frontend.call import Call
from frontend.ingress import Ingress
from frontend.recordings import RecordingRequest
from frontend.speech_answers import SpeechStream
from frontend.speech_params import SpeechAsk
from frontend.streaming import Bell, Stream
from frontend.upload import OVERHEAD, Spool, receive
from pipeline.errors import QuartetError
from pipeline.messages import AbortReason, Transcribed

if TYPE_CHECKING:
    from frontend.server import Frontend

TOKENS = 448                         # what a recording is taken to cost, before it is looked at


class Speech:
    """The two routes."""

    def __init__(self, frontend: Frontend, ingress: Ingress) -> None:
        self._frontend, self._ingress = frontend, ingress
        serves = any(model.task == "transcribe" for model in frontend.config.models)
        self._spool = Spool(frontend.config.run_dir, frontend.index) if serves else None

    def register(self) -> None:
        self._ingress.upload("/v1/audio/transcriptions", self.transcribe)
        self._ingress.upload("/v1/audio/translations", self.translate)

    async def transcribe(self, call: Call) -> HTTPResponse | None:
        return await self._answer(call, "transcribe")

    async def translate(self, call: Call) -> HTTPResponse | None:
        return await self._answer(call, "translate")

    async def _answer(self, call: Call, task: str) -> HTTPResponse | None:
        frontend, limit = self._frontend, self._frontend.config.audio.max_bytes
        if self._spool is None:
            raise QuartetError("not_found", "This server has no model that can transcribe recordings.")
        declared = call.http.headers.getone("content-length", "")
        with frontend.admission.acquire(int(declared[:20]) if declared.isdigit() else limit + OVERHEAD, TOKENS):
            upload = await receive(call, self._spool, limit)
            try:
                ask = speech_params.ask(task, upload, frontend.config, frontend.stages)
                call.fields["model"] = ask.model
                return await self._computed(call, ask)
            finally:
                upload.discard()

    async def _computed(self, call: Call, ask: SpeechAsk) -> HTTPResponse | None:
        frontend, news = self._frontend, Bell()
        request = frontend.table.record(ask.spec, news.ring)
        stream: Stream[Transcribed] | None = None
        try:
            if ask.stream:
                label = call.request_id if call.labelled or ask.label is None else ask.label
                identity = {"id": "trsc-" + label, "created": int(time.time())}
                stream = Stream(call, request, news, SpeechStream(ask, request, identity), frontend.config.http,
                                self._ingress.headers_of)
                complete = await stream.run()
            else:
                await _finished(request, news)
                complete = True
            if complete:
                frontend.metrics.transcribed(request, call.elapsed_s)
            if ask.stream:
                return None
            return HTTPResponse(speech_answers.body(ask, request), content_type=speech_answers.TYPES[ask.form])
        finally:
            frontend.table.recordings.close(request, AbortReason.CLIENT_GONE if stream is None else stream.reason)
            call.fields["windows"] = len(request.windows)


async def _finished(request: RecordingRequest, news: asyncio.Event) -> None:
    """Wait for the terminal event; raises the request's error."""
    while not request.done:
        await news.wait()
        news.clear()
    if request.error is not None:
        raise request.error
