"""The frontend's parts in one object, and the Sanic application around them.

Sanic is configured on purpose in one place: our own loop and sockets, no worker manager, no banner, no access log of
its own, no environment variables. Run by the frontend; holds what handlers share.
"""
from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any

from sanic import Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.config import Config
from sanic.http import Http
from sanic.http.constants import HTTP
from sanic.server import AsyncioServer

from frontend import generate, info, invocations, pooling, speech, tokens
from frontend.admission import Admission
from frontend.ingress import Ingress
from frontend.keys import Keys
from frontend.metrics import FrontendMetrics
from frontend.stages import Stages
from frontend.table import RequestTable
from frontend.upload import OVERHEAD
from pipeline import __version__
from pipeline.config import ServerConfig
from pipeline.messages import Kind, MetricFamily

SEND_BUFFER = 128 * 1024         # bytes; the kernel doubles it


@dataclass(slots=True)
class Frontend:
    """What a frontend process has; handlers get it, nothing is global."""

    config: ServerConfig
    table: RequestTable
    stages: Stages
    admission: Admission
    metrics: FrontendMetrics
    keys: Keys
    snapshots: Callable[[], Mapping[tuple[Kind, int], list[MetricFamily]]]
    index: int = 0                           # of this process among the frontends
    created: int = field(default_factory=lambda: int(time.time()))
    _fingerprints: dict[str, str] = field(default_factory=dict)      # by model name

    def fingerprint(self, model: str) -> str:
        """Stable per model and version; names no path."""
        made = self._fingerprints.get(model)
        if made is None:
            number = next(i for i, m in enumerate(self.config.models) if m.names[0] == model)
            source = f"{__version__}|{model}|{self.config.models[number].source}|{self.config.models[number].engine.dtype}"
            made = self._fingerprints[model] = "fp_" + hashlib.sha256(source.encode()).hexdigest()[:10]
        return made


def build_app(frontend: Frontend, name: str = "quartet") -> tuple[Sanic[Any, Any], Ingress]:
    """The application with every route. `name` is unique within the process."""
    http = frontend.config.http
    Http.HEADER_CEILING = max(http.max_header_bytes, 16384)         # above Sanic's own only where somebody asks for it
    largest = max(http.max_body_bytes, frontend.config.audio.max_bytes + OVERHEAD)       # each route has a limit of its own
    config = Config(env_prefix=None)
    config.update_config({
        "ACCESS_LOG": False, "AUTO_EXTEND": False, "FALLBACK_ERROR_FORMAT": "json", "INSPECTOR": False, "MOTD": False,
        "NOISY_EXCEPTIONS": False, "OAS": False, "KEEP_ALIVE_TIMEOUT": 120, "REQUEST_TIMEOUT": 60,
        "RESPONSE_TIMEOUT": max(3600.0, http.request_timeout_s + 60), "REQUEST_MAX_SIZE": largest,
        "REQUEST_MAX_HEADER_SIZE": http.max_header_bytes, "GRACEFUL_TCP_CLOSE_TIMEOUT": 2.0,
        "REQUEST_BUFFER_SIZE": max(65536, http.max_header_bytes + 4096)})
    app: Sanic[Any, Any] = Sanic(name, config=config, configure_logging=False)
    ingress = Ingress(app, frontend.keys, http, frontend.metrics, lambda: frontend.table.draining)
    generate.Generate(frontend, ingress).register()
    pooling.Pooling(frontend).register(ingress)
    speech.Speech(frontend, ingress).register()
    tokens.Tokens(frontend).register(ingress)
    info.Info(frontend).register(ingress)
    invocations.Invocations(frontend, ingress).register()
    if http.enable_docs:
        info.register_document(ingress, frontend.config)
    return app, ingress


def prepare(sock: socket.socket) -> None:
    """Options of a listening socket that its connections inherit.

    A peer that vanished is noticed within a minute, and the kernel keeps little for one that does not read: what waits
    for a slow client waits in its request's buffer, where it is merged.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3),
                              (socket.TCP_USER_TIMEOUT, 60_000), (socket.TCP_NODELAY, 1)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def serve(app: Sanic[Any, Any], sock: Any, tls: SSLContext | None = None) -> AsyncioServer:
    """Accept connections on a listening socket in the running loop; `tls`: HTTPS with this context."""
    # Without this record Sanic would send an empty Alt-Svc header with every answer.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1, "port": 0}))
    server = await app.create_server(sock=sock, ssl=tls, asyncio_server_kwargs={"start_serving": False})
    assert server is not None
    await server.startup()
    await server.start_serving()
    return server
