"""``python -m frontend --config FILE --index N --epoch E --listen-fd N``: one frontend process.

Takes a listening socket that the launcher holds too, so that connections queue while a frontend restarts. SIGTERM
drains, a second one ends at once, SIGHUP reloads keys, certificate and log level. Never loads torch, transformers or
tokenizers.
"""
from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvloop
from sanic.http import Stage
from sanic.server import AsyncioServer

from frontend.admission import Admission
from frontend.certificate import Certificate
from frontend.edge import Edge
from frontend.keys import Keys
from frontend.link import Link, watch
from frontend.metrics import FrontendMetrics
from frontend.server import Frontend, build_app, prepare, serve
from frontend.stages import Stages
from frontend.table import RequestTable
from pipeline.config import load
from pipeline.errors import QuartetError, StartError
from pipeline.ids import RidMaker
from pipeline.messages import Kind, State
from pipeline.stage import Context, enter

LAST_WORDS_S = 2.0               # for error events and their connections, after the drain
DRAIN_POLL_S = 0.02
HEAR_S = 3.0                     # for the first beacons of the other stages
log = logging.getLogger("frontend")


class Process:
    """A frontend from its first beacon to its exit."""

    def __init__(self, context: Context, argv_config: str) -> None:
        self._context, self._config_path = context, argv_config
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        config = context.config
        self._watcher = watch(context)
        self._stages = Stages(config, self._watcher.latest, time.monotonic_ns)
        self._metrics = FrontendMetrics(config, context.registry, context.index)
        self._table = RequestTable(RidMaker(context.index, context.epoch), self._stages, context.sender,
                                   time.monotonic_ns, self._metrics)
        admission = Admission(config.limits, config.frontends)
        self._metrics.watch(admission, context.registry)
        self._keys = Keys(config.http)
        self._frontend = Frontend(
            config, self._table, self._stages, admission, self._metrics, self._keys, lambda: self._watcher.metrics,
            context.index)
        tls_config = config.http.tls
        self._certificate = Certificate(tls_config) if tls_config.certfile is not None else None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        link = Link(self._context, self._watcher, self._stages, self._table, self._metrics)
        app, _ = build_app(self._frontend)
        await self._hear_everybody()
        edge = Edge(self._context, self._frontend) if self._context.config.edge.endpoint is not None else None
        certificate = self._certificate
        server = await serve(app, listening_socket(self._context), None if certificate is None else certificate.context)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)        # Sanic has put its own
        gc.collect()
        gc.freeze()
        self._context.ready()
        log.info("frontend %d serves", self._context.index)
        await self._stop.wait()
        await self._drain(server)
        if edge is not None:
            edge.close()
        link.close()

    async def _hear_everybody(self) -> None:
        """Do not serve before the others' beacons are in: a successor would refuse what queued while it started."""
        expected = [m for m in self._context.config.members() if m != (Kind.FRONTEND, self._context.index)]
        deadline = time.monotonic() + HEAR_S
        while not all(m in self._watcher.latest for m in expected) and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)

    async def _drain(self, server: AsyncioServer) -> None:
        """Refuse what is new, let the rest finish, then end it with an error."""
        timeouts = self._context.config.timeouts
        self._table.draining = True
        self._context.status.state, self._context.status.phase = State.DRAINING, "draining"
        self._context.publisher.announce()
        log.info("draining %d requests", len(self._table))
        await self._until(lambda: self._idle(server), timeouts.shutdown_s)
        self._table.fail_all(QuartetError("draining", "The server was shut down before the request ended."))
        await self._until(lambda: self._idle(server), LAST_WORDS_S)
        server.close()
        for connection in list(server.connections):
            connection.close()
        await self._until(lambda: not server.connections, LAST_WORDS_S)       # what is written may still be on its way

    def _idle(self, server: AsyncioServer) -> bool:
        """No request is open and no call is being read or answered. Kept-alive connections do not count."""
        return not len(self._table) and all(
            connection.http is None or connection.http.stage is Stage.IDLE for connection in server.connections)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for the condition, a second SIGTERM, or the end of the time."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline and not self._now.is_set():
            await asyncio.sleep(DRAIN_POLL_S)

    def _terminate(self) -> None:
        if self._stop.is_set():
            self._now.set()
        self._stop.set()

    def _reload(self) -> None:
        """SIGHUP: keys, certificate and log level, from the files that the configuration names."""
        self._keys.reload()
        if self._certificate is not None:
            self._certificate.reload()
        try:
            logging.getLogger().setLevel(load(self._config_path).log_level)
        except (StartError, ValueError):
            log.error("the configuration could not be read again; the log level stays")
        log.warning("keys, certificate and log level were reloaded")


def listening_socket(context: Context) -> socket.socket:
    """The socket that the launcher handed over, or one of our own where the stage is started by hand."""
    given = context.extra["listen-fd"]
    http = context.config.http
    if given:
        sock = socket.socket(fileno=int(given))
    elif http.uds is not None:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(http.uds)
        sock.listen(1024)
    else:
        family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
        sock = socket.create_server((http.host, http.port), family=family, backlog=1024, reuse_port=True)
    prepare(sock)
    return sock


def main() -> int:
    context = enter(Kind.FRONTEND, options=["listen-fd"])
    for name in ("sanic.root", "sanic.error", "sanic.access", "sanic.server", "sanic.websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = sys.argv[sys.argv.index("--config") + 1]

    async def run() -> None:
        await Process(context, path).run()

    try:
        uvloop.run(run())
        return 0
    except StartError as error:
        log.error("cannot start: %s", error.message)
        print(error.message, file=sys.stderr)
        return error.exit_code
    except Exception:
        log.exception("the frontend ends after an unexpected error")
        raise
    finally:
        context.close()


if __name__ == "__main__":
    sys.exit(main())
