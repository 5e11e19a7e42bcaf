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
