"""A request's answer does not depend on its neighbours or on how it was chunked, cached, pre-empted or resumed."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine_proc.request import Sequence
from engine_proc.runner import ModelRunner
from pipeline.messages import Logprobs
from tests.engine_proc.tiny import Driver, Reference, floats, load, make_checkpoint, sequence, uints

Cases = list[tuple[list[int], list[int]]]
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 48, 64, 5, 90, 120, 3, 77, 28, 40, 9, 100, 12, 55]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", seed=3)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


@pytest.fixture(scope="module")
def runner(directory: Path) -> ModelRunner:
    return load(directory)


@pytest.fixture(scope="module")
def cases(reference: Reference) -> Cases:
    """20 prompts of mixed length and transformers' 64 greedy ids for each."""
    return reference.clear(LENGTHS, 64)


def sequences(cases: Cases, count: int = 64) -> list[Sequence]:
    return [sequence(i, prompt, count) for i, (prompt, _) in enumerate(cases)]


def test_alone(runner: ModelRunner, cases: Cases) -> None:
    assert [Driver(runner).run(seq)[0] for seq in sequences(cases)] == [ids for _, ids in cases]


def test_sixteen_at_a_time(runner: ModelRunner, cases: Cases) -> None:
    driver = Driver(runner, max_num_seqs=16)
    assert driver.run(*sequences(cases)) == [ids for _, ids in cases]


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_prefill(runner: ModelRunner, cases: Cases, chunk: int) -> None:
    driver = Driver(runner, max_num_seqs=16, max_step_tokens=32, max_prefill_chunk=chunk)
    assert driver.run(*sequences(cases, 20)) == [ids[:20] for _, ids in cases]


def test_prefix_hits(runner: ModelRunner, cases: Cases) -> None:
    """The second run finds prompt and answer in the cache; a longer prompt finds its beginning."""
    prompt, ids = next(case for case in cases if len(case[0]) == 100)
    driver = Driver(runner)
    first, again = sequence(1, prompt, 64), sequence(2, prompt, 64)
    longer = sequence(3, prompt + ids[:20], 44)

    assert driver.run(first) == [ids]
    assert driver.run(again) == [ids] and again.num_cached == 96
    assert driver.run(longer) == [ids[20:]] and longer.num_cached == 112


def test_pre_emption(runner: ModelRunner, cases: Cases) -> None:
    driver = Driver(runner, max_num_seqs=8, enable_prefix_caching=False)
    assert driver.run(*sequences(cases[:8]), preempt_at=30) == [ids for _, ids in cases[:8]]
    assert driver.scheduler.num_preemptions == 1


def test_a_continuation_goes_on_where_it_was_cut(runner: ModelRunner, cases: Cases) -> None:
    """History is prompt for the cache and output for everything else."""
    prompt, ids = cases[5]
    whole = sequence(1, prompt, 40, temperature=1.0, seed=7, presence_penalty=0.5, repetition_penalty=1.3)
    (text,) = Driver(runner).run(whole)
    rest = sequence(2, prompt, 40, history=text[:13], temperature=1.0, seed=7, presence_penalty=0.5,
                    repetition_penalty=1.3)
    assert Driver(runner).run(rest) == [text]


def test_siblings_share_a_copied_block(runner: ModelRunner, cases: Cases) -> None:
    """n = 3: the siblings take over the leader's prompt, its half-filled block as a copy."""
    prompt, _ = next(case for case in cases if len(case[0]) == 55)
    expected = [Driver(runner).run(sequence(1, prompt, 24, choice=j, temperature=1.0, seed=11))[0] for j in range(3)]
    leader = sequence(1, prompt, 24, choice=0, temperature=1.0, seed=11)
    siblings = [sequence(1 + j, prompt, 24, choice=j, temperature=1.0, seed=11) for j in (1, 2)]
    for sibling in siblings:
        sibling.leader = leader
    assert Driver(runner).run(leader, *siblings) == expected
    assert len({tuple(ids) for ids in expected}) == 3


def test_a_seeded_text_is_the_same_alone_and_among_others(runner: ModelRunner, cases: Cases) -> None:
    settings = [{"temperature": 0.9, "seed": 1}, {"temperature": 1.3, "seed": 2, "top_p": 0.8},
                {"temperature": 0.7, "seed": 3, "top_k": 12}, {"temperature": 1.0, "seed": 4, "min_p": 0.05},
                {"temperature": 1.1, "seed": 5, "frequency_penalty": 0.3}, {}]
    def make(i: int) -> Sequence:
        return sequence(i, cases[i % 20][0], 40, **settings[i % len(settings)])
    alone = [Driver(runner).run(make(i))[0] for i in range(16)]
    assert Driver(runner, max_num_seqs=16, max_step_tokens=48).run(*map(make, range(16))) == alone


def test_logprobs_are_those_of_transformers(runner: ModelRunner, reference: Reference, cases: Cases) -> None:
    driver = Driver(runner)
    seqs = [sequence(i, prompt, 24, logprobs=i, temperature=0.8, seed=i) for i, (prompt, _) in enumerate(cases[:6])]
    for k, (seq, ids) in enumerate(zip(seqs, driver.run(*seqs))):
        expected = reference.logprobs(seq.tokens)[seq.num_prompt - 1:-1]
        records = driver.sampled_logprobs(seq)
        assert len(records) == 24
        for row, token, record in zip(expected, ids, records):
            check_record(record, row[None], [token], k)


def test_prompt_logprobs_are_those_of_transformers(runner: ModelRunner, reference: Reference, cases: Cases) -> None:
    """In chunks, next to requests that want none; every prompt token but the first has its record."""
    driver = Driver(runner, max_step_tokens=20, max_prefill_chunk=9)
    seqs = [sequence(i, cases[i][0], 4, prompt_logprobs=k) for i, k in ((7, 3), (8, None), (10, 0))]
    driver.run(*seqs)
    for seq in seqs:
        k = seq.sampling.prompt_logprobs
        if k is None:
            assert not seq.prompt_logprobs
            continue
        prompt = seq.tokens[:seq.num_prompt]
        expected, first = reference.logprobs(prompt)[:-1], 0
        for record in seq.prompt_logprobs:
            count = len(floats(record.values))
            check_record(record, expected[first:first + count], prompt[first + 1:first + 1 + count], k)
            first += count
        assert first == len(prompt) - 1


def check_record(record: Logprobs, expected: torch.Tensor, tokens: object, k: int) -> None:
    """`record` against rows of the reference's log-probabilities, [n, vocab]."""
    chosen = expected[torch.arange(len(expected)), torch.tensor(list(tokens))]      # type: ignore[call-overload]
    best = expected.topk(k, dim=-1)
    assert record.k == k
    np.testing.assert_allclose(floats(record.values), chosen.numpy(), atol=1e-3)
    np.testing.assert_array_equal(uints(record.ranks), ((expected > chosen[:, None]).sum(dim=-1) + 1).numpy())
    np.testing.assert_allclose(floats(record.top_values).reshape(len(chosen), k), best.values.numpy(), atol=1e-3)
    np.testing.assert_array_equal(uints(record.top_ids).reshape(len(chosen), k), best.indices.numpy())
