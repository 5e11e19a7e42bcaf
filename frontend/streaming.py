"""One stream: headers with the first token or after a while, keep-alive comments, merging towards slow readers.

While a write waits for the client, updates of a choice are merged by its buffer; a write that waits too long ends the
request. A stream that cannot be completed ends with an error event and without [DONE]. Run by the frontend.
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from frontend.call import Call
from frontend.sse import KEEP_ALIVE, Events
from frontend.wire import error_event
from pipeline.config import HttpConfig
from pipeline.errors import QuartetError
from pipeline.messages import AbortReason

CONTENT_TYPE = "text/event-stream; charset=utf-8"


News = TypeVar("News")


class Source(Protocol[News]):
    """A request as its stream sees it."""

    error: QuartetError | None

    @property
    def done(self) -> bool: ...

    def take(self) -> list[News]: ...


class Stream(Generic[News]):
    """Sends the answer of one request as events."""

    def __init__(self, call: Call, request: Source[News], news: asyncio.Event, events: Events[News], http: HttpConfig,
                 headers: Callable[[Call], dict[str, str]]) -> None:
        self._call, self._request, self._news, self._events = call, request, news, events
        self._http, self._headers = http, headers
        self._response: Any = None
        self._loop = asyncio.get_running_loop()
        self._written = self._loop.time()
        self._blocked = 0.0                           # since when a write waits for the client; 0: none does
        self._period = min(http.keep_alive_s, http.slow_client_s)
        self._beat = self._loop.call_later(self._period, self._on_beat)
        self.reason = AbortReason.CLIENT_GONE         # why the request is not complete, where it is not

    async def run(self) -> bool:
        """Whether the whole answer was sent. Raises the request's error while no header is out."""
        try:
            return await self._send_all()
        finally:
            self._beat.cancel()

    async def _send_all(self) -> bool:
        request = self._request
        while True:
            await self._news.wait()
            self._news.clear()
            data = self._events.events(request.take())
            if request.error is not None:
                if self._response is None:
                    raise request.error
                self._call.last()
                await self._write(data + error_event(request.error), end=True)
                return False
            if request.done:
                await self._write(data + self._events.end(), end=True)
                return True
            if data:
                await self._write(data)
            elif self._loop.time() >= self._written + self._http.keep_alive_s:
                await self._write(KEEP_ALIVE)

    async def _write(self, data: bytes, end: bool = False) -> None:
        """Cancelled from the outside when the client has gone, or was cut off by `_on_beat`."""
        if self._response is None:
            self._response = await self._call.http.respond(status=200, content_type=CONTENT_TYPE, headers={
                "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **self._headers(self._call)})
            self._call.status = 200
        self._blocked = self._loop.time()
        await self._response.send(data, end)
        self._call.sent += len(data)
        self._written, self._blocked = self._loop.time(), 0.0

    def _on_beat(self) -> None:
        """One timer per stream, however many tokens pass: it wakes a quiet sender and ends one that hangs."""
        now = self._loop.time()
        if self._blocked and now >= self._blocked + self._http.slow_client_s:
            self.reason = AbortReason.SLOW_CLIENT
            self._call.cut()
            return
        due = now + self._period
        if not self._blocked:
            quiet_at = self._written + self._http.keep_alive_s
            if now >= quiet_at:
                self._news.set()
            else:
                due = min(due, quiet_at)
        self._beat = self._loop.call_at(due, self._on_beat)
