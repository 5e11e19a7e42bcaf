"""What the sampler draws: exact filters and penalties, the right distribution, numbers that depend on nothing else."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_proc import filters, sampler
from engine_proc.request import Sequence
from engine_proc.slots import Slots
from pipeline.errors import QuartetError
from pipeline.messages import pack_ids
from tests.engine_proc.tiny import sequence

CPU = torch.device("cpu")


class Bench:
    """Sequences in slots and one row of logits for each."""

    def __init__(self, vocab: int, *params: dict[str, Any], prompt: list[int] | None = None,
                 history: list[int] | None = None) -> None:
        self.slots = Slots(len(params), vocab, 100, CPU)
        self.seqs = [sequence(i, prompt or [0], 1000, history=history or [], **values)
                     for i, values in enumerate(params)]
        for seq in self.seqs:
            self.slots.admit(seq)

    def sample(self, logits: torch.Tensor, position: int | None = None) -> sampler.Sampled:
        rows = np.array([seq.slot for seq in self.seqs])
        positions = np.array([seq.num_output if position is None else position for seq in self.seqs])
        return sampler.sample(logits.clone(), self.slots.gather(rows, positions), self.slots)

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        rows = np.array([seq.slot for seq in self.seqs])
        gathered = self.slots.gather(rows, np.array([seq.num_output for seq in self.seqs]))
        return sampler.adjust(logits.clone(), gathered, self.slots, keep=True)


def distribution(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> np.ndarray:
    """The direct computation: sort, cut, renormalise. float64 [vocab]."""
    p = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    order = np.argsort(-p, kind="stable")
    keep = order[:top_k] if top_k else order
    share = p[keep] / p[keep].sum()
    before = np.concatenate([[0.0], np.cumsum(share)[:-1]])
    keep = keep[before < top_p]
    keep = keep[p[keep] >= min_p * p.max()]
    out = np.zeros_like(p)
    out[keep] = p[keep] / p[keep].sum()
    return out


@pytest.mark.parametrize("params", [
    {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.2},
], ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """20,000 draws at different positions against the direct computation, by a chi-square bound."""
    count, vocab = 20_000, 40
    torch.manual_seed(5)
    logits = torch.randn(vocab) * 1.5
    expected = distribution(logits, **params)
    params = {"temperature": 1.0, **params}
    bench = Bench(vocab, {**params, "seed": 99})
    rows = bench.slots.gather(np.zeros(count, np.int64), np.arange(count))
    tokens = sampler.sample(logits.expand(count, vocab).clone(), rows, bench.slots).tokens
    seen = np.bincount(tokens.numpy(), minlength=vocab)

    assert not seen[expected == 0].any(), "a token that the filters exclude was drawn"
    likely = expected > 0
    chi2 = float((((seen - count * expected) ** 2)[likely] / (count * expected[likely])).sum())
    degrees = int(likely.sum()) - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 10


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_filters_keep_exactly_the_right_tokens(data: st.DataObject) -> None:
    """Whatever the neighbours ask for, each row keeps what the direct computation keeps."""
    vocab = data.draw(st.integers(2, 700))
    n = data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(n, vocab) * data.draw(st.sampled_from([0.01, 1.0, 8.0]))
    top_k = np.array([data.draw(st.integers(0, vocab + 3)) for _ in range(n)])
    top_p = np.array([data.draw(st.floats(0.05, 1.0)) for _ in range(n)])
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    cut = filters.cuts(weights, top_k, top_p)
    by_histogram = filters._from_histogram(weights, np.where(top_k > 0, np.minimum(top_k, vocab), vocab), top_p)
    assert torch.equal(weights >= cut, weights >= by_histogram[:, None])
    for row in range(n):
        expected = distribution(logits[row], top_k=min(int(top_k[row]), vocab), top_p=float(top_p[row])) > 0
        kept = (weights[row] >= cut[row]).numpy()
        for token in np.flatnonzero(kept != expected):
            # They may disagree on a token that sits on the edge of the nucleus within rounding, on no other.
            p = torch.softmax(logits[row].double(), -1).numpy()
            p = np.where(np.isin(np.arange(vocab), np.argsort(-p)[:int(top_k[row]) or vocab]), p, 0)
            assert abs(p[p > p[token]].sum() / p.sum() - float(top_p[row])) < 1e-5


def test_a_row_never_depends_on_its_neighbours() -> None:
    vocab, params = 1000, [
        {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_k": 40, "seed": 6}, {},
        {"temperature": 1.2, "top_p": 0.9, "seed": 7}, {"temperature": 1.0, "min_p": 0.02, "seed": 8},
        {"temperature": 1.0, "top_k": 900, "top_p": 0.5, "seed": 9},
        {"temperature": 1.0, "seed": 10, "presence_penalty": 1.0, "logprobs": 3}]
    torch.manual_seed(1)
    logits = torch.randn(len(params), vocab) * 2
    together = Bench(vocab, *params).sample(logits).tokens.tolist()
    alone = [Bench(vocab, one).sample(logits[i:i + 1]).tokens.item() for i, one in enumerate(params)]
    assert together == alone


def test_random_numbers_are_keyed_by_seed_choice_and_position() -> None:
    seeds = np.array([1, 1, 1, 2, 2**64 - 1], np.uint64)
    choices, positions = np.array([0, 1, 0, 0, 0]), np.array([0, 0, 1, 0, 0])
    numbers = sampler.uniforms(seeds, choices, positions)
    assert len(set(numbers.tolist())) == 5 and ((0 < numbers) & (numbers < 1)).all()
    # Fixed for ever: a request that is resumed after an upgrade of one process must go on with the same numbers.
    np.testing.assert_allclose(numbers[:2], [0.048761560392760195, 0.036296723875698655], rtol=0, atol=1e-16)


def test_random_numbers_are_uniform_along_every_key() -> None:
    n = 1 << 16
    zero, along = np.zeros(n, np.uint64), np.arange(n)
    for keys in ((along, zero, zero), (zero, along, zero), (zero, zero, along)):
        u = sampler.uniforms(*keys)
        bins = np.bincount((u * 256).astype(int), minlength=256)
        assert float((((bins - n / 256) ** 2) / (n / 256)).sum()) < 255 + 5 * np.sqrt(2 * 255)
        assert abs(float(np.corrcoef(u[:-1], u[1:])[0, 1])) < 0.02


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]])
    assert Bench(4, {}).sample(logits).tokens.tolist() == [1]


@pytest.mark.parametrize("uniform, expected", [(1e-12, 1), (0.2499, 1), (0.2501, 3), (0.9999999999, 300)])
def test_the_cdf_is_inverted_in_vocabulary_order_and_skips_zeros(uniform: float, expected: int) -> None:
    weights = torch.zeros(1, 600)
    weights[0, [1, 3, 300]] = torch.tensor([1.0, 2.0, 1.0])
    assert sampler.invert(weights, torch.tensor([uniform], dtype=torch.float64)).item() == expected


@pytest.mark.parametrize("vocab, k", [(5000, 3), (5000, 0), (300, 7), (1024, 1), (2311, 2)])
def test_the_largest_are_found_through_their_blocks(vocab: int, k: int) -> None:
    logits = torch.randn(4, vocab)
    values, ids = sampler.largest(logits, k)
    expected = logits.topk(k, dim=-1)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


def test_penalties_follow_the_openai_definition() -> None:
    """Presence and frequency look at the output, repetition at prompt and output."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0, 0.5]])
    bench = Bench(5, {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0},
                  prompt=[0, 1], history=[3, 3, 1])
    np.testing.assert_allclose(
        bench.adjusted(logits)[0],
        [2.0 / 2, -2.0 * 2 - 0.5 - 0.25, 1.0, 4.0 / 2 - 0.5 - 2 * 0.25, 0.5])


def test_what_is_sampled_is_counted() -> None:
    bench = Bench(6, {"frequency_penalty": 10.0}, prompt=[5])
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert [bench.sample(logits).tokens.item() for _ in range(4)] == [0, 1, 2, 3]


def test_a_released_slot_leaves_no_trace() -> None:
    bench = Bench(6, {"frequency_penalty": 10.0})
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    bench.sample(logits)
    (old,) = bench.seqs
    bench.slots.release(old)
    bench.slots.release(old)
    bench.seqs = [sequence(9, [0], 10, presence_penalty=0.1)]
    bench.slots.admit(bench.seqs[0])
    assert bench.sample(logits).tokens.tolist() == [0]
    bench.slots.assert_invariants(bench.seqs)


def test_logit_bias_is_added_and_can_force_or_ban() -> None:
    bias = {"bias_ids": pack_ids([2, 0]), "bias_values": np.array([100.0, -100.0], np.float32).tobytes()}
    bench = Bench(4, bias, {"temperature": 2.0, "seed": 3, **bias}, {})
    logits = torch.tensor([[9.0, 1.0, 0.0, 1.0]] * 3)
    assert bench.sample(logits).tokens.tolist() == [2, 2, 0]


def test_min_tokens_bans_the_ends_until_then() -> None:
    bench = Bench(5, {"min_tokens": 2, "ignore_eos": False, "stop_ids": pack_ids([4])}, {})
    bench.seqs[0].stops = frozenset({3, 4})
    bench.slots.release(bench.seqs[0])
    bench.slots.admit(bench.seqs[0])
    logits = torch.tensor([[0.0, 1.0, 0.0, 3.0, 2.0]] * 2)
    assert bench.sample(logits, position=1).tokens.tolist() == [1, 3]
    assert bench.sample(logits, position=2).tokens.tolist() == [3, 3]


def test_logprobs_are_of_the_unmodified_logits() -> None:
    bias = {"bias_ids": pack_ids([1]), "bias_values": np.array([50.0], np.float32).tobytes()}
    logits = torch.tensor([[3.0, 0.0, 1.0, 2.0]])
    result = Bench(4, {**bias, "logprobs": 2, "temperature": 0.5, "repetition_penalty": 3.0}).sample(logits)
    expected = torch.log_softmax(logits, -1)[0]
    assert result.tokens.tolist() == [1] and result.ranked is not None
    torch.testing.assert_close(result.ranked.values, expected[1:2])
    assert result.ranked.ranks.tolist() == [4] and result.ranked.top_ids.tolist() == [[0, 3]]
    torch.testing.assert_close(result.ranked.top_values, expected[[0, 3]][None])


def test_only_rows_that_want_logprobs_are_ranked() -> None:
    result = Bench(8, {}, {"logprobs": 0}, {}, {"logprobs": 4}).sample(torch.randn(4, 8))
    assert result.ranked_rows.tolist() == [1, 3]
    assert result.ranked is not None and result.ranked.top_ids.shape == (2, 4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_flagged_and_harms_nobody(poison: float) -> None:
    vocab = 700
    params = [{"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "seed": 2},
              {"temperature": 1.0, "seed": 3, "logprobs": 2}]
    torch.manual_seed(2)
    logits = torch.randn(3, vocab)
    clean = Bench(vocab, *params).sample(logits)
    logits[1, 5] = poison
    dirty = Bench(vocab, *params).sample(logits)
    assert dirty.valid.tolist() == [True, False, True]
    assert dirty.tokens[[0, 2]].tolist() == clean.tokens[[0, 2]].tolist()
    assert 0 <= int(dirty.tokens[1]) < vocab


def test_ids_outside_of_the_vocabulary_are_refused_before_a_slot_is_taken() -> None:
    slots = Slots(1, 10, 100, CPU)
    bias = {"bias_ids": pack_ids([10]), "bias_values": np.zeros(1, np.float32).tobytes()}
    for seq, param in ((sequence(1, [3, 10]), "prompt"), (sequence(2, [3], **bias), "logit_bias")):
        with pytest.raises(QuartetError) as caught:
            slots.admit(seq)
        assert caught.value.param == param and seq.slot == -1
    slots.assert_invariants([])


def test_slots_grow_when_more_are_admitted_than_configured() -> None:
    slots = Slots(1, 10, 100, CPU)
    seqs: list[Sequence] = [sequence(i, [1], temperature=0.1 * (i + 1), presence_penalty=0.1) for i in range(7)]
    for seq in seqs:
        slots.admit(seq)
    slots.assert_invariants(seqs)
    rows = slots.gather(np.array([seq.slot for seq in seqs]), np.zeros(7, np.int64))
    np.testing.assert_allclose(rows.temperature, [0.1 * (i + 1) for i in range(7)], rtol=1e-6)
