"""Shared by the engine's tests: a runner that checks the KV cache, makers of requests, and the oracle.

`KvRunner` models the memory behind the blocks: it writes every computed token where the block table says and, before
it samples, reads the whole sequence back. A block shared too early, freed too early, copied wrongly or given to two
owners makes it fail at once.
"""
from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from typing import Any

from engine_proc.null import NullRunner, Script
from engine_proc.plan import ItemResult, StepPlan
from engine_proc.request import Sequence
from pipeline.config import EngineConfig
from pipeline.messages import Add, Finish, Route, pack_ids, unpack_ids
from pipeline.params import DetokSpec, SamplingParams

VOCAB = 97
EOS = 2
ROUTE = Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=1, detok=0, detok_epoch=1)


def engine_config(**values: Any) -> EngineConfig:
    """Small numbers, so that chunks, full pools and queues are ordinary."""
    defaults: dict[str, Any] = {
        "backend": "null", "block_size": 4, "num_kv_blocks": 33, "max_num_seqs": 4, "max_step_tokens": 16,
        "max_prefill_chunk": 8}
    return EngineConfig(**{**defaults, **values})


def make_add(rid: int, prompt: Iterable[int], *, n: int = 1, history: Iterable[int] = (), choice: int = 0,
             route: Route = ROUTE, deadline_ns: int = 0, priority: int = 0, salt: bytes = b"", alone: bool = False,
             detok: DetokSpec | None = None, **sampling: Any) -> Add:
    if "stop_ids" in sampling:
        sampling["stop_ids"] = pack_ids(sampling["stop_ids"])
    return Add(rid=rid, route=route, n=n, choice=choice, ids=pack_ids(prompt), history=pack_ids(history),
               sampling=SamplingParams(**sampling), detok=detok or DetokSpec(), deadline_ns=deadline_ns,
               priority=priority, salt=salt, alone=alone)


def make_seq(rid: int, prompt: Iterable[int], *, j: int = 0, max_model_len: int = 1 << 20, **values: Any) -> Sequence:
    """A sequence as admission would make it, for tests of the scheduler alone; `arrival` is the rid."""
    seq = Sequence.of(make_add(rid, prompt, **values), j, rid + j, max_model_len)
    seq.stops = frozenset(unpack_ids(seq.sampling.stop_ids))
    if not seq.sampling.ignore_eos:
        seq.stops, seq.eos_id = seq.stops | {EOS}, EOS
    return seq


def alone(seq: Sequence, script: Script | None = None) -> tuple[list[int], Finish]:
    """The oracle: output ids (history included) and finish of `seq`, computed one id at a time with nothing around."""
    script = script or Script()
    twin = Sequence(
        rid=seq.rid, route=seq.route, choice=seq.choice, tokens=seq.tokens[:seq.num_prompt + seq.num_history],
        num_prompt=seq.num_prompt, sampling=seq.sampling, detok=seq.detok, max_total=seq.max_total, stops=seq.stops,
        eos_id=seq.eos_id)
    finish = twin.verdict() if seq.num_history else Finish.LENGTH if not seq.sampling.max_tokens else Finish.RUNNING
    while not finish:
        twin.tokens.append(script.next_id(twin, twin.tokens, VOCAB))
        finish = twin.verdict()
    return list(twin.tokens[twin.num_prompt:]), finish


class KvRunner(NullRunner):
    """A null runner with a KV cache whose contents are the token ids themselves."""

    def __init__(self, config: EngineConfig, depth: int = 0) -> None:
        super().__init__(config, VOCAB, depth)
        self.max_num_seqs = config.max_num_seqs
        self.max_step_tokens = config.max_step_tokens
        self.kv = [array("q", [-1] * self.block_size) for _ in range(self.num_blocks)]
        self.slots: dict[int, Sequence] = {}
        self.errors: dict[int, str] = {}              # rid -> error code of its next sampled item
        self.refuse: dict[int, Exception] = {}        # rid -> what `admit` raises
        self.launch_errors: list[Exception | None] = []     # for the next launches, in turn
        self.collect_errors: list[Exception | None] = []
        self.plans: list[StepPlan] = []
        self.in_flight: deque[StepPlan] = deque()

    def admit(self, seq: Sequence) -> None:
        if seq.rid in self.refuse:
            raise self.refuse[seq.rid]
        assert seq.rid not in self.slots, "admitted twice"
        self.slots[seq.rid] = seq
        assert len(self.slots) <= self.max_num_seqs, "no slot left"
        super().admit(seq)

    def release(self, seq: Sequence) -> None:
        self.slots.pop(seq.rid, None)
        super().release(seq)

    def launch(self, plan: StepPlan) -> object:
        error = self.launch_errors.pop(0) if self.launch_errors else None
        if error is not None:
            raise error
        self.plans.append(plan)
        self.in_flight.append(plan)
        assert len(self.in_flight) <= self.depth + 1
        together = {item.seq for step in self.in_flight for item in step.items}
        assert len(together) == 1 or not any(item.seq.alone for item in plan.items), "alone means alone"
        assert 0 < plan.num_tokens <= self.max_step_tokens
        counts = [item.count for item in plan.items]
        assert counts == [c for c in counts if c == 1] + [c for c in counts if c > 1], "single tokens come first"
        for source, target in plan.copies:
            self.kv[target] = self.kv[source][:]
        for item in plan.items:
            assert self.slots[item.seq.rid] is item.seq
            self._write(item.seq, item.start, self.ids(item.seq, item.start + item.count))
        for item in plan.items:
            self._read(item.seq, self.ids(item.seq, item.start + item.count))
        return super().launch(plan)

    def collect(self, handle: object) -> list[ItemResult]:
        self.in_flight.popleft()
        error = self.collect_errors.pop(0) if self.collect_errors else None
        if error is not None:
            raise error
        return super().collect(handle)

    def _item(self, seq: Sequence, start: int, count: int, sample: bool, score: bool) -> ItemResult:
        if sample and seq.rid in self.errors:
            return ItemResult(error=self.errors.pop(seq.rid))
        return super()._item(seq, start, count, sample, score)

    def _write(self, seq: Sequence, start: int, ids: Ids[int]) -> None:
        for position in range(start, len(ids)):
            block = seq.block_table[position // self.block_size]
            assert block != 0, "the null block holds nothing"
            self.kv[block][position % self.block_size] = ids[position]

    def _read(self, seq: Sequence, ids: Ids[int]) -> None:
        size = self.block_size
        seen = [self.kv[seq.block_table[p // size]][p % size] for p in range(len(ids))]
        assert seen == list(ids), f"sequence {seq.rid} reads another's KV"
