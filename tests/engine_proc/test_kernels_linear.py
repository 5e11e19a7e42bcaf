"""Packed linear layers against their torch reference, for every stored type, number of rows and thread.

Inputs are random, lengths odd, outputs and unused memory poisoned with NaN, so that a lane too many or too few shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine_proc.kernels import Kernels, reference
from tests.engine_proc.kernel_cases import ALL, DTYPES, EMULATED, NATIVE, close, poisoned, prepared, randn, relative_error


@pytest.fixture(params=[*ALL, *EMULATED], ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from prepared(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (16, 64), (100, 130), (95, 258)])
def test_linear_matches_torch_for_any_number_of_rows(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    weight, bias = randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    layer = kernels.linear(weight, bias)
    for rows in (1, 2, 3, 5, 8, 12, 13, 25, 70):
        x = randn(rows, k, dtype=dtype)
        out = poisoned(rows, n, dtype=dtype)
        assert layer(x, out) is out
        close(out, reference.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_linear_mixes_types_and_reads_strided_rows(
    kernels: Kernels, x_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    weight = randn(40, 48)
    for stored in ("float32", "bfloat16"):
        layer = kernels.linear(weight, dtype=stored)
        x = randn(9, 80, dtype=x_dtype)[:, 16:64]
        out = poisoned(9, 64, dtype=out_dtype)
        layer(x, out[:, 8:48])
        rounded = weight.to(getattr(torch, stored)).double()
        exact = reference.linear(x.double(), rounded)
        close(out[:, 8:48], exact, loose=x_dtype != torch.float32 or stored != "float32")
        assert out[:, :8].isnan().all() and out[:, 48:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gated_linear_equals_linear_then_gate(kernels: Kernels, dtype: torch.dtype, act: str) -> None:
    weight, bias = randn(2 * 23, 34, dtype=dtype), randn(2 * 23, dtype=dtype)
    layer = kernels.linear(weight, bias, gate=act)
    assert (layer.n, layer.k) == (23, 34)
    for rows in (1, 14):
        x = randn(rows, 34, dtype=dtype)
        wide = reference.linear(x.double(), weight.double(), bias.double())
        out = layer(x, poisoned(rows, 23, dtype=dtype))
        close(out, reference.act_mul(wide, act), loose=not kernels.native, absolute=1e-5)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("shape", [(64, 64), (100, 35), (33, 577)], ids=str)
def test_a_light_copy_gives_the_same_bits(kernels: Kernels, shape: tuple[int, int], gate: str | None) -> None:
    """Weights of many sizes: groups with an exponent that is not among the frequent ones are kept whole."""
    n, k = shape
    weight = randn(n * (2 if gate else 1), k) * 0.05
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 3] = 3e4, 0.0, 1e-40, -1e-20
    weight[4] *= 1e-6
    plain, light = (kernels.linear(weight.bfloat16(), gate=gate, light=light) for light in (False, True))
    for rows in (1, 2, 3, 4, 5, 13):
        x = randn(rows, k)
        assert torch.equal(light(x, poisoned(rows, n)), plain(x))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_a_gate_far_from_zero(kernels: Kernels, act: str) -> None:
    pick = torch.eye(4)
    layer = kernels.linear(torch.cat([pick, pick[3].expand(4, 4)]), gate=act)  # gates are the inputs, ups the last
    out = layer(torch.tensor([[-200.0, -90.0, 200.0, 1.0]]))[0]
    assert abs(out[0]) < 1e-30 and abs(out[1]) < 1e-30 and out[2] == 200


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kernels", NATIVE, indirect=True, ids=str)
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(kernels: Kernels, stored: str) -> None:
    layer = kernels.linear(randn(100, 200), dtype=stored)
    x = randn(70, 200)
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (2, 7, 13, 70):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 20), (33, 64), (70, 100), (96, 576)])
def test_int8_linear_matches_its_reference_and_stays_near_the_exact_product(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    weight, bias = randn(n, k, dtype=dtype), randn(n)
    layer = kernels.linear(weight, bias, dtype="int8")
    for rows in (1, 4, 7, 15, 33):
        x = randn(rows, k, dtype=dtype)
        x[0] *= 100  # an outlier row must not disturb the others
        out = layer(x, poisoned(rows, n, dtype=dtype))
        exact = reference.linear(x.double(), weight.double(), bias.double())
        assert relative_error(out, exact) < 0.025
        if kernels.native:  # apart from values halfway between two integers
            assert relative_error(out, reference.linear_int8(x, weight, bias)) < 0.004


def test_int8_linear_keeps_nan_and_zero_rows(kernels: Kernels) -> None:
    layer = kernels.linear(randn(20, 70), dtype="int8")
    x = randn(3, 70)
    x[0], x[1, 5] = 0.0, float("nan")
    out = layer(x)
    assert (out[0] == 0).all() and out[1].isnan().all() and out[2].isfinite().all()
