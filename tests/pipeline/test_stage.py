"""A real stage process: beacons, messages, signals, hangs and the death of its parent, without any model."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from prometheus_client import CollectorRegistry

from pipeline import beacon, codec, config, sockets
from pipeline.beacon import BeaconPublisher, BeaconWatcher
from pipeline.config import ModelConfig, ServerConfig, TimeoutsConfig
from pipeline.endpoints import endpoint
from pipeline.messages import Abort, Census, Deltas, Kind, State
from pipeline.transport import Address, Status
from tests.waiting import until

ROOT = Path(__file__).parents[2]

# A tokenizer stage that answers every Abort with a Census, and knows three bad habits.
PROGRAM = """
import os, sys, time
from pipeline.messages import Abort, Census, Kind, Load
from pipeline.schema import BadFrame
from pipeline.stage import run
from pipeline.transport import Address, Status

class Echo:
    def __init__(self, context):
        self.context, self.restarts, self.hang = context, [], False
    def handle(self, message):
        if not isinstance(message, Abort):
            raise BadFrame("not for me")
        if message.reason == 9:
            raise RuntimeError("boom")
        self.hang = message.reason == 8
        self.context.sender.send(Address(Kind.FRONTEND, 0), Census(0, len(self.restarts), message.rids))
    def turn(self):
        while self.hang:
            time.sleep(0.01)
    def has_work(self): return self.hang
    def accepting(self): return True
    def next_timer_ns(self): return None
    def peer_restarted(self, kind, index, epoch): self.restarts.append((kind, index, epoch))
    def load(self): return Load(waiting=3)

def build(context):
    context.progress("loading", 40)
    if os.environ.get("SLOW_LOAD"):
        time.sleep(60)
    return Echo(context)
sys.exit(run(Kind.TOKENIZER, build))
"""


@pytest.fixture
def ctx() -> Iterator[zmq.Context]:
    context = sockets.context()
    yield context
    context.destroy(linger=0)


class Harness:
    def __init__(self, ctx: zmq.Context, tmp: Path, launcher_pid: int = 0) -> None:
        self.config = ServerConfig(run_dir=str(tmp), log_dir=str(tmp / "logs"), launcher_pid=launcher_pid,
                                   models=(ModelConfig(names=("m",), path="/"),),
                                   timeouts=replace(TimeoutsConfig(), beacon_s=0.02))
        config.save(self.config, tmp / "config.json")
        self.inbox = sockets.pull(ctx, endpoint(self.config, Address(Kind.FRONTEND, 0)))
        self.out = sockets.push(ctx, endpoint(self.config, Address(Kind.TOKENIZER, 0)))
        self.watcher = BeaconWatcher(ctx, self.config, [(Kind.TOKENIZER, 0)], metrics=True)
        self.path, self.processes = tmp / "config.json", []

    def start(self, epoch: int = 1, **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--config", str(self.path), "--index", "0", "--epoch", str(epoch)], cwd=ROOT,
            env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def beacon(self):
        self.watcher.drain()
        heard = self.watcher.latest.get((Kind.TOKENIZER, 0))
        return heard.beacon if heard else None

    def wait_ready(self, epoch: int = 1) -> None:
        until(lambda: (b := self.beacon()) and b.epoch == epoch and b.state == State.READY)

    def answer(self):
        assert self.inbox.poll(5000)
        return codec.decode(self.inbox.recv_multipart())


@pytest.fixture
def harness(ctx: zmq.Context, tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(ctx, tmp_path)
    yield harness
    for process in harness.processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stderr.close()


def test_a_stage_tells_its_life_and_answers(harness: Harness) -> None:
    process = harness.start()
    harness.wait_ready()
    assert harness.beacon().pid == process.pid
    until(lambda: harness.beacon().load.waiting == 3)
    harness.out.send_multipart(codec.encode(Abort(b"12345678", 1)))
    assert harness.answer() == Census(0, 0, b"12345678")
    first = harness.beacon().tick
    harness.out.send_multipart(codec.encode(Abort(b"", 1)))
    harness.answer()
    until(lambda: harness.beacon().tick > first)


def test_bad_frames_and_messages_for_others_are_counted(harness: Harness) -> None:
    harness.start()
    harness.wait_ready()
    for frames in ([b"\x80\x04garbage"], [b""], codec.encode(Deltas(0, 1, []))):
        harness.out.send_multipart(frames)
    harness.out.send_multipart(codec.encode(Abort(b"", 1)))
    harness.answer()

    def counted() -> bool:
        harness.watcher.drain()
        families = harness.watcher.metrics.get((Kind.TOKENIZER, 0), [])
        return any(s.value == 3.0 and s.labels == ["socket", "in"] for f in families for s in f.samples)
    until(counted)


def test_sigterm_ends_a_stage_cleanly(harness: Harness, tmp_path: Path) -> None:
    process = harness.start()
    harness.wait_ready()
    process.send_signal(signal.SIGINT)                    # Ctrl-C reaches the launcher's group only; it is ignored here
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert not list(tmp_path.glob("tokenizer.*"))


def test_sigterm_while_loading_ends_it_at_once(harness: Harness) -> None:
    process = harness.start(SLOW_LOAD="1")
    until(lambda: (b := harness.beacon()) and b.phase == "loading")
    process.send_signal(signal.SIGTERM)
    assert process.wait(2) == 0


def test_a_hang_shows_in_the_age_of_the_tick_while_beacons_go_on(harness: Harness) -> None:
    process = harness.start()
    harness.wait_ready()
    harness.out.send_multipart(codec.encode(Abort(b"", 8)))
    until(lambda: harness.beacon().pending and harness.beacon().tick_age_ms > 300)
    process.send_signal(signal.SIGABRT)
    process.wait(5)
    assert b"in turn" in process.stderr.read()            # faulthandler names the frame that hung


def test_who_listens_slowly_hears_of_changes_and_of_little_else(
        ctx: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacon, "SLOW_PERIOD_S", 1e6)
    made = ServerConfig(run_dir=str(tmp_path), log_dir=str(tmp_path), models=(ModelConfig(names=("m",), path="/"),),
                        timeouts=replace(TimeoutsConfig(), beacon_s=0.005, hang_s=1e9))
    key, status = (Kind.ENGINE, 0), Status(state=State.READY)
    fast, slow = BeaconWatcher(ctx, made, [key]), BeaconWatcher(ctx, made, [key], slow=True)
    publisher = BeaconPublisher(ctx, made, *key, 1, status, CollectorRegistry())

    def heard(watcher: BeaconWatcher, phase: str) -> bool:
        watcher.drain()
        return key in watcher.latest and watcher.latest[key].beacon.phase == phase
    try:
        publisher.start()
        until(lambda: heard(fast, "starting"))
        status.phase = "said by the way"
        until(lambda: heard(fast, "said by the way"))
        assert not heard(slow, "said by the way")
        publisher.announce()
        until(lambda: heard(slow, "said by the way"))
    finally:
        publisher.stop()
        fast.close()
        slow.close()


def test_a_successor_has_a_new_epoch_and_gets_the_traffic(harness: Harness) -> None:
    process = harness.start()
    harness.wait_ready()
    harness.out.send_multipart(codec.encode(Abort(b"", 9)))   # an unexpected error is the end of the process
    assert process.wait(5) != 0
    harness.start(epoch=2)
    harness.wait_ready(epoch=2)
    harness.out.send_multipart(codec.encode(Abort(b"abcdefgh", 1)))
    assert harness.answer().rids == b"abcdefgh"


def test_a_stage_whose_launcher_is_gone_does_not_start(ctx: zmq.Context, tmp_path: Path) -> None:
    harness = Harness(ctx, tmp_path, launcher_pid=2**22 - 1)
    process = harness.start()
    assert process.wait(10) != 0
    assert b"launcher is gone" in process.stderr.read()
    process.stderr.close()
