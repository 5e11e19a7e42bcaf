"""CURVE keys for ZeroMQ over TCP: made by ``quartet keys DIR``, used by the frontends' ROUTER and by clients.

A key directory holds `server.key` (0600), `server.pub`, `client.key` (0600), `client.pub` and `clients/`, whose
``*.pub`` files name the clients that may connect. A host that only calls needs `server.pub`, `client.key` and
`client.pub`.
"""
from __future__ import annotations

import os
from pathlib import Path

import zmq

from pipeline.errors import StartError
from pipeline.exits import CONFIG


def make(directory: Path) -> list[Path]:
    """Write a fresh server and client pair; StartError where there are keys already."""
    if (directory / "server.key").exists():
        raise StartError(CONFIG, f"There are keys in {directory} already: remove them first.")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    (directory / "clients").mkdir(exist_ok=True, mode=0o700)
    written = []
    for name in ("server", "client"):
        public, secret = zmq.curve_keypair()
        written += [_write(directory / f"{name}.key", secret, 0o600), _write(directory / f"{name}.pub", public, 0o644)]
        if name == "client":
            written.append(_write(directory / "clients" / "client.pub", public, 0o644))
    return written


def as_server(socket: zmq.Socket[bytes], directory: Path) -> None:
    """Make a socket a CURVE server; whose keys it takes is the authenticator's business."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, read(directory / "server.key"))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, read(directory / "server.pub"))


def as_client(socket: zmq.Socket[bytes], directory: Path) -> None:
    socket.setsockopt(zmq.CURVE_SERVERKEY, read(directory / "server.pub"))
    socket.setsockopt(zmq.CURVE_SECRETKEY, read(directory / "client.key"))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, read(directory / "client.pub"))


def clients(directory: Path) -> frozenset[bytes]:
    """The public keys that may connect (Z85)."""
    return frozenset(read(path) for path in sorted((directory / "clients").glob("*.pub")))


def read(path: Path) -> bytes:
    """A Z85 key of 40 characters; StartError if the file holds none."""
    try:
        key = path.read_bytes().strip()
    except OSError:
        raise StartError(CONFIG, f"The key file {path} cannot be read: make keys with `quartet keys`.") from None
    if len(key) != 40:
        raise StartError(CONFIG, f"The file {path} holds no CURVE key.")
    return key


def _write(path: Path, data: bytes, mode: int) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data + b"\n")
    return path
