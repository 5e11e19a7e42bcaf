"""The processes of a split model end together, whichever of them does not go on."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_proc.ranks import assert_ended, children
from tests.engine_proc.tiny import make_checkpoint

PROGRAM = """
import signal, sys
from pathlib import Path
from datetime import timedelta
from tests.engine_proc.tiny import Driver, load, sequence
runner = load(Path(sys.argv[1]), tensor_parallel=2)
print("ready", flush=True)
for line in sys.stdin:
    if line == "impatient\\n":
        runner.model._net.ops._team.group._set_default_timeout(timedelta(seconds=1))
    print(Driver(runner).run(sequence(1, [5, 6, 7], 8)), flush=True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", num_hidden_layers=1)


@pytest.fixture
def engine(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(directory)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_rank_that_hangs_ends_the_engine_and_dies_with_it(engine: subprocess.Popen[str]) -> None:
    """A collective waits for a limited time (here less than TIMEOUT_S); the kernel kills even a stopped rank."""
    (rank,) = children(engine.pid)
    ended = os.pidfd_open(rank)
    os.kill(rank, signal.SIGSTOP)
    _, error = engine.communicate("impatient\n", timeout=60)
    assert engine.returncode == 1 and "the engine ends" in error
    assert_ended(ended)


def test_an_engine_that_stops_takes_its_ranks_along(engine: subprocess.Popen[str]) -> None:
    (rank,) = children(engine.pid)
    ended = os.pidfd_open(rank)
    output, error = engine.communicate("go\n", timeout=60)
    assert engine.returncode == 0 and output.startswith("[[") and not error
    assert_ended(ended)
