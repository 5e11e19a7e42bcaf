"""Beam search gives transformers' hypotheses, whatever room, neighbours and deaths there are."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from engine_proc.beams import Hypotheses
from engine_proc.plan import Candidates
from engine_proc.runner import ModelRunner
from pipeline.messages import Finish
from pipeline.params import Beam
from tests.engine_proc.tiny import Reference, floats, load, make_checkpoint, prompts, uints
from tests.engine_proc.whole import Engine

EOS = (7, 11)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a narrow vocabulary, so that ends and near misses are frequent."""
    return make_checkpoint(tmp_path_factory.mktemp("beams") / "llama", "llama", num_hidden_layers=2, vocab_size=24)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


@pytest.fixture(scope="module")
def runner(directory: Path) -> ModelRunner:
    return load(directory, num_kv_blocks=400, block_size=4)


def expected(reference: Reference, prompt: list[int], width: int, n: int, max_tokens: int,
             eos: tuple[int, ...] = EOS, **settings: Any) -> list[list[int]]:
    """transformers' best n of `width` beams, without what it pads them with."""
    config = GenerationConfig(num_beams=width, num_return_sequences=n, max_new_tokens=max_tokens, do_sample=False,
                              eos_token_id=list(eos) or None, pad_token_id=0, **settings)
    with torch.inference_mode():
        out = reference.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                                       generation_config=config)
    texts = []
    for row in out[:, len(prompt):].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        texts.append(row[:ends[0] + 1] if ends else row)
    return texts


def search(engine: Engine, prompt: list[int], width: int, n: int, max_tokens: int, penalty: float = 1.0,
           early: str = "false", **values: Any) -> list[list[int]]:
    told = engine.ask(prompt, n=n, max_tokens=max_tokens, beam=Beam(width, penalty, early), **values)
    assert all(one.error is None and one.finish for one in told)
    return [one.ids for one in told]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early, theirs", [("false", False), ("true", True), ("never", "never")])
def test_transformers_finds_the_same(reference: Reference, runner: ModelRunner, penalty: float, early: str,
                                     theirs: Any) -> None:
    engine = Engine(runner, EOS)
    for number, prompt in enumerate(prompts([5, 9, 16], seed=3, vocab=24)):
        width, n, length = (2, 1, 12), (4, 4, 10), (5, 3, 20)
        w, k, m = (width, n, length)[number]
        assert search(engine, prompt, w, k, m, penalty, early) == expected(
            reference, prompt, w, k, m, length_penalty=penalty, early_stopping=theirs)


def test_length_penalty_and_early_stopping_change_what_is_found(runner: ModelRunner) -> None:
    engine = Engine(runner, EOS)
    found = {(penalty, early): str([search(engine, prompt, 4, 4, 16, penalty, early)
                                    for prompt in prompts([5, 6, 7, 8], seed=4, vocab=24)])
             for penalty in (0.0, 3.0) for early in ("true", "never")}
    assert len(set(found.values())) >= 3


def test_one_beam_is_greedy(reference: Reference, runner: ModelRunner) -> None:
    (prompt,) = prompts([10], seed=5, vocab=24)
    engine = Engine(runner)
    assert search(engine, prompt, 1, 1, 12) == [reference.greedy(prompt, 12)]


def test_ends_are_told_as_they_are(runner: ModelRunner) -> None:
    """The first end id is the end of sequence, the others and the request's are stop ids; the rest is length."""
    engine = Engine(runner, EOS)
    seen = set()
    for prompt in prompts([5] * 6, seed=6, vocab=24):
        for told in engine.ask(prompt, n=4, max_tokens=8, beam=Beam(4), stop_ids=[3]):
            last = told.ids[-1]
            wanted = Finish.EOS if last == 7 else Finish.STOP_ID if last in (11, 3) else Finish.LENGTH
            assert told.finish is wanted and told.stop_id == (last if wanted is Finish.STOP_ID else None)
            assert len(told.ids) == 8 or wanted is not Finish.LENGTH
            seen.add(wanted)
    assert seen == {Finish.EOS, Finish.STOP_ID, Finish.LENGTH}


def test_ignore_eos_and_min_tokens(reference: Reference, runner: ModelRunner) -> None:
    engine = Engine(runner, EOS)
    for prompt in prompts([6, 7], seed=7, vocab=24):
        assert search(engine, prompt, 3, 3, 10, ignore_eos=True) == expected(reference, prompt, 3, 3, 10, eos=())
        assert search(engine, prompt, 3, 3, 10, min_tokens=6) == expected(reference, prompt, 3, 3, 10, min_new_tokens=6)


def test_repetition_penalty_is_applied_as_transformers_applies_it(reference: Reference, runner: ModelRunner) -> None:
    engine = Engine(runner, EOS)
    for prompt in prompts([6, 7], seed=8, vocab=24):
        assert search(engine, prompt, 3, 3, 10, repetition_penalty=1.7) == expected(
            reference, prompt, 3, 3, 10, repetition_penalty=1.7)


def test_logprobs_are_those_of_the_model(reference: Reference, runner: ModelRunner) -> None:
    (prompt,) = prompts([6], seed=9, vocab=24)
    for told in Engine(runner, EOS).ask(prompt, n=3, max_tokens=6, beam=Beam(3), logprobs=2, prompt_logprobs=1):
        every = reference.logprobs(prompt + told.ids)
        direct = every[len(prompt) - 1:-1]
        np.testing.assert_allclose(floats(told.logprobs.values), direct[range(len(told.ids)), told.ids], atol=1e-4)
        assert uints(told.logprobs.top_ids).reshape(-1, 2).tolist() == direct.topk(2).indices.tolist()
        assert told.prompt is not None
        np.testing.assert_allclose(floats(told.prompt.values)[1:], every[range(len(prompt) - 1), prompt[1:]], atol=1e-4)


@pytest.mark.parametrize("engine", [
    {"num_kv_blocks": 12}, {"max_num_seqs": 2}, {"enable_prefix_caching": False}, {"max_step_tokens": 8},
    {"enable_prefix_caching": False, "num_kv_blocks": 12, "max_num_seqs": 3}])
def test_little_room_changes_nothing(directory: Path, runner: ModelRunner, engine: dict[str, Any]) -> None:
    """Pre-emption, few slots, no prefix cache, small steps: the same texts, and nothing is left behind."""
    asked = prompts([9, 14, 5], seed=10, vocab=24)
    wanted = [search(Engine(runner, EOS), prompt, 4, 2, 12) for prompt in asked]
    narrow = Engine(load(directory, block_size=4, **{"num_kv_blocks": 400, **engine}), EOS, max_model_len=44, **engine)
    adds = [narrow.add(prompt, n=2, max_tokens=12, beam=Beam(4)) for prompt in asked]
    plain = narrow.add(asked[0], max_tokens=12)
    narrow.run()
    assert [[narrow.told[add.rid + j].ids for j in range(2)] for add in adds] == wanted
    assert narrow.told[plain.rid].ids == Engine(runner, EOS).output(asked[0], max_tokens=12)


def test_beams_share_the_blocks_of_what_they_continue(runner: ModelRunner) -> None:
    """After the prompt every hypothesis costs one token per round: nothing is computed twice."""
    engine = Engine(runner, enable_prefix_caching=False)
    engine.add(prompts([21], seed=11, vocab=24)[0], n=1, max_tokens=10, beam=Beam(4))
    engine.core.turn()
    counts = []
    while engine.core.sequences:
        plan = engine.core.scheduler.plan()
        if plan is None:
            break
        counts.append(plan.num_tokens)
        engine.core._launch(plan)
        engine.core._collect()
    assert counts and set(counts) == {4}


def test_a_choice_alone_finds_its_own_hypothesis(runner: ModelRunner) -> None:
    """After a death each choice is submitted by itself, with its number."""
    (prompt,) = prompts([8], seed=12, vocab=24)
    engine = Engine(runner, EOS)
    together = search(engine, prompt, 4, 4, 10)
    assert [search(engine, prompt, 4, 1, 10, choice=j)[0] for j in range(4)] == together
    assert search(engine, prompt, 4, 1, 10, choice=2, alone=True) == [together[2]]


def test_aborts_deadlines_and_refusals_leave_nothing(runner: ModelRunner) -> None:
    (prompt,) = prompts([8], seed=13, vocab=24)
    engine = Engine(runner)
    first = engine.add(prompt, n=2, max_tokens=50, beam=Beam(3))
    second = engine.add(prompt, n=2, max_tokens=50, beam=Beam(3), deadline_ns=engine.now + 3 * 10**7)
    for _ in range(6):
        engine.core.turn()
        engine.core.assert_invariants()
        engine.now += 10**7
    assert engine.told[second.rid].error == engine.told[second.rid + 1].error == "timeout"
    engine.core._abort(first.rid + 1)
    engine.core.turn()
    assert engine.core.sequences.keys() == {first.rid}
    engine.core._abort(first.rid)
    engine.run()
    assert not engine.told[first.rid].ids


def test_what_is_forbidden_leaves_fewer_texts(runner: ModelRunner) -> None:
    (told, other) = Engine(runner).ask([1, 2, 3], n=2, max_tokens=3, beam=Beam(2), allowed_ids=b"\5\0\0\0")
    assert told.ids == [5, 5, 5] and told.error is None and other.error == "no_token_left"


def test_hypotheses_by_hand() -> None:
    """Two beams, one end id: what ends is kept by score over length, what is worse than the best two is not."""
    def found(*pairs: tuple[int, float]) -> tuple[Candidates, list[None]]:
        ids, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float32)
        return Candidates(ids, scores, scores), [None] * len(pairs)
    search = Hypotheses(2, 1.0, "false", 3, lambda token: Finish.EOS if token == 9 else Finish.RUNNING)
    assert search.advance([found((1, -1.0), (2, -2.0), (9, -2.5), (3, -3.0))]) == [0, 0] and not search.ended
    assert search.advance([found((9, -0.5), (4, -1.0)), found((5, -0.5), (9, -4.0))]) == [0, 1]
    assert [(list(e.hypothesis.ids()), round(e.value, 3)) for e in search.ended] == [([1, 9], -0.75)]
    assert search.advance([found((6, -1.0)), found((7, -0.1))]) == [] and search.over
    assert [(list(e.hypothesis.ids()), e.finish) for e in search.ended] == [
        ([1, 9], Finish.EOS), ([2, 5, 7], Finish.LENGTH)]
