"""The listening sockets of the HTTP server: bound first by the launcher, kept by it, and handed to the frontends.

One SO_REUSEPORT socket per frontend, so that the kernel spreads connections and those of a frontend that restarts wait
in its queue. The first socket is bound without SO_REUSEPORT: a second server on the same port is always noticed.
"""
from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from types import TracebackType

from pipeline.endpoints import MAX_PATH_BYTES
from pipeline.errors import StartError
from pipeline.exits import CONFIG, PORT_IN_USE

BACKLOG = 4096


class Listeners:
    """Bound, listening sockets, one per frontend (the same one for all of them with a UNIX socket)."""

    def __init__(self, sockets: list[socket.socket], uds: Path | None = None, scheme: str = "http") -> None:
        self.sockets = sockets
        self.uds = uds
        self._scheme = scheme
        self._inode = uds.stat().st_ino if uds is not None else 0

    @property
    def port(self) -> int:
        """The port that was bound; 0 with a UNIX socket."""
        return 0 if self.uds is not None else int(self.sockets[0].getsockname()[1])

    @property
    def host(self) -> str:
        return "" if self.uds is not None else str(self.sockets[0].getsockname()[0])

    @property
    def loopback(self) -> bool:
        return self.uds is not None or self.host == "::1" or self.host.startswith("127.")

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        if self.uds is not None:
            return f"http+unix://{self.uds}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{self._scheme}://[{host}]:{self.port}" if ":" in host else f"{self._scheme}://{host}:{self.port}"

    def fd(self, index: int) -> int:
        """The descriptor for frontend `index`."""
        return self.sockets[index % len(self.sockets)].fileno()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; a UNIX socket's file goes, unless somebody put another one in its place."""
        for sock in self.sockets:
            sock.close()
        if self.uds is not None:
            with contextlib.suppress(OSError):
                if self.uds.stat().st_ino == self._inode:
                    self.uds.unlink()


def bind(host: str, port: int, uds: str | None, count: int, scheme: str = "http") -> Listeners:
    """Listen for `count` frontends; StartError with exit code 6 when the place is taken, 2 when it is wrong."""
    if uds is not None:
        return _bind_unix(Path(uds).expanduser().absolute())
    return _bind_tcp(host, port, count, scheme)


def _bind_tcp(host: str, port: int, count: int, scheme: str) -> Listeners:
    family, address = _resolve(host, port)
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if len(sockets) > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(address)
            sock.listen(BACKLOG)                       # from here on nobody else can bind this port ...
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)      # ... but our own further sockets
            address = (address[0], sock.getsockname()[1], *address[2:])
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _refusal(error, f"{host}:{port}" if ":" not in host else f"[{host}]:{port}") from None
    return Listeners(sockets, scheme=scheme)


def _resolve(host: str, port: int) -> tuple[int, tuple]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise StartError(CONFIG, f"The host '{host}' is neither an address nor a known name.") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)       # for names such as localhost
    return found[0][0], found[0][4]


def _refusal(error: OSError, where: str) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return StartError(PORT_IN_USE, f"The address {where} is already in use: choose another one (--port 0 takes a "
                                       "free port).")
    if error.errno == errno.EADDRNOTAVAIL:
        return StartError(CONFIG, f"The address {where} does not belong to this machine.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StartError(CONFIG, f"This user may not listen on {where}.")
    return StartError(CONFIG, f"Listening on {where} failed: {error.strerror}.")


def _bind_unix(path: Path) -> Listeners:
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise StartError(CONFIG, f"The path of --uds is longer than {MAX_PATH_BYTES} bytes, the limit of UNIX sockets.")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _refusal(error, str(path)) from None
    except StartError:
        sock.close()
        raise
    return Listeners([sock], path)


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens on; StartError for anything else in the place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartError(CONFIG, f"{path} exists and is not a socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass
    raise StartError(PORT_IN_USE, f"The socket {path} is already in use.")
