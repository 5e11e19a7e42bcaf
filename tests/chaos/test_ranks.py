"""A server whose model is split over two processes: answers over HTTP, and the death of any of them."""
from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.chaos.streams import bodies, gather, undisturbed
from tests.engine_proc.ranks import assert_ended, children
from tests.engine_proc.tiny import Driver, load, sequence
from tests.parameters.whole import make_model
from tests.serving import Server
from tests.waiting import until


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("split") / "tiny")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with Server("--tensor-parallel-size", "2", "--dtype", "float32", "--num-kv-blocks", "200", "--crash-limit", "1000",
                "--served-model-name", "tiny", model=str(directory)) as server:
        yield server
        server.assert_idle(10)


def processes(server: Server) -> tuple[int, int]:
    """The engine and its one other rank."""
    (engine,) = server.pids("engine_proc")
    (rank,) = children(engine)
    return engine, rank


def requests(count: int) -> list[dict[str, Any]]:
    return [{**body, "temperature": 0.8, "seed": number} for number, body in enumerate(bodies("tiny", count, 100))]


def test_its_answer_is_that_of_one_process(server: Server, directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode("the quick brown fox").ids
    (expected,) = Driver(load(directory)).run(sequence(1, prompt, 24))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    (seen,) = asyncio.run(gather(server.url, [body]))
    assert seen.ids[0] == expected


def test_the_death_of_a_rank_in_mid_stream(server: Server) -> None:
    clean = undisturbed(asyncio.run(gather(server.url, requests(4))))
    engine, rank = processes(server)
    ended = os.pidfd_open(engine)
    hurt = asyncio.run(gather(server.url, requests(4), disturb=lambda: os.kill(rank, signal.SIGKILL)))
    assert undisturbed(hurt) == clean
    assert_ended(ended)
    until(lambda: server.get("/ready")[0] == 200, 60, "ready again")
    assert not {engine, rank} & set(processes(server))


def test_the_death_of_the_engine_takes_its_ranks_along(server: Server) -> None:
    clean = undisturbed(asyncio.run(gather(server.url, requests(2))))
    engine, rank = processes(server)
    ended = os.pidfd_open(rank)
    hurt = asyncio.run(gather(server.url, requests(2), disturb=lambda: os.kill(engine, signal.SIGKILL)))
    assert undisturbed(hurt) == clean
    assert_ended(ended)
