"""A pooling engine in one process: a clock that tests move, and frontends that check what they are told."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from engine_proc.pooling.core import PoolingCore
from engine_proc.pooling.null import NullPoolRunner
from engine_proc.pooling.plan import PoolBatch, PoolResult
from pipeline import codec
from pipeline.config import EngineConfig, ModelConfig, ServerConfig
from pipeline.ids import RidMaker, frontend_index
from pipeline.messages import (
    Abort,
    AbortReason,
    Census,
    Failed,
    Kind,
    PoolAdd,
    PoolAdds,
    Pooled,
    PoolInput,
    Route,
    pack_ids,
    pack_rids,
    unpack_ids,
    unpack_rids,
)
from pipeline.params import PoolParams
from pipeline.transport import Address

EPOCH = 3


class RecordingRunner(NullPoolRunner):
    """The null runner, which remembers the batches that it was given."""

    def __init__(self, model: ModelConfig, depth: int) -> None:
        super().__init__(model, depth)
        self.batches: list[list[tuple[int, int]]] = []        # (rid, index) of each input

    def launch(self, batch: PoolBatch) -> object:
        self.batches.append([(item.request.rid, item.index) for item in batch.items])
        return super().launch(batch)

    def collect(self, handle: object) -> list[PoolResult]:
        return super().collect(handle)


@dataclass
class Peer:
    """What a frontend got: rows per input of each request."""

    rows: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)
    lengths: dict[int, dict[int, int]] = field(default_factory=dict)
    slices: list[tuple[int, int]] = field(default_factory=list)        # (rid, inputs) of each message
    failed: dict[int, str] = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)
    census: set[int] | None = None

    def receive(self, message: Any) -> None:
        if isinstance(message, Pooled):
            assert message.engine_epoch == EPOCH and message.rid not in self.failed
            indices, rows = unpack_ids(message.indices), unpack_ids(message.rows)
            assert len(indices) == len(rows) == len(unpack_ids(message.lengths)) and sum(rows) == len(message.data)
            got = self.rows.setdefault(message.rid, {})
            start = 0
            for index, count, length in zip(indices, rows, unpack_ids(message.lengths)):
                assert index not in got, "an input came twice"
                got[index] = message.data[start:start + count]
                self.lengths.setdefault(message.rid, {})[index] = length
                start += count
            self.slices.append((message.rid, len(indices)))
        elif isinstance(message, Failed):
            for item in message.items:
                assert item.rid not in self.failed, "failed twice"
                self.failed[item.rid], self.messages[item.rid] = item.code, item.message
        else:
            assert isinstance(message, Census)
            self.census = set(unpack_rids(message.rids))


class PoolWorld:
    """One pooling engine and its frontends; implements `transport.Sender` for it."""

    def __init__(self, task: str = "embed", depth: int = 0, *, frontends: int = 2, max_model_len: int = 64,
                 padded: bool = False, max_embed_len: int = 0, **engine: Any) -> None:
        engine = {"backend": "null", "max_step_tokens": 64, "max_num_seqs": 16} | engine
        model = ModelConfig(names=("m",), path="", task=task, max_model_len=max_model_len, vocab_size=1000,
                            max_embed_len=max_embed_len, engine=EngineConfig(**engine))
        self.config = ServerConfig(run_dir="", log_dir="", frontends=frontends, models=(model,))
        self.now = 10**9
        self.refusing: set[Address] = set()
        self.runner = RecordingRunner(model, depth)
        self.runner.padded = padded
        self.peers = [Peer() for _ in range(frontends)]
        self.makers = [RidMaker(i, 1) for i in range(frontends)]
        self.registry = CollectorRegistry()
        self.engine = PoolingCore(self.config, 0, EPOCH, self.runner, self, lambda: self.now, self.registry)

    def send(self, to: Address, message: Any) -> bool:
        if to in self.refusing:
            return False
        assert to.kind is Kind.FRONTEND
        self.peers[to.index].receive(codec.decode([bytes(f) for f in codec.encode(message)]))
        return True

    def pressure(self, to: Address) -> float:
        return 1.0 if to in self.refusing else 0.0

    def make(self, inputs: list[list[int]], *, rid: int | None = None, frontend: int = 0, start: int = 0,
             task: str | None = None, activation: bool | None = None, dimensions: int = 0, types: list[bytes] | None = None,
             parts: list[list[int]] | None = None, **values: Any) -> PoolAdd:
        """A PoolAdd; by default of a fresh request that holds nothing else."""
        route = Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=EPOCH, detok=0, detok_epoch=0)
        given = [PoolInput(start + i, pack_ids(ids), types[i] if types else b"",
                           pack_ids(parts[i]) if parts else b"") for i, ids in enumerate(inputs)]
        params = PoolParams(task or self.runner.tasks[0], activation, dimensions)
        values = {"route": route, "deadline_ns": 0, "total": start + len(inputs)} | values
        return PoolAdd(rid=self.makers[frontend].next() if rid is None else rid, inputs=given, params=params, **values)

    def submit(self, inputs: list[list[int]], **values: Any) -> int:
        return self.post(self.make(inputs, **values))

    def post(self, add: PoolAdd) -> int:
        self.engine.handle(codec.decode([bytes(f) for f in codec.encode(PoolAdds([add]))]))
        return add.rid

    def abort(self, *rids: int) -> None:
        self.engine.handle(Abort(pack_rids(rids), AbortReason.CLIENT_GONE))

    def rows(self, rid: int) -> list[np.ndarray]:
        """What came for a request, in the order of its inputs."""
        got = self.peers[frontend_index(rid)].rows.get(rid, {})
        return [got[index] for index in sorted(got)]

    def failure(self, rid: int) -> str | None:
        return self.peers[frontend_index(rid)].failed.get(rid)

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.turn()
            self.engine.assert_invariants()

    def run(self, limit: int = 5000) -> None:
        """Turn until the engine has nothing to do; its tables must then be empty."""
        self.turn()
        for _ in range(limit):
            if not self.engine.has_work():
                break
            self.turn()
        engine = self.engine
        assert not engine.has_work() and not engine.requests and not engine.scheduler.requests, "not finished"
        assert not engine.outputs

    def dropped(self, reason: str) -> float:
        value = self.registry.get_sample_value(
            "quartet:engine_dropped_total", {"model_name": "m", "engine": "0", "reason": reason})
        return value or 0.0
