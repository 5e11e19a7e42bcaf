"""A model that is split over processes gives what one process gives: float32, over gloo, on the CPU."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_proc.arch import describe
from engine_proc.checkpoint import check
from engine_proc.decoder import load_decoder
from engine_proc.layers import TorchOps
from engine_proc.parallel.ranks import LeaderModel
from engine_proc.parallel.share import Share
from engine_proc.request import Sequence
from engine_proc.runner import ModelRunner
from engine_proc.weights import Weights
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from tests.engine_proc.ranks import children
from tests.engine_proc.tiny import LONGEST, Driver, Reference, floats, load, make_checkpoint, sequence, uints

Cases = list[tuple[list[int], list[int]]]
LENGTHS = [1, 2, 16, 17, 48, 90, 5, 33]
VOCAB = 321                     # odd: one rank holds a token more than the other


def close(runner: ModelRunner) -> None:
    assert isinstance(runner.model, LeaderModel)
    runner.model.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", seed=3, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def cases(directory: Path) -> Cases:
    """Prompts and transformers' greedy ids."""
    return Reference(directory).clear(LENGTHS, 24)


@pytest.fixture(scope="module")
def whole(directory: Path) -> ModelRunner:
    return load(directory)


@pytest.fixture(scope="module")
def split(directory: Path) -> Iterator[ModelRunner]:
    runner = load(directory, tensor_parallel=2)
    yield runner
    close(runner)


def sequences(cases: Cases, **sampling: Any) -> list[Sequence]:
    return [sequence(i, prompt, 24, **sampling) for i, (prompt, _) in enumerate(cases)]


# ---- equal to one process ----------------------------------------------------------------------------------------

def test_alone(split: ModelRunner, cases: Cases) -> None:
    assert [Driver(split).run(seq)[0] for seq in sequences(cases)[:4]] == [ids for _, ids in cases[:4]]


def test_together(split: ModelRunner, cases: Cases) -> None:
    assert Driver(split).run(*sequences(cases)) == [ids for _, ids in cases]


def test_in_chunks_beside_decodes(split: ModelRunner, cases: Cases) -> None:
    driver = Driver(split, max_num_seqs=4, max_step_tokens=16, max_prefill_chunk=7)
    assert driver.run(*sequences(cases)) == [ids for _, ids in cases]


def test_from_the_prefix_cache(split: ModelRunner, cases: Cases) -> None:
    prompt, ids = cases[5]
    driver, again = Driver(split), sequence(2, prompt, 24)
    assert driver.run(sequence(1, prompt, 24)) == [ids]
    assert driver.run(again) == [ids] and again.num_cached == 80


def test_after_a_pre_emption(split: ModelRunner, cases: Cases) -> None:
    driver = Driver(split, enable_prefix_caching=False)
    assert driver.run(*sequences(cases), preempt_at=12) == [ids for _, ids in cases]


def test_siblings_copy_blocks_on_every_rank(split: ModelRunner, whole: ModelRunner, cases: Cases) -> None:
    def choices() -> list[Sequence]:
        leader, *siblings = [sequence(1 + j, cases[7][0], 16, choice=j, temperature=1.0, seed=11) for j in range(3)]
        for sibling in siblings:
            sibling.leader = leader
        return [leader, *siblings]
    ids = Driver(split).run(*choices())
    assert ids == Driver(whole).run(*choices()) and len(set(map(tuple, ids))) == 3


def test_sampled_texts_and_their_log_probabilities(split: ModelRunner, whole: ModelRunner, cases: Cases) -> None:
    """Beside one another; rank 0 samples from the logits of both halves of the vocabulary."""
    settings = [{"temperature": 0.9, "seed": 1, "logprobs": 5}, {"temperature": 1.3, "seed": 2, "top_p": 0.8, "logprobs": 0},
                {"logprobs": VOCAB}, {"prompt_logprobs": 2, "presence_penalty": 0.7}]
    def run(runner: ModelRunner) -> tuple[list[list[int]], list[Any]]:
        driver = Driver(runner, max_step_tokens=40)
        seqs = [sequence(i, cases[i + 3][0], 16, **some) for i, some in enumerate(settings)]
        ids = driver.run(*seqs)
        return ids, [record for seq in seqs for record in (*driver.sampled_logprobs(seq), *seq.prompt_logprobs)]
    (ids, records), (expected, others) = run(split), run(whole)
    assert ids == expected and len(records) == len(others) > 48
    for record, other in zip(records, others):
        assert record.k == other.k
        np.testing.assert_allclose(floats(record.values), floats(other.values), atol=1e-4)
        if record.k < VOCAB:
            np.testing.assert_array_equal(uints(record.top_ids), uints(other.top_ids))
        np.testing.assert_allclose(floats(record.top_values), floats(other.top_values), atol=1e-3)


def test_given_embeddings(split: ModelRunner, whole: ModelRunner) -> None:
    rows = np.random.default_rng(5).normal(size=(9, 64)).astype(np.float32)
    def run(runner: ModelRunner) -> list[list[int]]:
        seq = sequence(1, [0] * 9 + [7, 8], 12)
        seq.embeds = rows
        return Driver(runner).run(seq, sequence(2, [4, 5], 12))
    assert run(split) == run(whole)


@pytest.mark.parametrize(("family", "size", "config"), [
    ("phi3", 2, {}),                                # one fused matrix for q, k and v, one for gates and ups
    ("gemma2", 2, {"head_dim": 16, "query_pre_attn_scalar": 16}),       # tied, soft caps, norms after the sums
    ("starcoder2", 2, {}),                          # biases of the layers that are summed; no gate
])
def test_other_shapes_of_layers(family: str, size: int, config: dict[str, Any], tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / family, family, num_hidden_layers=2, **config)
    cases = Reference(directory).clear((1, 20, 33), 12)
    runner = load(directory, tensor_parallel=size)
    try:
        seqs = [sequence(i, prompt, 12) for i, (prompt, _) in enumerate(cases)]
        assert Driver(runner).run(*seqs) == [ids for _, ids in cases]
        assert runner.facts["tensor_parallel"] == size
    finally:
        close(runner)


# ---- what a rank holds -------------------------------------------------------------------------------------------

def test_the_shares_make_up_the_model(directory: Path) -> None:
    """Column-parallel rows and row-parallel columns of both ranks, side by side, are the whole matrices."""
    arch = describe(check(directory))
    def read(share: Share) -> Any:
        return load_decoder(arch, Weights(directory), TorchOps(), LONGEST, lambda percent: None, share=share)
    whole, first, second = read(Share()), read(Share(0, 2)), read(Share(1, 2))
    assert torch.equal(torch.cat([first.embedding, second.embedding]), whole.embedding)
    assert torch.equal(torch.cat([first.head.weight, second.head.weight]), whole.head.weight)
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    for one, two, both in zip(first.layers, second.layers, whole.layers):
        assert torch.equal(torch.cat([one.o.weight, two.o.weight], dim=1), both.o.weight)
        assert torch.equal(torch.cat([one.down.weight, two.down.weight], dim=1), both.down.weight)
        parts = [half.qkv.weight.split([q // 2, kv // 2, kv // 2]) for half in (one, two)]
        assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*parts)]), both.qkv.weight)
        gates = [half.up.weight.chunk(2) for half in (one, two)]
        assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*gates)]), both.up.weight)


def test_a_rank_holds_its_heads_of_the_cache(split: ModelRunner, whole: ModelRunner) -> None:
    assert split.cache.k[0].shape == (200, 16, 1, 16) and whole.cache.k[0].shape == (200, 16, 2, 16)


# ---- refusals ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("engine", "sentence"), [
    ({"tensor_parallel": 4}, "it has 2 key and value heads, which 4 does not divide"),
    ({"tensor_parallel": 3}, "it has 4 attention heads, which 3 does not divide"),
    ({"tensor_parallel": 2, "quantization": "int8"}, "--tensor-parallel-size 2 and --quantization int8 exclude each other"),
    ({"tensor_parallel": 2, "backend": "transformers"}, "needs the own backend"),
])
def test_what_cannot_be_split_is_refused(engine: dict[str, Any], sentence: str, directory: Path) -> None:
    with pytest.raises(StartError, match=sentence) as caught:
        load(directory, **engine)
    assert caught.value.exit_code == CONFIG and "\n" not in caught.value.message


@pytest.mark.parametrize(("family", "sentence"), [
    ("olmo2", "norms all of its heads together"), ("gpt2", "needs the own backend, which cannot run")])
def test_models_that_cannot_be_split_are_refused(family: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=sentence):
        load(make_checkpoint(tmp_path / "m", family, num_hidden_layers=1), tensor_parallel=2)


def test_a_start_that_fails_leaves_no_rank(directory: Path) -> None:
    """Here the cache has no room for one sequence."""
    before = children()
    with pytest.raises(StartError, match="does not hold one sequence of 256 tokens"):
        load(directory, tensor_parallel=2, num_kv_blocks=None, kv_cache_bytes=2**16)
    assert children() == before
