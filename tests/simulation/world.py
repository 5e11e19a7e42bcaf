"""The four stages in one process, joined by a scripted transport: a seeded scheduler decides who moves next.

Every message goes through the real codec. Links are FIFO per (sender process, receiving socket), as ZeroMQ's are;
when a process dies, what its inboxes held may be lost, what is queued towards it reaches its successor, and the others
learn of the new epoch at different moments. Time is virtual.
"""
from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from detok_proc.worker import DetokWorker, Vocabs
from engine_proc.core import EngineCore
from engine_proc.null import NullRunner
from frontend.request import Prompt, Request, Spec
from frontend.stages import Stages
from frontend.table import RequestTable
from pipeline import codec
from pipeline.beacon import Heard
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError
from pipeline.ids import RidMaker
from pipeline.messages import PROTOCOL, AbortReason, Beacon, Finish, Kind, Load, State, pack_ids
from pipeline.params import DetokSpec, SamplingParams
from pipeline.transport import Address
from tokenizer_proc.worker import TokenizerWorker

Process = tuple[Kind, int]


class Links:
    """Sender side of one process: FIFO queues of frames towards each receiving socket."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process

    def send(self, to: Address, message: Any) -> bool:
        queue = self._world.links.setdefault((self._process, to), deque())
        if len(queue) >= self._world.max_queue:
            return False
        queue.append([bytes(f) for f in codec.encode(message)])
        return True

    def pressure(self, to: Address) -> float:
        return len(self._world.links.get((self._process, to), ())) / self._world.max_queue


class Observer:
    """Counts what the request table reports."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def first_token(self, request: Request, seconds: float) -> None:
        self.counts["first"] += 1

    def next_token(self, request: Request, seconds: float) -> None:
        self.counts["next"] += 1

    def closed(self, request: Request, reason: AbortReason | None) -> None:
        self.counts["closed"] += 1

    def resubmitted(self, why: str) -> None:
        self.counts[f"again:{why}"] += 1

    def unknown(self, what: str) -> None:
        self.counts[f"unknown:{what}"] += 1


@dataclass(eq=False)
class Caller:
    """One request and what its caller saw."""

    name: str
    request: Request
    table: RequestTable
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, list[tuple[Finish, str | int | None]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    left: bool = False
    woken: int = 0

    def read(self) -> None:
        for update in self.request.take():
            self.texts[update.index] = self.texts.get(update.index, "") + update.text
            self.ids.setdefault(update.index, []).extend(update.ids)
            assert update.completion_tokens == len(self.ids[update.index])
            if update.finish:
                self.finishes.setdefault(update.index, []).append((update.finish, update.stop))
        if self.request.error is not None and not self.errors:
            self.errors.append(self.request.error.code)

    @property
    def over(self) -> bool:
        return self.left or self.request.done

    def answer(self) -> tuple[Any, ...]:
        return self.texts, self.ids, self.finishes


class World:
    """All processes, links and the clock. `rng` decides everything."""

    def __init__(self, config: ServerConfig, vocabs: Vocabs, rng: random.Random, *, max_queue: int = 1000) -> None:
        self.config, self.vocabs, self.rng, self.max_queue = config, vocabs, rng, max_queue
        self.members = config.members()
        self.now = 1_000_000_000
        self.links: dict[tuple[Process, Address], deque[list[bytes]]] = {}
        self.epochs: dict[Process, int] = {}
        self.stages: dict[Process, Any] = {}
        self.told: dict[tuple[Process, Process], int] = {}           # (watcher, watched) -> epoch told
        self.latest: dict[int, dict[Process, Heard]] = {}            # per frontend
        self.observers: list[Observer] = []
        self.callers: list[Caller] = []
        self.deaths: Counter[Kind] = Counter()
        for process in self.members:
            self.start(process)
        for process in self.members:
            self.tell(process)

    # ---- processes -------------------------------------------------------------------------------------------

    def start(self, process: Process) -> None:
        kind, index = process
        epoch = self.epochs[process] = self.epochs.get(process, 0) + 1
        links, config = Links(self, process), self.config
        if kind is Kind.FRONTEND:
            observer = Observer()
            self.observers.append(observer)
            self.latest[index] = {}
            stages = Stages(config, self.latest[index], lambda: self.now)
            self.stages[process] = (RequestTable(RidMaker(index, epoch), stages, links, lambda: self.now, observer), stages)
        elif kind is Kind.TOKENIZER:
            self.stages[process] = TokenizerWorker(config, index, epoch, links, CollectorRegistry())
        elif kind is Kind.ENGINE:
            model = config.models[config.engines()[index]]
            runner = NullRunner(model.engine, model.vocab_size)
            self.stages[process] = EngineCore(config, index, epoch, runner, links, lambda: self.now)
        else:
            self.stages[process] = DetokWorker(config, index, epoch, links, CollectorRegistry(), self.vocabs)

    def tell(self, watcher: Process) -> None:
        """`watcher` reads its beacons: it learns every epoch as it is now."""
        for process, epoch in self.epochs.items():
            if process == watcher:
                continue
            new = self.told.get((watcher, process)) != epoch
            self.told[watcher, process] = epoch
            if watcher[0] is Kind.FRONTEND:
                table, stages = self.stages[watcher]
                beacon = Beacon(PROTOCOL, process[0], process[1], epoch, 1, State.READY, "", 100, 1, 0, False, Load())
                self.latest[watcher[1]][process] = Heard(beacon, self.now)
                stages.note()
                if new:
                    table.stage_restarted(process[0], process[1], epoch)
                table.beacons_changed()
            elif new:
                self.stages[watcher].peer_restarted(process[0], process[1], epoch)

    def kill(self, process: Process) -> None:
        """SIGKILL and a restart. Whatever it had read is gone, and perhaps what it had queued and not read."""
        self.deaths[process[0]] += 1
        for (sender, to), queue in self.links.items():
            if sender == process:
                for _ in range(self.rng.randint(0, len(queue))):
                    queue.pop()                                      # never left its own outbox
            elif (to.kind, to.index) == process and self.rng.random() < 0.5:
                for _ in range(self.rng.randint(0, len(queue))):
                    queue.popleft()                                  # was in its inbox already
        if process[0] is Kind.FRONTEND:
            for caller in self.callers:
                if caller.table is self.stages[process][0]:
                    caller.left = True                               # its connection was reset
        self.start(process)
        for watcher in self.members:
            self.told.pop((process, watcher), None)
        self.tell(process)

    # ---- moves -----------------------------------------------------------------------------------------------

    def deliver(self, key: tuple[Process, Address]) -> None:
        to = key[1]
        stage = self.stages[to.kind, to.index]
        if to.kind is Kind.FRONTEND:
            stage[0].handle(codec.decode(self.links[key].popleft()))
        elif to.name != "in" or stage.accepting():
            stage.handle(codec.decode(self.links[key].popleft()))

    def turn(self, process: Process) -> None:
        stage = self.stages[process]
        if process[0] is Kind.FRONTEND:
            stage[0].tick()
        else:
            stage.turn()

    def step(self) -> None:
        """One random move: a delivery, a turn, or a look at the beacons; time goes on a little."""
        self.now += self.rng.randint(1, 2_000_000)
        ready = [key for key, queue in self.links.items() if queue]
        draw = self.rng.random()
        if ready and draw < 0.6:
            self.deliver(self.rng.choice(ready))
        elif draw < 0.97:
            self.turn(self.rng.choice(self.members))
        else:
            self.tell(self.rng.choice(self.members))
        for caller in self.callers:
            if not caller.left and self.rng.random() < 0.3:
                caller.read()

    def settle(self, limit: int = 20_000) -> None:
        """Let everything run until no request is open and nothing moves."""
        for round_ in range(limit):
            if round_ % 10 == 0:
                for process in self.members:
                    self.tell(process)
            for key in list(self.links):
                while self.links[key]:
                    before = len(self.links[key])
                    self.deliver(key)
                    if len(self.links[key]) == before:
                        break                                        # not accepting now
            for process in self.members:
                self.turn(process)
            for caller in self.callers:
                if not caller.left:
                    caller.read()
            self.now += 50_000_000
            self.check()
            if all(c.over for c in self.callers) and not any(self.links.values()) and self.empty():
                return
        raise AssertionError(f"not settled: {[c.name for c in self.callers if not c.over]}, {self.sizes()}")

    # ---- callers ---------------------------------------------------------------------------------------------

    def open(self, name: str, frontend: int, prompt: list[int], *, n: int = 1, max_tokens: int, seed: int = 0,
             stop: list[str] | None = None, min_tokens: int = 0, logprobs: int | None = None) -> Caller | None:
        """Submit a request; None when it was refused."""
        table, _ = self.stages[Kind.FRONTEND, frontend]
        caller: list[Caller] = []

        def wake() -> None:
            if caller:
                caller[0].woken += 1
        spec = Spec(model=0, prompts=[Prompt(ids=pack_ids(array("I", prompt)))], n=n, stream=True,
                    sampling=SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens,
                                            logprobs=logprobs),
                    detok=DetokSpec(stop=stop or [], min_tokens=min_tokens))
        try:
            request = table.open(spec, wake)
        except QuartetError:
            return None
        caller.append(Caller(name, request, table))
        self.callers.append(caller[0])
        return caller[0]

    def leave(self, caller: Caller) -> None:
        """The caller is gone."""
        caller.left = True
        caller.table.close(caller.request)

    def finish(self) -> None:
        """Every caller has what it gets: close the requests, and everything must be empty."""
        for caller in self.callers:
            caller.table.close(caller.request)
        self.settle()

    # ---- oracle ----------------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for (kind, index), stage in self.stages.items():
            size = len(stage[0]._requests) if kind is Kind.FRONTEND else (
                len(stage.sequences) if kind is Kind.ENGINE else stage.load().waiting if kind is Kind.TOKENIZER
                else len(stage._choices))
            sizes[f"{kind.name}.{index}"] = size
        return sizes

    def empty(self) -> bool:
        return not any(size for name, size in self.sizes().items() if not name.startswith("FRONTEND"))

    def check(self) -> None:
        for (kind, _), stage in self.stages.items():
            (stage[0] if kind is Kind.FRONTEND else stage).assert_invariants()
