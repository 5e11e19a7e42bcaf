"""One HTTP call: its request id, its body, and what the access log will say of it.

Bodies are read here and nowhere else: declared size first, then counted while they come, within a time limit.
Run by the frontend; one object per call.
"""
from __future__ import annotations

import asyncio
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sanic.exceptions import SanicException
from sanic.request import Request as HttpRequest

from frontend.fields import REQUEST_ID_PATTERN
from pipeline.errors import QuartetError

BODY_TIMEOUT_S = 60.0
LINGER_S = 1.0                   # an unwanted body is read for so long, lest a reset overtake the answer to it
JSON_TYPES = ("application/json",)


@dataclass(slots=True)
class Call:
    """What a handler gets."""

    http: HttpRequest
    request_id: str
    labelled: bool                           # the id is the caller's own
    started: float = field(default_factory=time.monotonic)
    body: bytes = b""
    received: int = 0                        # bytes of the request's body
    sent: int = 0                            # bytes of the answer's body
    status: int = 0                          # set by handlers that answer by themselves (streams)
    fields: dict[str, Any] = field(default_factory=dict)     # for the access log

    @classmethod
    def of(cls, http: HttpRequest) -> Call:
        asked = http.headers.getone("x-request-id", "")
        labelled = REQUEST_ID_PATTERN.match(asked) is not None
        return cls(http, asked if labelled else uuid.uuid4().hex, labelled)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def last(self) -> None:
        """Close the connection after this call."""
        stream: Any = self.http.stream
        if stream is not None:
            stream.keep_alive = False

    @property
    def unread(self) -> bool:
        """Whether (part of) the body is still to come."""
        stream: Any = self.http.stream
        return bool(stream is not None and stream.request_body)

    async def linger(self) -> None:
        """The answer is sent: read the rest of the body and drop it, but not for long."""
        stream: Any = self.http.stream
        try:
            async with asyncio.timeout(LINGER_S):
                while stream.request_body:
                    await stream.read()
        except (TimeoutError, SanicException):
            stream.request_body = None
            self.last()

    def cut(self) -> None:
        """Reset the connection: nothing true can be said on it any more.

        Without the option the kernel would go on offering what it holds to a client that takes nothing.
        """
        transport: Any = self.http.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            if sock is not None and not transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    async def read(self, limit: int) -> None:
        """Read a JSON body of at most `limit` bytes; QuartetError for anything else."""
        headers = self.http.headers
        media = headers.getone("content-type", "").partition(";")[0].strip().lower()
        if media not in JSON_TYPES:
            raise QuartetError("unsupported_media_type", "The body must be sent as application/json.")
        if headers.getone("content-encoding", "identity").strip().lower() != "identity":
            raise QuartetError("unsupported_media_type", "Compressed bodies are not supported.")
        self.body = b"".join([data async for data in self.chunks(limit)])

    async def chunks(self, limit: int, timeout_s: float = BODY_TIMEOUT_S) -> AsyncIterator[bytes]:
        """The body as it comes; QuartetError for one of more than `limit` bytes, declared or not, or that takes too long."""
        stream: Any = self.http.stream
        declared = self.http.headers.getone("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit)
        size, deadline = 0, asyncio.get_running_loop().time() + timeout_s
        while stream.request_body:
            try:
                async with asyncio.timeout_at(deadline):
                    data = await stream.read()
            except TimeoutError:
                self.last()
                raise QuartetError("request_timeout", "The body did not arrive in time.") from None
            if data:
                size += len(data)
                self.received += len(data)
                if size > limit:
                    raise _too_large(limit)
                yield data
        transport: Any = self.http.transport
        if transport is not None and not transport.is_closing():
            # Sanic pauses reading behind a large body; paused, nobody would see that the client has gone.
            transport.resume_reading()


def _too_large(limit: int) -> QuartetError:
    return QuartetError("payload_too_large", f"The body is larger than {limit} bytes.")
