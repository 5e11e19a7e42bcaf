"""The null runner's script, and the engine as a process of its own around it."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from engine_proc.null import NullRunner, Script
from engine_proc.plan import PlanItem, StepPlan
from pipeline import codec, config, sockets
from pipeline.beacon import BeaconWatcher
from pipeline.config import ModelConfig, ServerConfig, TimeoutsConfig
from pipeline.endpoints import endpoint
from pipeline.errors import StartError
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    AbortReason,
    Add,
    Adds,
    Admitted,
    Census,
    Finish,
    Kind,
    Route,
    StepOut,
    pack_rids,
    unpack_ids,
)
from pipeline.transport import Address
from tests import rows
from tests.engine_proc.harness import EOS, VOCAB, engine_config, make_add, make_seq
from tests.waiting import until

ROOT = Path(__file__).parents[2]


# ---- the script --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("script", "prompt", "expected"), [
    ("echo", [7, 8, 9], [7, 8, 9, 7, 8]),
    ("say", [7, 8], [7, 8, EOS]),
    ("count", [5, 94], [95, 96, 0, 1, 3]),                        # 2 is the end of sequence: it is passed over
    ("count;eos_after=2", [5, 94], [95, 96, EOS]),
])
def test_modes(script: str, prompt: list[int], expected: list[int]) -> None:
    seq = make_seq(1, prompt, max_tokens=5)
    for token in expected:
        assert Script.parse(script).next_id(seq, seq.tokens, VOCAB) == token
        seq.tokens.append(token)


def test_hash_depends_on_the_last_ids_the_seed_and_the_choice_only() -> None:
    def text(prompt: list[int], j: int = 0, seed: int = 0) -> list[int]:
        seq = make_seq(1, prompt, j=j, seed=seed)
        for _ in range(8):
            seq.tokens.append(Script().next_id(seq, seq.tokens, VOCAB))
        return list(seq.tokens[len(prompt):])
    assert text([1, 2, 3, 4, 5]) == text([9, 2, 3, 4, 5])
    assert len({tuple(text([1, 2, 3, 4], j, seed)) for j in (0, 1) for seed in (0, 1)}) == 4
    assert EOS not in {i for seed in range(200) for i in text([1], seed=seed)}


def test_min_tokens_holds_every_end_back() -> None:
    seq = make_seq(1, [7, 8], min_tokens=2, stop_ids=[7])
    assert Script.parse("echo;eos_after=0").next_id(seq, seq.tokens, VOCAB) == 8, "7 is barred"
    seq.tokens.extend([9, 9])
    assert Script.parse("echo;eos_after=0").next_id(seq, seq.tokens, VOCAB) == EOS
    assert Script.parse("echo").next_id(seq, seq.tokens, VOCAB) == 7


@pytest.mark.parametrize("script", ["ehco", "eos_after=x", "echo=1"])
def test_an_unknown_script_does_not_start(script: str) -> None:
    with pytest.raises(StartError, match="script"):
        NullRunner(engine_config(null_script=script))


def test_a_step_takes_its_least_duration_asleep() -> None:
    runner = NullRunner(engine_config(null_step_s=0.05), VOCAB)
    seq = make_seq(1, [5])
    runner.admit(seq)
    plan = StepPlan(number=1, items=[PlanItem(seq=seq, start=0, count=1, sample=True)])
    begin, cpu = time.monotonic(), time.process_time()
    runner.collect(runner.launch(plan))
    assert time.monotonic() - begin >= 0.05 > time.process_time() - cpu


def test_logprobs_have_the_shape_of_real_ones() -> None:
    runner = NullRunner(engine_config(), VOCAB)
    seq = make_seq(1, range(5), logprobs=3, prompt_logprobs=2)
    runner.admit(seq)
    item = PlanItem(seq=seq, start=0, count=5, sample=True, prompt_logprobs=True)
    [result] = runner.collect(runner.launch(StepPlan(number=1, items=[item])))
    assert result.logprobs is not None and result.prompt_logprobs is not None and result.token is not None
    assert np.frombuffer(result.logprobs.top_ids, np.uint32).tolist() == [(result.token + i) % VOCAB for i in range(3)]
    assert len(result.prompt_logprobs.values) == 4 * 4 and len(result.prompt_logprobs.top_values) == 4 * 4 * 2
    top = np.frombuffer(result.prompt_logprobs.top_values, np.float32).reshape(4, 2)
    assert (np.diff(top) < 0).all() and (top[:, 0] == np.frombuffer(result.prompt_logprobs.values, np.float32)).all()


# ---- the process -------------------------------------------------------------------------------------------------

class Process:
    """`python -m engine_proc` with the null runner; the test is its tokenizer, detokenizer and frontend."""

    def __init__(self, run_dir: Path, **engine: object) -> None:
        settings = replace(engine_config(num_kv_blocks=100), **engine)  # type: ignore[arg-type]
        self.config = ServerConfig(
            run_dir=str(run_dir), log_dir=str(run_dir / "logs"), timeouts=TimeoutsConfig(beacon_s=0.02, census_s=0.2),
            models=(ModelConfig(names=("m",), path="/", vocab_size=VOCAB, eos_ids=(EOS,), engine=settings),))
        config.save(self.config, run_dir / "config.json")
        self.zmq = sockets.context()
        self.detok = sockets.pull(self.zmq, endpoint(self.config, Address(Kind.DETOKENIZER, 0)))
        self.frontend = sockets.pull(self.zmq, endpoint(self.config, Address(Kind.FRONTEND, 0)))
        self.data = sockets.push(self.zmq, endpoint(self.config, Address(Kind.ENGINE, 0)))
        self.control = sockets.push(self.zmq, endpoint(self.config, Address(Kind.ENGINE, 0, "ctl")))
        self.watcher = BeaconWatcher(self.zmq, self.config, [(Kind.ENGINE, 0)], metrics=True)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "engine_proc", "--config", str(run_dir / "config.json"), "--index", "0",
             "--epoch", "7"], cwd=ROOT, stderr=subprocess.PIPE)

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.watcher.close()
        self.zmq.destroy(linger=0)

    def ready(self) -> bool:
        self.watcher.drain()
        return self.watcher.ready(Kind.ENGINE, 0)

    def add(self, rid: int, **values: object) -> Add:
        route = Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=7, detok=0, detok_epoch=1)
        return make_add(rid, [5, 6], route=route, **values)  # type: ignore[arg-type]

    @staticmethod
    def receive(socket: zmq.Socket[bytes]) -> object:
        assert socket.poll(20_000), "nothing arrived"
        return codec.decode(socket.recv_multipart())

    @staticmethod
    def send(socket: zmq.Socket[bytes], message: object) -> None:
        socket.send_multipart(codec.encode(message))


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, null_script="count", null_step_s=0.002)
    yield process
    process.close()


def test_an_engine_process_serves_and_stops(process: Process) -> None:
    until(process.ready, 30)
    beacon = process.watcher.latest[Kind.ENGINE, 0].beacon
    facts = json.loads(beacon.facts_json)
    assert beacon.epoch == 7
    assert facts == {"dtype": "none", "device": "null", "architecture": "null", "max_model_len": 2048,
                     "vocab_size": VOCAB, "num_blocks": 100, "kv_blocks": 99, "block_size": 4, "kv_tokens": 396}

    rids = RidMaker(0, 1)
    first, second = rids.next(), rids.next()
    process.send(process.data, Adds([process.add(first, max_tokens=4)]))
    admitted = process.receive(process.frontend)
    while isinstance(admitted, Census):
        admitted = process.receive(process.frontend)
    assert isinstance(admitted, Admitted) and [item.rid for item in admitted.items] == [first]
    ids: list[int] = []
    while True:
        step = process.receive(process.detok)
        assert isinstance(step, StepOut) and step.engine_epoch == 7
        assert [opened.rid for opened in step.opens] == ([] if ids else [first])
        [out] = rows.tokens(step)
        ids += unpack_ids(out.ids)
        if out.finish:
            break
    assert ids == [7, 8, 9, 10] and out.finish == Finish.LENGTH

    process.send(process.data, Adds([process.add(second, max_tokens=1500, ignore_eos=True)]))
    process.receive(process.detok)
    process.send(process.control, Abort(pack_rids([second]), AbortReason.CLIENT_GONE))
    while not isinstance(step := process.receive(process.detok), StepOut) or not rows.tokens(step)[-1].finish:
        pass
    assert rows.tokens(step)[-1].finish == Finish.ABORT

    until(lambda: process.ready() and process.watcher.latest[Kind.ENGINE, 0].beacon.load.kv_total == 99)
    until(lambda: process.ready() and any(
        sample.name == "vllm:generation_tokens_total" and sample.value > 4
        for family in process.watcher.metrics.get((Kind.ENGINE, 0), []) for sample in family.samples))

    process.child.send_signal(signal.SIGTERM)
    assert process.child.wait(10) == 0
    assert not list(Path(process.config.run_dir).glob("engine*"))


def test_a_script_that_is_wrong_ends_the_start_with_its_sentence(tmp_path: Path) -> None:
    process = Process(tmp_path, null_script="nonsense")
    try:
        _, errors = process.child.communicate(timeout=30)
        assert process.child.returncode == 2
        assert errors.decode().strip() == "The null engine's script does not know 'nonsense'."
    finally:
        process.close()
