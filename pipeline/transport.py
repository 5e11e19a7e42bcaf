"""The seam between a stage's logic and its sockets: addresses, the sender, and the shape of a stage.

A stage's logic is a plain object that receives messages and sends messages; pipeline.stage drives it over ZeroMQ,
tests drive several of them over an in-memory transport, and the engine can be driven in one process.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.messages import Kind, Load, State


@dataclass(frozen=True, slots=True)
class Address:
    """A receiving socket of one stage process: `name` is "in" (data) or "ctl" (an engine's control socket)."""

    kind: Kind
    index: int
    name: str = "in"


class Sender(Protocol):
    """Sends without ever blocking."""

    def send(self, to: Address, message: Any) -> bool:
        """Hand `message` over; False when the peer's bounded outbox is full and the message was not taken."""

    def pressure(self, to: Address) -> float:
        """How full the outbox towards `to` is: 0 flows freely, 1 refuses."""


class Logic(Protocol):
    """A stage as `pipeline.stage.run` drives it: one thread, one loop."""

    def handle(self, message: Any) -> None:
        """One decoded message. Raises BadFrame for a type that this stage never receives, and nothing else."""

    def turn(self) -> None:
        """Do a bounded piece of the pending work."""

    def has_work(self) -> bool:
        """Whether `turn` should be called again at once."""

    def accepting(self) -> bool:
        """Whether the data inbox may be read; False leaves messages in the socket (back-pressure)."""

    def next_timer_ns(self) -> int | None:
        """Monotonic time at which `turn` must be called even without messages."""

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        """A watched peer has a new epoch: what belonged to the old one is to be dropped."""

    def load(self) -> Load:
        """For the beacon."""


@dataclass(slots=True)
class Status:
    """A stage's own view of its life, which its beacon publishes. Written by the main thread only."""

    state: State = State.STARTING
    phase: str = "starting"
    percent: int = 0
    facts_json: bytes = b""
