"""One step in flight while the next is planned and launched: answers are those of one step at a time.

The device is `late.Late`, the engine's loop is the real one.
"""
from __future__ import annotations

from typing import Any

import pytest

from engine_proc.runner import ModelRunner
from pipeline.config import EngineConfig
from pipeline.messages import Abort, AbortReason, Finish, pack_rids
from tests.engine_proc.late import Late
from tests.engine_proc.tiny import LONGEST, load, make_checkpoint, prompts
from tests.engine_proc.whole import Engine, Told, packed

KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 0.9, "seed": 1}, {"temperature": 1.2, "seed": 2, "top_p": 0.8, "logprobs": 3},
    {"presence_penalty": 0.7, "repetition_penalty": 1.3}, {"n": 3, "temperature": 1.0, "seed": 3}, {"prompt_logprobs": 2},
    {"bad_ids": [packed(5, 6), packed(7)], "temperature": 1.0, "seed": 4},
    {"min_tokens": 6, "stop_ids": packed(*range(3, 160))},
    {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.4, "logprobs": 0}]
LENGTHS = (1, 40, 17, 3, 55, 33, 16, 90, 5, 64, 2, 31)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return load(make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", seed=3, num_hidden_layers=2))


def late(runner: ModelRunner, seed: int = 0, num_blocks: int = 0) -> ModelRunner:
    """The same model on a device that is late; its cache is shared, so the two take turns."""
    return ModelRunner(runner.model, runner.cache, Late(seed), EngineConfig(block_size=16, max_num_seqs=4),
                       num_blocks or runner.num_blocks, LONGEST, runner.facts)


def requests(engine: Engine, count: int = 18, tokens: int = 14) -> list[int]:
    given = prompts([LENGTHS[i % len(LENGTHS)] for i in range(count)], seed=8)
    return [engine.add(prompt, max_tokens=tokens, **KINDS[i % len(KINDS)]).rid for i, prompt in enumerate(given)]


def answers(engine: Engine) -> list[tuple[Any, ...]]:
    """What came of all choices, in order; log-probabilities to what rounding leaves of them in other batches."""
    def told(one: Told) -> tuple[Any, ...]:
        return one.ids, one.finish, one.stop_id, one.error, [(part.k, part.ranks, part.top_ids) for part in one.parts]
    return [told(engine.told[rid]) for rid in sorted(engine.told)]


@pytest.mark.parametrize("seed", range(3))
def test_mixed_requests(runner: ModelRunner, seed: int) -> None:
    """More of them than run at once, with chunked prompts, siblings, penalties, stops, log-probabilities."""
    settings = {"max_num_seqs": 6, "max_step_tokens": 24, "max_prefill_chunk": 16}
    plain, ahead = Engine(runner, **settings), Engine(late(runner, seed), **settings)
    requests(plain)
    plain.run()
    requests(ahead)
    ahead.run()
    assert answers(ahead) == answers(plain)
    assert ahead.runner.device.most_waiting == 2                          # type: ignore[attr-defined]


def test_with_too_little_memory(runner: ModelRunner) -> None:
    """Blocks are taken from running sequences only when no step in flight holds them."""
    settings = {"max_num_seqs": 8, "enable_prefix_caching": False}
    plain, ahead = Engine(runner, **settings), Engine(late(runner, num_blocks=24), **settings)
    for engine in (plain, ahead):
        requests(engine, 9, 60)
        engine.run()
    assert answers(ahead) == answers(plain)
    assert ahead.core.scheduler.num_preemptions > 0


def test_a_freed_block_is_not_written_by_the_step_that_still_holds_it(runner: ModelRunner) -> None:
    """Aborts in mid-flight, and new requests that get the blocks at once."""
    ahead, plain = Engine(late(runner, 5), max_num_seqs=3), Engine(runner)
    given = prompts(LENGTHS, seed=9)
    doomed = [ahead.add(prompt, max_tokens=40).rid for prompt in given[:6]]
    for _ in range(7):
        ahead.core.turn()
        ahead.core.assert_invariants()
    ahead.core.handle(Abort(pack_rids(doomed), AbortReason.CLIENT_GONE))
    kept = [ahead.add(prompt, max_tokens=20).rid for prompt in given[6:]]
    ahead.run()
    assert [ahead.told[rid].ids for rid in kept] == [plain.output(prompt, max_tokens=20) for prompt in given[6:]]
    assert {ahead.told[rid].finish for rid in doomed} <= {Finish.ABORT, Finish.RUNNING}
