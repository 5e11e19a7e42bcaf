"""The kernels that encoders need against their torch reference: attention to both sides, LayerNorm, activations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine_proc.kernels import Activation, Kernels, reference
from tests.engine_proc.kernel_cases import ALL, DTYPES, close, poisoned, prepared, randn

LENGTHS = ([1], [5, 1, 33, 145], [300, 7, 64])


@pytest.fixture(params=ALL, ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from prepared(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 32), (4, 2, 64), (2, 2, 24), (1, 1, 8)])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_of_packed_sequences(kernels: Kernels, lengths: list[int], heads: int, kv_heads: int, dim: int,
                                       window: int, biased: bool) -> None:
    wide = randn(sum(lengths), (heads + 2 * kv_heads) * dim)
    q, k, v = wide.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    span = max(lengths)
    bias = torch.nn.functional.pad(randn(heads, 2 * span - 1), (0, 16)) if biased else None
    options = {"scale": dim ** -0.5, "window": window, "bias": bias, "span": span if biased else 0}
    out = poisoned(sum(lengths), heads * dim)
    kernels.packed_attention(q, k, v, starts_of(lengths), dim, out=out, **options)
    double = [t.double() for t in (q, k, v)]
    close(out, reference.packed_attention(*double, starts_of(lengths), dim, **options))


def test_no_sequence_sees_another_and_a_row_is_the_same_in_any_company(kernels: Kernels) -> None:
    lengths, dim = [40, 100, 13], 32
    q, k, v = (randn(sum(lengths), 2 * dim) for _ in range(3))
    together = kernels.packed_attention(q, k, v, starts_of(lengths), dim, scale=0.2)
    for start, end in ((0, 40), (40, 140), (140, 153)):
        alone = kernels.packed_attention(
            q[start:end], k[start:end], v[start:end], starts_of([end - start]), dim, scale=0.2)
        assert torch.equal(alone, together[start:end]) or not kernels.native
    v[:40] = torch.nan
    assert kernels.packed_attention(q, k, v, starts_of(lengths), dim, scale=0.2)[40:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 31, 64, 145])
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (2, 16), (1, 48), (1, 128)])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_attention_in_sixteen_bits(kernels: Kernels, rows: int, heads: int, dim: int, size: float) -> None:
    """Also where a few keys take nearly all weight; heads that were not asked for are left alone."""
    q, k, v = (randn(rows, 3 * heads * dim) * size).split(heads * dim, dim=1)
    out = poisoned(rows, heads * dim)
    kernels.int16_attention(q, k, v, dim, scale=dim ** -0.5, heads=range(heads - 1), out=out)
    assert out[:, (heads - 1) * dim:].isnan().all()
    kernels.int16_attention(q, k, v, dim, scale=dim ** -0.5, heads=range(heads - 1, heads), out=out)
    expected = reference.packed_attention(q.double(), k.double(), v.double(), starts_of([rows]), dim, scale=dim ** -0.5)
    assert (out - expected).abs().max() < 2e-3 * size * size * size


def test_attention_in_sixteen_bits_shows_what_is_no_number(kernels: Kernels) -> None:
    for poison in range(3):
        parts = [randn(40, 32) for _ in range(3)]
        parts[poison][7, 3] = torch.inf if poison == 1 else torch.nan
        out = poisoned(40, 32)
        kernels.int16_attention(*parts, 32, scale=1.0, heads=range(1), out=out)
        assert out[7].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 40, 577])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_and_its_fusion_with_the_residual(
    kernels: Kernels, dtype: torch.dtype, dim: int, biased: bool
) -> None:
    for rows in (1, 70):
        x, delta, weight = randn(rows, dim, dtype=dtype), randn(rows, dim, dtype=dtype), randn(dim)
        bias = randn(dim) if biased else None
        wide = None if bias is None else bias.double()
        out = poisoned(rows, dim, dtype=dtype)
        kernels.layer_norm(x, weight, bias, 1e-5, out=out)
        close(out, reference.layer_norm(x.double(), weight.double(), wide, 1e-5))
        total = x + delta
        expected = reference.layer_norm(total.double(), weight.double(), wide, 1e-5)
        close(kernels.layer_norm(x, weight, bias, 1e-5, add=delta, out=x if biased else None), expected)
        assert biased or torch.equal(x, total)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu", "tanh"])
def test_activations_behind_a_product_and_in_a_gate(kernels: Kernels, act: Activation) -> None:
    x, weight, bias = randn(37, 48) * 3, randn(70, 48), randn(70)
    product = reference.linear(x.double(), weight.double(), bias.double())
    close(kernels.linear(weight, bias, post=act)(x), reference.activate(product, act))
    gate, up = product.chunk(2, dim=1)
    close(kernels.linear(weight, bias, gate=act)(x), reference.activate(gate, act) * up)


def test_the_exact_gelu_has_no_absolute_error_to_speak_of(kernels: Kernels) -> None:
    x = torch.linspace(-12, 12, 4001)[:, None]
    y = kernels.linear(torch.ones(1, 1), post="gelu")(x)
    assert (y - torch.nn.functional.gelu(x.double())).abs().max() < 1e-6
    assert kernels.linear(torch.ones(1, 1), post="gelu")(torch.tensor([[torch.nan]])).isnan().all()
