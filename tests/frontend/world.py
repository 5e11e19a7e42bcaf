"""A pipeline of paper around a request table: tests turn the clock, write the beacons, and read what was sent."""
from __future__ import annotations

from typing import Any

from frontend.request import Prompt, Request, Spec
from frontend.stages import Stages
from frontend.table import RequestTable
from pipeline.beacon import Heard
from pipeline.config import ModelConfig, ServerConfig
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    AbortReason,
    Admitted,
    AdmittedItem,
    Beacon,
    Census,
    Deltas,
    Failed,
    FailedItem,
    Finish,
    Kind,
    Load,
    State,
    Submit,
    TextDelta,
    Usage,
    pack_ids,
    pack_rids,
    unpack_rids,
)
from pipeline.params import DetokSpec, SamplingParams
from pipeline.transport import Address
from tests import rows

SECOND = 10**9


def config(**changes: Any) -> ServerConfig:
    model = ModelConfig(names=("tiny", "alias"), path="/nowhere", vocab_size=1000, max_model_len=256)
    return ServerConfig(**{"run_dir": "/nowhere", "log_dir": "/nowhere", "models": (model,), **changes})


def beacon(kind: Kind, index: int, epoch: int = 1, state: State = State.READY, **changes: Any) -> Beacon:
    return Beacon(**{"protocol": 1, "kind": kind, "index": index, "epoch": epoch, "pid": 1, "state": state, "phase": "",
                     "percent": 100, "tick": 1, "tick_age_ms": 0, "pending": False, "load": Load(), **changes})


class Counts:
    """An observer that only remembers."""

    def __init__(self) -> None:
        self.reasons: list[AbortReason | None] = []
        self.again: list[str] = []
        self.strangers: list[str] = []
        self.firsts = self.nexts = 0

    def first_token(self, request: Request, seconds: float) -> None:
        self.firsts += 1

    def next_token(self, request: Request, seconds: float) -> None:
        self.nexts += 1

    def closed(self, request: Request, reason: AbortReason | None) -> None:
        self.reasons.append(reason)

    def resubmitted(self, why: str) -> None:
        self.again.append(why)

    def unknown(self, what: str) -> None:
        self.strangers.append(what)


class Recorder:
    """A Sender that keeps what it is given; `full` refuses."""

    def __init__(self) -> None:
        self.sent: list[tuple[Address, Any]] = []
        self.full: set[Address] = set()

    def send(self, to: Address, message: Any) -> bool:
        if to in self.full:
            return False
        self.sent.append((to, message))
        return True

    def pressure(self, to: Address) -> float:
        return 1.0 if to in self.full else 0.0


class World:
    """One request table with everything that it needs."""

    def __init__(self, **changes: Any) -> None:
        self.config = config(**changes)
        self.now = 1000 * SECOND
        self.latest: dict[tuple[Kind, int], Heard] = {}
        self.sender = Recorder()
        self.counts = Counts()
        self.stages = Stages(self.config, self.latest, lambda: self.now)
        self.table = RequestTable(RidMaker(3, 1), self.stages, self.sender, lambda: self.now, self.counts)
        self.wakes = 0
        for kind, index in self.config.members():
            if kind is not Kind.FRONTEND:
                self.beacon(kind, index)

    def beacon(self, kind: Kind, index: int = 0, epoch: int = 1, state: State = State.READY, **changes: Any) -> None:
        """A beacon arrives, as frontend.link delivers it."""
        known = self.latest.get((kind, index))
        self.latest[kind, index] = Heard(beacon(kind, index, epoch, state, **changes), self.now)
        self.stages.note()
        if known is not None and known.beacon.epoch < epoch:
            self.table.stage_restarted(kind, index, epoch)
        self.table.beacons_changed()

    def restart(self, kind: Kind, index: int = 0) -> None:
        """The stage dies and comes back ready under the next epoch."""
        epoch = self.latest[kind, index].beacon.epoch + 1
        self.beacon(kind, index, epoch, State.STARTING)
        self.beacon(kind, index, epoch, State.READY)

    def spec(self, *texts: str, n: int = 1, **changes: Any) -> Spec:
        sampling = changes.pop("sampling", SamplingParams(max_tokens=16))
        detok = changes.pop("detok", DetokSpec())
        return Spec(model=0, prompts=[Prompt(text=t) for t in texts or ("hello",)], n=n, sampling=sampling,
                    detok=detok, stream=changes.pop("stream", True), **changes)

    def open(self, *texts: str, n: int = 1, **changes: Any) -> Request:
        return self.table.open(self.spec(*texts, n=n, **changes), self._wake)

    def _wake(self) -> None:
        self.wakes += 1

    # ---- what was sent ----

    def submits(self) -> list[Submit]:
        return [m for _, m in self.sender.sent if isinstance(m, Submit)]

    def aborts(self, kind: Kind) -> list[int]:
        """Ids aborted at a kind of stage, in order."""
        return [rid for to, m in self.sender.sent if isinstance(m, Abort) and to.kind is kind
                for rid in unpack_rids(m.rids)]

    def forget(self) -> None:
        self.sender.sent.clear()

    # ---- what comes back ----

    def admit(self, submit: Submit, ids: list[int] | None = None) -> None:
        self.table.handle(Admitted(submit.route.engine, submit.route.engine_epoch,
                                   [AdmittedItem(submit.rid, pack_ids(ids or [1, 2, 3]))]))
        self.table.assert_invariants()

    def delta(self, rid: int, text: str = "", ids: list[int] | None = None, *, offset: int = 0, start: int = 0,
              finish: Finish = Finish.RUNNING, **changes: Any) -> None:
        item = TextDelta(rid, offset, text, start, pack_ids(ids or []), finish, **changes)
        self.table.handle(rows.texts(Deltas(0, 1, [item])))
        self.table.assert_invariants()

    def fail(self, rid: int, code: str = "invalid_value", message: str = "no", param: str | None = None) -> None:
        self.table.handle(Failed(Kind.ENGINE, 0, 1, [FailedItem(rid, code, message, param)]))
        self.table.assert_invariants()

    def census(self, *rids: int, engine: int = 0, epoch: int = 1) -> None:
        self.table.handle(Census(engine, epoch, pack_rids(rids)))
        self.table.assert_invariants()

    def pass_time(self, seconds: float) -> None:
        """The clock turns while every stage keeps sending beacons."""
        self.now += int(seconds * SECOND)
        for heard in self.latest.values():
            heard.at_ns = self.now
        self.table.tick()
        self.table.assert_invariants()


def usage(prompt: int = 3, cached: int = 0, completion: int = 0) -> Usage:
    return Usage(prompt, cached, completion)
