"""The one way in for every route: host, key, body, request id, errors, access log, metrics.

A handler never sees a call that may not be made, and whatever it raises leaves here as an OpenAI-shaped error. Routes
are closed unless they are registered as open. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sanic import Sanic, exceptions
from sanic.handlers import ErrorHandler
from sanic.request import Request as HttpRequest
from sanic.response import HTTPResponse

from frontend.call import Call
from frontend.cors import Cors
from frontend.keys import Hosts, Keys
from frontend.metrics import FrontendMetrics
from frontend.wire import dump, error_body
from pipeline.config import HttpConfig
from pipeline.errors import QuartetError

Handler = Callable[..., Awaitable[HTTPResponse | None]]
RETRY_AFTER_S = 1
CLIENT_GONE = 499
log = logging.getLogger(__name__)
access = logging.getLogger("frontend.access")


class Ingress:
    """Registers routes and stands in front of their handlers."""

    def __init__(self, app: Sanic[Any, Any], keys: Keys, http: HttpConfig, metrics: FrontendMetrics,
                 draining: Callable[[], bool]) -> None:
        self._app, self._keys, self._hosts, self._metrics = app, keys, Hosts(http), metrics
        self._max_body, self._root, self._draining = http.max_body_bytes, http.root_path, draining
        self._cors, self._log = Cors(http.cors), http.log
        self.handlers: dict[str, Handler] = {}           # of POST routes with a JSON body, by path
        app.error_handler = _Errors(self)

    def get(self, path: str, handler: Handler, *, open: bool = False, quiet: bool = False) -> None:
        self._add(path, ("GET", "HEAD", "OPTIONS"), handler, open, quiet)

    def post(self, path: str, handler: Handler) -> None:
        self.handlers[path] = handler
        self._add(path, ("POST", "OPTIONS"), handler, False, False)

    def upload(self, path: str, handler: Handler) -> None:
        """For handlers that read their body by themselves."""
        self._add(path, ("POST", "OPTIONS"), handler, False, False, reads=True)

    def get_or_post(self, path: str, handler: Handler, *, open: bool = False) -> None:
        """For probes of either kind; a body is not read."""
        self._add(path, ("GET", "HEAD", "POST", "OPTIONS"), handler, open, True)

    def _add(self, path: str, methods: tuple[str, ...], handler: Handler, open: bool, quiet: bool, reads: bool = False) -> None:
        takes_body = "POST" in methods and "GET" not in methods and not reads

        async def enter(http: HttpRequest, **parts: str) -> HTTPResponse | None:
            call = Call.of(http)
            try:
                self._hosts.check(http.headers.getone("host", None))
                preflight = self._cors.preflight(http, methods)
                if not open and not preflight:
                    self._keys.check(http.headers.getone("authorization", None))
                if http.method == "OPTIONS":
                    response: HTTPResponse | None = HTTPResponse(status=204, headers={"Allow": ", ".join(methods)})
                else:
                    if takes_body:
                        await call.read(self._max_body)
                    response = await handler(call, **parts)
            except asyncio.CancelledError:
                call.status = CLIENT_GONE
                raise
            except Exception as error:
                if call.status:                              # the headers are out
                    log.error("request %s broke off", call.request_id, exc_info=error)
                    call.cut()
                    response = None
                else:
                    response = self.answer(call, error)
            finally:
                if call.status:
                    self._finish(call, path, quiet)
            if response is not None:
                self._decorate(call, response)
                call.status, call.sent = response.status, len(response.body or b"")
                self._finish(call, path, quiet)
                if call.unread:
                    await (await http.respond(response)).send(end_stream=True)
                    await call.linger()
                    return None
            return response

        name = path.strip("/").replace("/", "_")
        self._app.add_route(enter, path, methods=methods, name=name, stream=True, error_format="json")
        if self._root:                                       # a proxy may pass its prefix on, or take it off
            self._app.add_route(enter, self._root + path, methods=methods, name=f"root_{name}", stream=True,
                                error_format="json")

    def answer(self, call: Call, error: BaseException) -> HTTPResponse:
        """The error response for anything that was raised."""
        error = _translate(error)
        response = HTTPResponse(error_body(error), status=error.status, content_type="application/json")
        if error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if error.status in (429, 503):
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        if error.status >= 500 and not error.retryable:
            response.headers["x-should-retry"] = "false"
        self._metrics.rejected(error)
        call.fields["error"] = error.code
        return response

    def stray(self, http: HttpRequest, error: BaseException) -> HTTPResponse:
        """The response for what never reached a handler: unknown paths, wrong methods, broken requests."""
        if isinstance(error, asyncio.CancelledError):        # the client has gone; its handler has said so already
            return HTTPResponse(error_body(QuartetError("draining", "The server is shutting down.")), status=503,
                                content_type="application/json")
        call = Call.of(http)
        translated = _translate(error)
        if translated.code in ("not_found", "method_not_allowed"):
            try:
                self._hosts.check(http.headers.getone("host", None))
                self._keys.check(http.headers.getone("authorization", None))
            except QuartetError as refusal:
                translated = refusal
        else:
            call.last()
        response = self.answer(call, translated)
        if translated.status == 405 and isinstance(error, exceptions.SanicException):
            response.headers["Allow"] = error.headers.get("Allow", "")
        self._decorate(call, response)
        call.status = response.status
        self._finish(call, "other", False)
        return response

    def _decorate(self, call: Call, response: HTTPResponse) -> None:
        response.headers.update(self.headers_of(call))

    def headers_of(self, call: Call) -> dict[str, str]:
        """What every response carries, for handlers that send their own."""
        if self._draining():
            call.last()
        return {"X-Request-Id": call.request_id, "openai-processing-ms": str(int(call.elapsed_s * 1000)),
                **self._cors.headers(call.http)}

    def _finish(self, call: Call, path: str, quiet: bool) -> None:
        http = call.http
        self._metrics.http(path, http.method, call.status, call.elapsed_s, call.received, call.sent)
        if not self._log.enabled or path in self._log.quiet_paths:
            return
        level = logging.DEBUG if quiet else logging.INFO
        if access.isEnabledFor(level):
            access.log(level, "%s %s %d", http.method if http.method.isalpha() else "OTHER", path, call.status, extra={
                "fields": {"request_id": call.request_id, "route": path, "status": call.status,
                           "total_ms": round(call.elapsed_s * 1000, 1), **call.fields}})


class _Errors(ErrorHandler):
    """Sanic's own exceptions in our form."""

    def __init__(self, ingress: Ingress) -> None:
        super().__init__()
        self._ingress = ingress

    def response(self, request: HttpRequest, exception: BaseException) -> HTTPResponse:
        return self._ingress.stray(request, exception)


def _translate(error: BaseException) -> QuartetError:
    """A foreign exception as one of the catalogue; its own text is never shown."""
    if isinstance(error, QuartetError):
        return error
    for kind, code, message in (
            (exceptions.NotFound, "not_found", "There is no such route."),
            (exceptions.MethodNotAllowed, "method_not_allowed", "This route does not take that method."),
            (exceptions.PayloadTooLarge, "payload_too_large", "The request is too large."),
            (exceptions.RequestTimeout, "request_timeout", "The request did not arrive in time."),
            (exceptions.ExpectationFailed, "expectation_failed", "That expectation cannot be met."),
            (exceptions.ServiceUnavailable, "timeout", "The request did not end within its time limit."),
            (exceptions.BadRequest, "invalid_request", "The HTTP request is malformed.")):
        if isinstance(error, kind):
            return QuartetError(code, message)
    log.error("an HTTP request failed unexpectedly", exc_info=error)
    return QuartetError("internal_error", "The server failed to process the request.")


def json_response(value: Any, status: int = 200) -> HTTPResponse:
    return HTTPResponse(dump(value), status=status, content_type="application/json")
