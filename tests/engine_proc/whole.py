"""A whole engine around a real model in one process: requests in, what detokenizer and frontend would be told out."""
from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from engine_proc.core import EngineCore
from engine_proc.runner import ModelRunner
from pipeline import codec
from pipeline.config import EngineConfig, ModelConfig, ServerConfig
from pipeline.ids import RidMaker
from pipeline.logprobs import join_logprobs
from pipeline.messages import Add, Adds, Failed, Finish, Logprobs, Route, StepOut, unpack_ids
from pipeline.transport import Address
from tests import rows
from tests.engine_proc.harness import make_add

EPOCH = 3
ROUTE = Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=EPOCH, detok=0, detok_epoch=1)


@dataclass
class Told:
    """What came of one choice."""

    ids: list[int] = field(default_factory=list)
    finish: Finish = Finish.RUNNING
    stop_id: int | None = None
    parts: list[Logprobs] = field(default_factory=list)
    prompt: Logprobs | None = None
    error: str | None = None

    @property
    def logprobs(self) -> Logprobs:
        return join_logprobs(self.parts)


class Engine:
    """Implements `transport.Sender` for its core."""

    def __init__(self, runner: ModelRunner, eos_ids: tuple[int, ...] = (), max_model_len: int = 200,
                 **engine: Any) -> None:
        settings = {"num_kv_blocks": runner.num_blocks, "block_size": runner.block_size, **engine}
        model = ModelConfig(names=("m",), path="", max_model_len=max_model_len, eos_ids=eos_ids,
                            engine=EngineConfig(**settings))
        config = ServerConfig(run_dir="", log_dir="", models=(model,))
        self.now = 10**9
        self.runner = runner
        self.core = EngineCore(config, 0, EPOCH, runner, self, lambda: self.now)
        self.rids = RidMaker(0, 1)
        self.told: dict[int, Told] = {}

    def send(self, to: Address, message: Any) -> bool:
        message = codec.decode([bytes(f) for f in codec.encode(message)])
        if isinstance(message, StepOut):
            for out in rows.tokens(message):
                told = self.told[out.rid]
                told.ids += unpack_ids(out.ids)
                told.finish, told.stop_id = Finish(out.finish), out.stop_id
                told.parts += [out.logprobs] if out.logprobs is not None else []
                told.prompt = out.prompt_logprobs or told.prompt
        elif isinstance(message, Failed):
            for item in message.items:
                self.told.setdefault(item.rid, Told()).error = item.code
        return True

    def pressure(self, to: Address) -> float:
        return 0.0

    def add(self, prompt: list[int], **values: Any) -> Add:
        values = {"temperature": 0.0, "max_tokens": 8, "route": ROUTE, **values}
        add = make_add(self.rids.next(), prompt, **values)
        for j in range(add.n):
            self.told[add.rid + j] = Told()
        self.core.handle(Adds([add]))
        return add

    def run(self) -> None:
        """Until nothing is left to do; every table and the pool must be empty then."""
        for _ in range(5000):
            self.core.turn()
            self.core.assert_invariants()
            self.now += 10**7
            if not (self.core.has_work() or self.core.sequences):
                break
        assert not self.core.sequences and self.core.scheduler.pool.num_used == 0
        self.runner.slots.assert_invariants([])

    def ask(self, prompt: list[int], **values: Any) -> list[Told]:
        """The choices of one request."""
        add = self.add(prompt, **values)
        self.run()
        return [self.told[add.rid + j] for j in range(add.n)]

    def output(self, prompt: list[int], **values: Any) -> list[int]:
        (told,) = self.ask(prompt, **values)
        assert told.error is None, told.error
        return told.ids


def packed(*ids: int) -> bytes:
    return array("I", ids).tobytes()
