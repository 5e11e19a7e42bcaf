"""The best token without its logits is the one that a look at all logits finds, bit for bit: ties, NaN, odd sizes, rows
that nearly equal each other, activations with outliers, at every instruction-set level this processor runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine_proc.kernels.native import NativeKernels
from tests.engine_proc.kernel_cases import DTYPES, EMULATED, NATIVE, prepared, randn

KINDS = [None, "int8"]


@pytest.fixture(params=NATIVE + EMULATED, ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    for made in prepared(request.param):
        assert isinstance(made, NativeKernels)
        yield made


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def search(kernels: NativeKernels, weight: Tensor, x: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best tokens and their logits, and all logits for comparison."""
    packed = kernels.linear(weight, None, dtype=kind)  # type: ignore[arg-type]
    ids, values = torch.full((len(x),), -1, dtype=torch.int32), torch.empty(len(x))
    run = kernels.best_token(packed, weight).bind(x, ids, values)
    run()
    first = ids.clone(), values.clone()
    run()
    assert torch.equal(first[0], ids) and torch.equal(first[1].nan_to_num(7e7), values.nan_to_num(7e7))
    return ids, values, packed(x, torch.empty(len(x), packed.n))


def same(ids: Tensor, values: Tensor, logits: Tensor) -> None:
    best = logits.amax(1)
    assert torch.equal(values, best) and torch.equal(ids, (logits == best[:, None]).int().argmax(1).int())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, width", [(1, 1), (15, 3), (33, 64), (1000, 577), (4099, 96)])
def test_any_size_and_number_of_rows(
    kernels: NativeKernels, dtype: torch.dtype, kind: str | None, vocab: int, width: int
) -> None:
    weight = randn(vocab, width, dtype=dtype)
    for rows in (1, 2, 5, 6, 13, 100):
        same(*search(kernels, weight, randn(rows, width), kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_differ_by_less_than_int8_can_tell(kernels: NativeKernels, dtype: torch.dtype) -> None:
    one = torch.randn(1, 200)
    weight = (one + 0.004 * torch.randn(2000, 200)).to(dtype)
    for rows in (1, 3):
        same(*search(kernels, weight, one + 0.1 * torch.randn(rows, 200)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_among_weights_and_activations(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for factor in (30.0, 1e4):
        weight, x = randn(3000, 256), randn(2, 256)
        weight[torch.arange(3000), torch.randint(256, (3000,))] *= factor
        x[:, ::37] *= factor
        same(*search(kernels, weight.to(dtype), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_of_equals_wins(kernels: NativeKernels, dtype: torch.dtype) -> None:
    weight = randn(700, 64, dtype=dtype)
    x = weight[[400, 3]].float() * 4
    weight[[90, 650]], weight[[690, 120]] = weight[400].clone(), weight[3].clone()
    ids, values, logits = search(kernels, weight, x)
    assert ids.tolist() == [90, 3]
    same(ids, values, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_numbers_says_so_and_harms_no_other(kernels: NativeKernels, kind: str | None) -> None:
    weight = randn(500, 64, dtype=torch.bfloat16)
    for rows in (2, 9):
        x = randn(rows, 64)
        x[1, 5] = float("nan")
        ids, values, logits = search(kernels, weight, x, kind)
        assert ids[1] == 0 and values[1].isnan()
        others = [row for row in range(rows) if row != 1]
        same(ids[others], values[others], logits[others])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12, 1e30])
def test_activations_of_any_size(kernels: NativeKernels, size: float) -> None:
    same(*search(kernels, randn(300, 64, dtype=torch.bfloat16), randn(1, 64) * size))


@pytest.mark.parametrize("size", [0.0, 1e-33, 1e-12, 1e12, 1e30])
def test_weights_of_any_size(kernels: NativeKernels, size: float) -> None:
    same(*search(kernels, randn(300, 64) * size, randn(1, 64)))


def test_logits_beyond_float32_are_infinite_here_as_well(kernels: NativeKernels) -> None:
    weight = randn(300, 64)
    weight[170] *= 1e30
    x = weight[170:171] / 1e18
    ids, values, _ = search(kernels, weight, x)
    assert ids.tolist() == [170] and values.isinf().all()


def test_a_matrix_that_holds_an_infinity_is_searched_in_full(kernels: NativeKernels) -> None:
    weight = randn(300, 64)
    weight[7, 3] = float("inf")
    x = randn(1, 64).abs()
    ids, values, _ = search(kernels, weight, x)
    assert ids.tolist() == [7] and values.isinf().all()


@pytest.mark.parametrize("room", [0.02, 0.5])
def test_activations_along_the_error_of_int8(kernels: NativeKernels, room: float) -> None:
    """The row that int8 makes too small by as much as it can is still found before one that int8 keeps, just below."""
    weight = torch.zeros(200, 64)
    weight[5] = randn(64)
    scale = weight[5].abs().max() / 127
    error = weight[5] - (weight[5] / scale).round() * scale
    x = 100 * error[None] / error.norm()
    most = int(x[0].abs().argmax())
    weight[torch.arange(200) != 5, most] = -100 * x[0, most].sign()
    weight[150, most] = (x[0] @ weight[5] - room * 100 * error.norm()) / x[0, most]
    ids, values, logits = search(kernels, weight, x)
    assert ids.tolist() == [5] and logits[0, 150] > logits[0, 5] - 100 * error.norm()
    same(ids, values, logits)
