"""The launcher's life with stub stages: deaths, hangs, drains, failures, and nothing left behind."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import sockets
from pipeline.beacon import BeaconWatcher
from pipeline.config import load
from pipeline.messages import Kind, State
from tests.serving import ROOT, processes_of
from tests.waiting import until

NAMES = ("frontend.0", "tokenizer.0", "engine.0", "detokenizer.0")


class Run:
    """A launcher with stub stages in a subprocess."""

    def __init__(self, root: Path, script: dict[str, dict[str, object]], **options: object) -> None:
        self.root, self.order = root, root / "order"
        self.order.touch()
        self._output = root / "terminal"
        with open(self._output, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.pipeline.stub_launcher", str(root), json.dumps(options)], cwd=ROOT,
                env={**os.environ, "STUB": json.dumps(script), "STUB_ORDER": str(self.order)},
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self._output.read_text()

    @property
    def run_dir(self) -> Path:
        return until(lambda: next(iter(self.root.glob("quartet-*/config.json")), None), 10, "the run directory").parent

    def ready(self) -> Run:
        until(lambda: "Ready in" in self.text or self.process.poll() is not None, 40, "ready")
        assert self.process.poll() is None, self.text
        return self

    def stages(self) -> dict[str, tuple[int, int]]:
        """name -> (pid, epoch) of the stages that run."""
        found = {}
        for pid in processes_of(str(self.run_dir)):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "--index" in words:
                index, epoch = (words[words.index(option) + 1] for option in ("--index", "--epoch"))
                found[f"{words[3].lower()}.{index}"] = (pid, int(epoch))
        return found

    def ended(self, seconds: float = 30) -> int:
        """The exit code; nothing of the run may be left."""
        code = self.process.wait(seconds)
        assert not list(self.root.glob("quartet-*")), "the run directory is gone"
        assert not processes_of(str(self.root)), "no process is left"
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def notes(self) -> list[str]:
        return self.order.read_text().split("\n")[:-1]


def _stand_still(seconds: float) -> None:
    """Let time itself pass: it is what this test is about, not a way to wait for something."""
    with contextlib.suppress(AssertionError):
        until(lambda: False, seconds)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    runs: list[Run] = []

    def begin(script: dict[str, dict[str, object]] | None = None, **options: object) -> Run:
        runs.append(Run(tmp_path, script or {}, **options))
        return runs[-1]
    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def test_it_starts_every_stage_says_so_and_stops_them_in_order(start) -> None:
    run = start(frontends=2).ready()
    assert {name: epoch for name, (_, epoch) in run.stages().items()} == {**dict.fromkeys(NAMES, 1), "frontend.1": 1}
    assert run.stop() == 0
    order = [note.split(".")[0] for note in run.notes()]
    assert order == ["frontend", "frontend", "tokenizer", "engine", "detokenizer"]
    assert len(run.text.splitlines()) <= 20
    assert "serves stub (float32, cpu)" in run.text


def test_it_is_ready_when_its_frontends_know_that_the_others_are(start) -> None:
    run = start({"frontend.0": {"mode": "unaware"}})
    context = sockets.context()
    config = load(run.run_dir / "config.json")
    watcher = BeaconWatcher(context, config, [*config.members(), (Kind.LAUNCHER, 0)])
    latest = watcher.latest

    def turned() -> bool:
        """Every stage is ready, and has been for a while: the frontend's loop has turned twenty times."""
        watcher.drain()
        return all(m in latest and latest[m].beacon.state == State.READY for m in config.members()) and (
            latest[Kind.FRONTEND, 0].beacon.tick >= 20 and (Kind.LAUNCHER, 0) in latest)

    until(turned, 20, "every stage ready")
    assert latest[Kind.LAUNCHER, 0].beacon.state == State.STARTING and "Ready in" not in run.text
    watcher.close()
    context.destroy(linger=0)
    os.kill(run.stages()["frontend.0"][0], signal.SIGHUP)
    assert run.ready().stop() == 0


def test_a_stage_that_dies_is_started_again_with_the_next_epoch(start) -> None:
    run = start().ready()
    before = run.stages()
    for name in NAMES:
        os.kill(before[name][0], signal.SIGKILL)
    for name in NAMES:
        until(lambda name=name: f"{name} is ready again" in run.text, 20, f"{name} ready again")
        assert f"{name} ended (signal SIGKILL) and is started again." in run.text
    assert {name: epoch for name, (_, epoch) in run.stages().items()} == dict.fromkeys(NAMES, 2)
    assert run.stop() == 0


def test_connections_wait_while_the_frontend_restarts_and_the_others_go_on(start) -> None:
    run = start().ready()
    port = int(run.text.rsplit(":", 1)[1])
    before = run.stages()
    os.kill(before["frontend.0"][0], signal.SIGKILL)
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        until(lambda: "frontend.0 is ready again" in run.text, 20)
    after = run.stages()
    assert {name: after[name] for name in NAMES[1:]} == {name: before[name] for name in NAMES[1:]}
    assert run.stop() == 0


def test_five_deaths_of_a_stage_within_a_minute_end_the_server_with_code_5(start) -> None:
    run = start({"detokenizer.0": {"exit": 9, "say": "the reason"}})
    assert run.ended() == 5
    last = run.text.splitlines()[-1]
    assert last == ("quartet: detokenizer.0 died 5 times within 60 seconds (exit code 9); it said: the reason")


@pytest.mark.parametrize("code", [2, 4])
def test_a_stage_that_cannot_start_ends_the_server_with_its_code_and_sentence(start, code: int) -> None:
    run = start({"engine.0": {"exit": code, "say": "The weights are of chocolate."}})
    assert run.ended() == code
    assert run.text.splitlines()[-1] == "quartet: The weights are of chocolate."


def test_the_death_of_the_launcher_takes_every_stage_along(start) -> None:
    run = start().ready()
    run_dir = str(run.run_dir)
    assert len(processes_of(run_dir)) == 4
    run.process.kill()
    run.process.wait()
    until(lambda: not processes_of(run_dir), 5, "all stages gone")


def test_a_loop_with_work_that_does_not_turn_is_aborted_with_its_stacks_and_replaced(start) -> None:
    run = start({"engine.0": {"mode": "hang", "epochs": 1}}, timeouts={"hang_s": 1.0}).ready()
    until(lambda: "engine.0 is ready again" in run.text, 20, "replaced")
    assert run.stages()["engine.0"][1] == 2
    assert "engine.0 has work and its loop has not turned: it is replaced." in run.text
    assert "signal SIGABRT" in run.text
    assert "Fatal Python error: Aborted" in (run.root / "engine.0.out").read_text()
    assert run.stop() == 0


def test_a_stage_that_stands_still_is_killed_and_replaced(start) -> None:
    run = start(timeouts={"hang_s": 1.0}).ready()
    os.kill(run.stages()["tokenizer.0"][0], signal.SIGSTOP)
    until(lambda: "tokenizer.0 is ready again" in run.text, 20, "replaced")
    assert "tokenizer.0 has given no sign of life: it is replaced." in run.text
    assert run.stop() == 0


def test_a_launcher_that_was_stopped_itself_takes_nobody_for_silent(start) -> None:
    run = start(timeouts={"hang_s": 2.0}).ready()
    before = run.stages()
    everybody = [pid for pid, _ in before.values()]
    for pid in (run.process.pid, *everybody):
        os.kill(pid, signal.SIGSTOP)
    _stand_still(3.5)
    for pid in (*everybody, run.process.pid):
        os.kill(pid, signal.SIGCONT)
    _stand_still(1.5)
    assert run.stages() == before
    assert run.stop() == 0


def test_sigterm_while_loading_ends_at_once(start) -> None:
    run = start({"engine.0": {"mode": "load"}})
    until(lambda: "engine.0: loading weights" in run.text, 20, "loading")
    run.process.send_signal(signal.SIGTERM)
    assert run.ended(10) == 0


def test_a_second_signal_means_now(start) -> None:
    run = start({"frontend.0": {"mode": "deaf"}}, timeouts={"shutdown_s": 60.0}).ready()
    run.process.send_signal(signal.SIGINT)
    until(lambda: "frontend.0 stop" in run.notes(), 10, "the frontend was told")
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.ended(10) == 0
    assert run.notes() == ["frontend.0 stop"]


def test_a_frontend_that_overstays_the_shutdown_timeout_is_killed(start) -> None:
    run = start({"frontend.0": {"mode": "deaf"}}, timeouts={"shutdown_s": 0.0}).ready()
    run.process.send_signal(signal.SIGTERM)
    assert run.ended(10) == 0
    assert [note.split(".")[0] for note in run.notes()] == ["frontend", "tokenizer", "engine", "detokenizer"]


def test_sighup_reaches_the_frontends_and_stops_nothing(start) -> None:
    run = start(frontends=2).ready()
    before = run.stages()
    run.process.send_signal(signal.SIGHUP)
    until(lambda: sorted(run.notes()) == ["frontend.0 hangup", "frontend.1 hangup"], 10, "both frontends told")
    assert run.stages() == before
    assert load(run.run_dir / "config.json").log_level == "DEBUG", "what the frontends read again"
    assert run.stop() == 0


def test_with_two_models_only_the_one_in_a_crash_loop_is_given_up(start) -> None:
    run = start({"engine.1": {"exit": 9}}, models=["good", "bad"]).ready()
    until(lambda: "its model is given up" in run.text, 30)
    assert set(run.stages()) == set(NAMES)
    context = sockets.context()
    watcher = BeaconWatcher(context, load(run.run_dir / "config.json"), [(Kind.LAUNCHER, 0)])
    until(watcher.drain, 5, "the launcher's beacon")
    told = watcher.latest[Kind.LAUNCHER, 0].beacon.facts_json
    watcher.close()
    context.destroy(linger=0)
    assert json.loads(told) == {"failed_models": [1]}
    assert run.stop() == 0
