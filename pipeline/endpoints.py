"""Names to ZeroMQ endpoints: a pure function of the configuration, so that every stage agrees without asking.

Every receiving socket and every beacon has a path ``{run}/{stage}.{index}.{name}``. The kernel's limit of 107 bytes
for such a path is checked at start.
"""
from __future__ import annotations

from pathlib import Path

from pipeline.config import ServerConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.messages import Kind
from pipeline.transport import Address

MAX_PATH_BYTES = 107
_LONGEST = "detokenizer.127.beacon"


def path_of(run_dir: str, kind: Kind, index: int, name: str) -> str:
    return f"{run_dir}/{kind.name.lower()}.{index}.{name}"


def endpoint(config: ServerConfig, address: Address) -> str:
    """Where the socket of `address` is bound."""
    return "ipc://" + path_of(config.run_dir, address.kind, address.index, address.name)


def beacon_endpoint(config: ServerConfig, kind: Kind, index: int) -> str:
    return "ipc://" + path_of(config.run_dir, kind, index, "beacon")


def check_run_dir(run_dir: str) -> None:
    """StartError where the longest socket path would not fit into the kernel's limit."""
    longest = len(str(Path(run_dir) / _LONGEST).encode())
    if longest > MAX_PATH_BYTES:
        raise StartError(CONFIG, f"The run directory {run_dir} is too long for UNIX sockets ({longest} of "
                                 f"{MAX_PATH_BYTES} bytes): set XDG_RUNTIME_DIR or TMPDIR to a shorter path.")
