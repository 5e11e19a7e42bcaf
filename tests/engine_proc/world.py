"""An engine in one process: a clock that tests move, and peers that check what they are told.

`World` joins an EngineCore to models of its detokenizers and frontends through the codec. The models hold the rules of
the protocol: an Open ahead of the first record, contiguous ids, one closing record, nothing for what is unknown.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from engine_proc.core import EngineCore
from engine_proc.null import Script
from engine_proc.request import Sequence
from pipeline import codec
from pipeline.config import ModelConfig, ServerConfig
from pipeline.ids import RidMaker, frontend_index
from pipeline.messages import (
    Abort,
    AbortReason,
    Add,
    Adds,
    Admitted,
    Census,
    Failed,
    Finish,
    Kind,
    Open,
    Route,
    StepOut,
    TokenOut,
    Usage,
    pack_rids,
    unpack_ids,
    unpack_rids,
)
from pipeline.params import DetokSpec
from pipeline.transport import Address
from tests import rows
from tests.engine_proc.harness import EOS, KvRunner, alone, engine_config, make_add

EPOCH = 3


@dataclass
class Entry:
    """What a detokenizer has of one choice."""

    opened: Open
    ids: list[int] = field(default_factory=list)
    finish: Finish = Finish.RUNNING
    stop_id: int | None = None
    usage: Usage | None = None
    records: list[TokenOut] = field(default_factory=list)

    @property
    def output(self) -> tuple[list[int], Finish]:
        return list(unpack_ids(self.opened.history)) + self.ids, self.finish


@dataclass
class DetokPeer:
    epoch: int = 1
    open: dict[int, Entry] = field(default_factory=dict)
    closed: dict[int, Entry] = field(default_factory=dict)

    def receive(self, message: Any) -> None:
        assert isinstance(message, StepOut) and message.engine_epoch == EPOCH
        if message.detok_epoch != self.epoch:
            return
        assert message.opens or message.items or message.rows
        for opened in message.opens:
            assert opened.rid not in self.open and opened.rid not in self.closed, "opened twice"
            self.open[opened.rid] = Entry(opened)
        for out in rows.tokens(message):
            entry = self.open[out.rid]               # KeyError: a record for what was never opened, or is closed
            ids = unpack_ids(out.ids)
            assert out.start == len(entry.output[0]), "ids are missing or repeated"
            assert out.usage is not None or (entry.records and not out.finish), "usage with the first and the last ids"
            entry.ids.extend(ids)
            entry.records.append(out)
            entry.usage = out.usage or entry.usage
            entry.finish, entry.stop_id = Finish(out.finish), out.stop_id
            if out.finish:
                self.closed[out.rid] = self.open.pop(out.rid)


@dataclass
class FrontendPeer:
    admitted: dict[int, bytes] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)
    census: set[int] | None = None

    def receive(self, message: Any) -> None:
        if isinstance(message, Admitted):
            for item in message.items:
                assert item.rid not in self.admitted
                self.admitted[item.rid] = item.ids
        elif isinstance(message, Failed):
            assert (message.kind, message.epoch) == (Kind.ENGINE, EPOCH)
            for failed in message.items:
                assert failed.rid not in self.failed, "failed twice"
                self.failed[failed.rid], self.messages[failed.rid] = failed.code, failed.message
        else:
            assert isinstance(message, Census)
            self.census = set(unpack_rids(message.rids))


class World:
    """One engine and its peers; implements `transport.Sender` for it."""

    def __init__(self, depth: int = 0, *, frontends: int = 2, detokenizers: int = 2, max_model_len: int = 64,
                 eos_ids: tuple[int, ...] = (EOS, 5), max_pending: int | None = None, **engine: Any) -> None:
        settings = engine_config(**engine)
        self.config = ServerConfig(
            run_dir="", log_dir="", frontends=frontends, detokenizers=detokenizers,
            models=(ModelConfig(names=("m",), path="", max_model_len=max_model_len, eos_ids=eos_ids, engine=settings),))
        self.now = 10**9
        self.refusing: set[Address] = set()
        self.pressures: dict[Address, float] = {}
        self.runner = KvRunner(settings, depth)
        self.registry = CollectorRegistry()
        self.detoks = [DetokPeer() for _ in range(detokenizers)]
        self.frontends = [FrontendPeer() for _ in range(frontends)]
        self.makers = [RidMaker(i, 1) for i in range(frontends)]
        self.sent: Counter[Address] = Counter()
        self.engine = EngineCore(self.config, 0, EPOCH, self.runner, self, lambda: self.now, self.registry)
        if max_pending is not None:
            self.engine.outputs._max_pending = max_pending
        self.adds: dict[int, Add] = {}

    # ---- Sender --------------------------------------------------------------------------------------------------

    def send(self, to: Address, message: Any) -> bool:
        if to in self.refusing:
            return False
        self.sent[to] += 1
        peers: Any = self.detoks if to.kind is Kind.DETOKENIZER else self.frontends
        peers[to.index].receive(codec.decode([bytes(f) for f in codec.encode(message)]))
        return True

    def pressure(self, to: Address) -> float:
        return 1.0 if to in self.refusing else self.pressures.get(to, 0.0)

    # ---- requests ------------------------------------------------------------------------------------------------

    def route(self, detok: int = 0) -> Route:
        return Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=EPOCH, detok=detok,
                     detok_epoch=self.detoks[detok].epoch)

    def make(self, prompt: Any, *, frontend: int = 0, detok: int = 0, spec: DetokSpec | None = None,
             **values: Any) -> Add:
        """An Add with a fresh id, not sent. `detok` is the number of the detokenizer, `spec` what it is told."""
        values.setdefault("route", self.route(detok))
        values.setdefault("max_tokens", 8)
        return make_add(self.makers[frontend].next(), prompt, detok=spec, **values)

    def submit(self, prompt: Any, **values: Any) -> int:
        return self.post(self.make(prompt, **values))

    def post(self, add: Add) -> int:
        self.adds[add.rid] = add
        self.engine.handle(Adds([add]))
        return add.rid

    def abort(self, *rids: int) -> None:
        self.engine.handle(Abort(pack_rids(rids), AbortReason.CLIENT_GONE))

    def expected(self, rid: int, j: int = 0) -> tuple[list[int], Finish]:
        """The oracle: what child `j` of a submitted Add must give."""
        add = self.adds[rid]
        seq = Sequence.of(add, j, 0, self.engine.limits.longest)
        seq.stops = frozenset(unpack_ids(add.sampling.stop_ids))
        if not add.sampling.ignore_eos:
            seq.stops, seq.eos_id = seq.stops | set(self.engine.limits.eos_ids), EOS
        return alone(seq, Script.parse(self.config.models[0].engine.null_script))

    def outcome(self, rid: int) -> Entry:
        """The closed entry of a choice."""
        return next(peer.closed[rid] for peer in self.detoks if rid in peer.closed)

    def output(self, rid: int) -> tuple[list[int], Finish]:
        return self.outcome(rid).output

    def failure(self, rid: int) -> str | None:
        return self.frontends[frontend_index(rid)].failed.get(rid)

    # ---- time ----------------------------------------------------------------------------------------------------

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.turn()
            self.engine.assert_invariants()

    def run(self, limit: int = 3000) -> None:
        """Turn until the engine has nothing to do; its tables must then be empty."""
        self.turn()
        for _ in range(limit):
            if not self.engine.has_work():
                break
            self.turn()
        self.assert_empty()

    def assert_empty(self) -> None:
        engine = self.engine
        assert not engine.has_work() and not engine.sequences and not engine.families, "not finished"
        assert engine.scheduler.pool.num_used == 0 and not self.runner.slots and not engine.scheduler.num_waiting
        assert not engine.outputs
        assert not any(peer.open for peer in self.detoks), "opened and never closed"
        load = engine.load()
        assert (load.running, load.waiting, load.waiting_tokens, load.kv_used) == (0, 0, 0, 0)

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})
        return 0.0 if value is None else value

    def dropped(self, reason: str) -> float:
        return self.metric("quartet:engine_dropped_total", reason=reason)
