"""Random interleavings of submit, abort, stop, finish and death over the real stages.

Oracle: one terminal event each; text, ids and finish as computed alone and undisturbed; offsets contiguous (the table
checks); all tables empty and all blocks free in the end.
"""
from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from detok_proc.worker import Vocabs
from pipeline.config import EngineConfig, ModelConfig, ServerConfig
from pipeline.messages import Finish, Kind
from tests.simulation.world import Caller, World

WORLDS = int(os.environ.get("INTERLEAVINGS", "4000"))      # each with 2 to 6 requests out of one pool
POOL = 150
VOCAB = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    """A byte-level tokenizer of 256 bytes and a few specials, a pool so small that it must pre-empt."""
    directory: Path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: n for n, char in enumerate(alphabet)} | {f"w{n}": n for n in range(256, VOCAB - 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "config.json").write_text("{}")
    engine = EngineConfig(backend="null", null_script="hash", block_size=4, num_kv_blocks=40, max_num_seqs=6,
                          max_step_tokens=24, max_prefill_chunk=10, max_waiting=64)
    model = ModelConfig(names=("m",), path=str(directory), max_model_len=120, vocab_size=VOCAB, eos_ids=(VOCAB - 1,),
                        engine=engine)
    return ServerConfig(run_dir=str(directory), log_dir=str(directory), models=(model,), frontends=2, tokenizers=2,
                        detokenizers=2)


@pytest.fixture(scope="module")
def vocabs(config: ServerConfig) -> Vocabs:
    made = Vocabs(config)
    made.get(0)
    return made


def requests(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Requests of all kinds; half of the prompts begin alike."""
    shared, made = [rng.randrange(VOCAB - 1) for _ in range(12)], []
    for number in range(count):
        prompt = (shared if rng.random() < 0.5 else []) + [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 30))]
        made.append({"name": f"r{number}", "prompt": prompt, "n": rng.choice((1, 1, 1, 3)), "seed": number,
                     "max_tokens": rng.randint(1, 30), "logprobs": rng.choice((None, 1)),
                     "stop": [chr(rng.randrange(97, 123))] if rng.random() < 0.5 else None,
                     "min_tokens": rng.choice((0, 0, 1))})
    return made


@dataclass(frozen=True)
class Pool:
    """Requests and what each of them gives when nobody else is there and nothing happens."""

    requests: list[dict[str, Any]]
    answers: dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def pool(config: ServerConfig, vocabs: Vocabs) -> Pool:
    wanted, answers = requests(random.Random(4), POOL), {}
    world = World(replace(config, frontends=1, tokenizers=1, detokenizers=1), vocabs, random.Random(0))
    for request in wanted:
        caller = world.open(frontend=0, **request)
        assert caller is not None
        world.settle()
        world.finish()
        world.callers.clear()
        answers[request["name"]] = caller.answer()
    return Pool(wanted, answers)


def assert_one_terminal_event(caller: Caller, expected: tuple[Any, ...]) -> None:
    assert caller.request.done and not caller.errors, (caller.name, caller.errors)
    assert all(len(events) == 1 for events in caller.finishes.values())
    assert caller.answer() == expected, caller.name


def play(config: ServerConfig, vocabs: Vocabs, pool: Pool, seed: int, *, death: float, max_queue: int = 1000) -> World:
    """One world: requests arrive, some callers leave, processes die; then it settles."""
    rng = random.Random(seed)
    world = World(config, vocabs, rng, max_queue=max_queue)
    todo, deaths = rng.sample(pool.requests, rng.randint(2, 6)), 0
    for _ in range(rng.randint(50, 300)):
        draw = rng.random()
        if todo and draw < 0.08:
            world.open(frontend=rng.randrange(2), **todo.pop())
        elif world.callers and draw < 0.083:
            world.leave(rng.choice(world.callers))
        elif draw > 1 - death and deaths < 4:
            deaths += 1
            mortal = [m for m in world.members if m[0] is not Kind.ENGINE or world.deaths[Kind.ENGINE] < 2]
            world.kill(rng.choice(mortal))
        else:
            world.step()
        if rng.random() < 0.05:
            world.check()
    world.settle()
    for caller in world.callers:
        if not caller.left:
            assert_one_terminal_event(caller, pool.answers[caller.name])
    world.finish()
    engine = world.stages[Kind.ENGINE, 0]
    assert engine.load().kv_used == 0 and world.empty()
    for frontend in range(config.frontends):
        assert len(world.stages[Kind.FRONTEND, frontend][0]) == 0
    return world


def worlds(first: int, part: int) -> range:
    return range(first + part, first + WORLDS // 3, 4)


@pytest.mark.parametrize("part", range(4))
def test_interleavings_without_deaths(config: ServerConfig, vocabs: Vocabs, pool: Pool, part: int) -> None:
    for seed in worlds(0, part):
        world = play(config, vocabs, pool, seed, death=0.0)
        assert not any(k.startswith("again") for o in world.observers for k in o.counts), "re-submitted in peace"


@pytest.mark.parametrize("part", range(4))
def test_interleavings_with_deaths(config: ServerConfig, vocabs: Vocabs, pool: Pool, part: int) -> None:
    again = 0
    for seed in worlds(1_000_000, part):
        world = play(config, vocabs, pool, seed, death=0.02)
        again += sum(v for o in world.observers for k, v in o.counts.items() if k.startswith("again"))
    assert again > 0


@pytest.mark.parametrize("part", range(4))
def test_interleavings_with_short_queues(config: ServerConfig, vocabs: Vocabs, pool: Pool, part: int) -> None:
    for seed in worlds(2_000_000, part):
        play(config, vocabs, pool, seed, death=0.01, max_queue=3)


def test_the_pool_has_finishes_of_every_kind(pool: Pool) -> None:
    kinds = {finish for _, _, finishes in pool.answers.values() for events in finishes.values() for finish, _ in events}
    assert {Finish.LENGTH, Finish.STOP_STRING} <= kinds
