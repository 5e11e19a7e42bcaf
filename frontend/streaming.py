"""One stream: headers with the first token or after a while, keep-alive comments, merging towards slow readers.

While a write waits for the client, updates of a choice are merged by its buffer; a write that waits too long ends the
request. A stream that cannot be completed ends with an error event and without [DONE]. Between its first chunk and its
end news are written by a callback, without waking the handler's task: that is what nearly every token costs. Run by the
frontend.
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
BY_HAND_S = 60.0                 # how often a write goes by way of Sanic, whose timers must see that the stream lives


class Bell(asyncio.Event):
    """What a request rings: an event for its handler, or, as long as `answer` can do it, one call of that for all that
    came in this turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[], bool] | None = None    # False: the handler is needed
        self._loop = asyncio.get_running_loop()
        self._soon = False

    def ring(self) -> None:
        if self.answer is None:
            self.set()
        elif not self._soon:
            self._soon = True
            self._loop.call_soon(self._ask)

    def _ask(self) -> None:
        self._soon = False
        if self.answer is None or not self.answer():
            self.set()


News = TypeVar("News")


class Source(Protocol[News]):
    """A request as its stream sees it."""

    error: QuartetError | None

    @property
    def done(self) -> bool: ...

    def take(self) -> list[News]: ...


class Stream(Generic[News]):
    """Sends the answer of one request as events."""

    def __init__(self, call: Call, request: Source[News], news: Bell, events: Events[News], http: HttpConfig,
                 headers: Callable[[Call], dict[str, str]]) -> None:
        self._call, self._request, self._news, self._events = call, request, news, events
        self._http, self._headers = http, headers
        self._response: Any = None
        self._transport: Any = call.http.transport
        self._failure: Exception | None = None        # of `_at_once`; the handler raises it
        self._by_hand = 0.0                           # when the next write has to go by way of Sanic
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
            self._news.answer = None
            self._beat.cancel()

    async def _send_all(self) -> bool:
        request = self._request
        while True:
            await self._news.wait()
            self._news.clear()
            if self._failure is not None:
                raise self._failure
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
        if not end and self._response.stream.send == self._response.stream.http1_response_chunked:
            self._by_hand, self._news.answer = self._written + BY_HAND_S, self._at_once

    def _at_once(self) -> bool:
        """Write what came; False where the handler is needed: for an end, an error, or a client that does not keep up."""
        now, transport = self._loop.time(), self._transport
        if (self._blocked or self._request.done or now >= self._by_hand or transport.is_closing()
                or transport.get_write_buffer_size()):
            return False
        try:
            data = self._events.events(self._request.take())
        except Exception as error:
            self._failure = error
            return False
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            self._call.sent += len(data)
            self._written = now
        return True

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
