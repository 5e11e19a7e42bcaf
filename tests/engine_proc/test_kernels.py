"""The compiled CPU kernels against their torch reference, at every instruction-set level this processor runs.

Inputs are random, lengths odd, outputs and unused memory poisoned with NaN, so that a lane too many or too few shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine_proc.kernels import Kernels, reference
from tests.engine_proc.kernel_cases import ALL, DTYPES, close, poisoned, prepared, randn


@pytest.fixture(params=ALL, ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from prepared(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 40, 576, 577])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_and_its_fusion_with_the_residual(
    kernels: Kernels, dtype: torch.dtype, dim: int, offset: float
) -> None:
    for rows in (1, 3, 70):
        x, residual, weight = randn(rows, dim, dtype=dtype), randn(rows, dim, dtype=dtype), randn(dim, dtype=dtype)
        out = poisoned(rows, dim, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-5, offset=offset, out=out)
        close(out, reference.rms_norm(x.double(), weight.double(), 1e-5, offset))
        total = residual + x
        out = kernels.add_rms_norm(residual, x, weight.float(), 1e-5, offset=offset)
        assert torch.equal(residual, total)
        close(out, reference.rms_norm(total.double(), weight.double(), 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_head_norm_works_in_place_on_a_slice_of_wider_rows(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    wide, weight = randn(5, 4 * dim, dtype=dtype), randn(dim)
    before = wide.clone()
    kernels.head_norm(wide[:, dim : 3 * dim], weight, 1e-6, offset=1.0)
    expected = reference.rms_norm(before[:, dim : 3 * dim].unflatten(1, (2, dim)).double(), weight.double(), 1e-6, 1.0)
    close(wide[:, dim : 3 * dim], expected.flatten(1))
    assert torch.equal(wide[:, :dim], before[:, :dim]) and torch.equal(wide[:, 3 * dim :], before[:, 3 * dim :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [1, 31, 1536])
def test_act_mul(kernels: Kernels, dtype: torch.dtype, act: str, dim: int) -> None:
    for rows in (1, 37):
        x = 5 * randn(rows, 2 * dim, dtype=dtype)
        out = kernels.act_mul(x, act, poisoned(rows, dim, dtype=dtype))
        close(out, reference.act_mul(x.double(), act), absolute=1e-5)


def test_act_mul_far_from_zero(kernels: Kernels) -> None:
    x = torch.tensor([[-200.0, -90.0, 200.0, float("nan")] + [1.0] * 4])
    for act in ("silu", "gelu_tanh"):
        out = kernels.act_mul(x, act)[0]
        assert abs(out[0]) < 1e-30 and abs(out[1]) < 1e-30 and out[2] == 200 and out[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3, 64, 64), (4, 4, 80, 32), (2, 1, 16, 16), (6, 2, 24, 20), (1, 1, 128, 0)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache_write(
    kernels: Kernels, dtype: torch.dtype, heads: tuple[int, int, int, int], normed: bool
) -> None:
    q_heads, kv_heads, dim, rotary = heads
    rows, blocks, size = 33, 7, 16
    qkv = randn(rows, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    q, k, v = qkv.split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    angles = torch.rand(50, rotary // 2) * 7
    cos, sin = (angles.cos(), angles.sin()) if rotary else (None, None)
    positions = torch.randint(0, 50, (rows,), dtype=torch.int32)
    slots = torch.randperm(blocks * size, dtype=torch.int32)[:rows]
    slots[5] = -1
    norms = {"q_norm": randn(dim), "k_norm": randn(dim), "eps": 1e-5} if normed else {}
    caches = [poisoned(blocks, size, kv_heads, dim, dtype=dtype) for _ in range(2)]
    expected = [t.clone() for t in (q, k, v)]
    expected_caches = [poisoned(blocks, size, kv_heads, dim, dtype=dtype) for _ in range(2)]
    wide = [t.double() for t in expected]
    double_norms = {name: w.double() if isinstance(w, Tensor) else w for name, w in norms.items()}
    wide_cs = (None, None) if cos is None else (cos.double(), sin.double())
    reference.rope_cache(*wide, *wide_cs, positions, *[c.double() for c in expected_caches], None, **double_norms)
    kernels.rope_cache(q, k, v, cos, sin, positions, *caches, slots, **norms)
    close(q, wide[0])
    close(k, wide[1])
    assert torch.equal(v, expected[2])
    for cache, new in zip(caches, (k, v)):
        flat = cache.view(-1, kv_heads * dim)
        keep = slots >= 0
        assert torch.equal(flat[slots[keep].long()], new[keep])
        assert flat.isnan().all(dim=1).sum() == blocks * size - int(keep.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 1000, 4099])
def test_argmax_with_ties_log_probabilities_and_nan(
    kernels: Kernels, dtype: torch.dtype, vocab: int
) -> None:
    logits = (randn(7, vocab, dtype=dtype) * 4).round()  # rounding makes ties
    logits[3, vocab // 2] = float("nan")
    logits[4, 1:] = float("-inf")
    ids, logprobs, nan = kernels.argmax(logits, logprobs=True)
    good = torch.tensor([0, 1, 2, 4, 5, 6])
    assert nan.tolist() == [False, False, False, True, False, False, False] and ids[3] == 0
    best = logits[good].amax(1, keepdim=True)
    assert torch.equal(ids[good], (logits[good] == best).int().argmax(1).int())
    torch.testing.assert_close(logprobs[good], (best[:, 0].double() - logits[good].double().logsumexp(1)).float())
    assert kernels.argmax(logits)[1] is None


@pytest.mark.parametrize("vocab", [1, 16, 33, 1000, 4099])
def test_masks_reach_their_own_rows_and_ids_only(kernels: Kernels, vocab: int) -> None:
    logits = randn(6, vocab + 5)
    logits[:, vocab // 2] = float("nan")  # what is forbidden goes whatever it is; what is allowed stays as it is
    which, words = torch.tensor([4, 0, 3, 1]), -(-vocab // 32) + 2
    allowed = torch.randint(-(2**31), 2**31, (4, words)).int()
    allowed[1], allowed[2] = -1, 0
    bits = (allowed.unsqueeze(-1) >> torch.arange(32)) & 1
    expected = logits.clone()
    for row, keep in zip(which.tolist(), bits.flatten(1)[:, :vocab].bool()):
        expected[row, :vocab] = expected[row, :vocab].where(keep, torch.tensor(float("-inf")))
    kernels.mask(logits[:, :vocab], which, allowed)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_is_a_stable_descending_selection(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = (randn(5, 1003, dtype=dtype) * 4).round()
    logits[2, 7] = float("nan")
    for k in (1, 20, 64):
        values, ids, logsumexp, nan = kernels.top_k(logits, k)
        assert nan.tolist() == [False, False, True, False, False]
        for row in (0, 1, 3, 4):
            sorted_values, sorted_ids = logits[row].float().sort(descending=True, stable=True)
            assert torch.equal(values[row], sorted_values[:k])
            assert torch.equal(ids[row], sorted_ids[:k].int())
            torch.testing.assert_close(logsumexp[row], logits[row].double().logsumexp(0).float())
