"""The supervisord configuration of the daemon, and how a running supervisord is asked. Used by pipeline.daemon.

Imports nothing of supervisor: it runs as a program of its own, and answers XML-RPC on a private UNIX socket.
"""
from __future__ import annotations

import http.client
import os
import shlex
import socket
import xmlrpc.client
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.exits import CONFIG, MODEL_LOAD, OK, PORT_IN_USE

PROGRAM = "quartet"
STOP_MARGIN_S = 30                   # supervisord waits this much longer than a drain may take
START_S = 3                          # a server that ends earlier than this has failed to start
START_RETRIES = 3
EXPECTED = (OK, CONFIG, MODEL_LOAD, PORT_IN_USE)     # exit codes that starting again would not change
LOG_BYTES, LOG_FILES = "20MB", 5
SOCKET = "control.sock"
TIMEOUT_S = 120.0


def configuration(directory: Path, command: Sequence[str], shutdown_s: float, variables: Mapping[str, str]) -> str:
    """The text of a supervisord configuration that runs `command` as the one program."""
    def quoted(text: object) -> str:
        return str(text).replace("%", "%%")

    exports = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(variables.items()))
    return f"""\
; Written by `quartet up`; written anew by the next one.
[supervisord]
directory={quoted(directory)}
logfile={quoted(directory)}/supervisord.log
pidfile={quoted(directory)}/supervisord.pid
childlogdir={quoted(directory)}
logfile_maxbytes={LOG_BYTES}
logfile_backups={LOG_FILES}
nocleanup=true
umask=077

[unix_http_server]
file={quoted(directory)}/{SOCKET}
chmod=0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{quoted(directory)}/{SOCKET}

[program:{PROGRAM}]
command={quoted(shlex.join(command))}
directory={quoted(os.getcwd())}
environment={exports}
autostart=true
autorestart=unexpected
exitcodes={",".join(str(code) for code in EXPECTED)}
startsecs={START_S}
startretries={START_RETRIES}
stopsignal=TERM
stopasgroup=true
killasgroup=true
stopwaitsecs={int(shutdown_s) + STOP_MARGIN_S}
redirect_stderr=true
stdout_logfile={quoted(directory)}/quartet.log
stdout_logfile_maxbytes={LOG_BYTES}
stdout_logfile_backups={LOG_FILES}
"""


def _escaped(value: str) -> str:
    """A value between double quotes in supervisord's `environment`, where % expands and shlex rules hold."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


class _UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over supervisord's UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return unix_connection(self._path, TIMEOUT_S)


def control(directory: Path) -> Any:
    """The `supervisor` namespace of a running supervisord; None where none runs."""
    path = directory / SOCKET
    try:
        proxy = xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(path))
        proxy.supervisor.getState()
        return proxy.supervisor
    except (OSError, http.client.HTTPException):
        return None


def unix_connection(path: str, timeout_s: float) -> http.client.HTTPConnection:
    """An HTTP connection to a UNIX socket."""
    connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(timeout_s)
    connection.sock.connect(path)
    return connection
