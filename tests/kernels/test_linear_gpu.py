"""What only the Triton GEMM promises: tiles, precision, limits and the mask in its epilogue."""

import pytest
import torch
from torch import Tensor

from sparse_tickets.kernels.linear import reference

pytest.importorskip("triton")

from sparse_tickets.kernels.linear import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pruned_gradients_are_zero_where_the_product_is_not_finite() -> None:
    mask = random(2, 20, 18) > 0
    dy, x = random(2, 5, 20), random(2, 5, 18)
    x[0, 0, 3], x[1, 2, 4] = float("nan"), float("inf")
    dw = gpu.dw(dy, x, mask, "ieee")
    assert not dw[~mask].any()
    torch.testing.assert_close(dw, reference.linear_dw(dy, x, mask), equal_nan=True)


def test_only_its_own_rows_see_a_nan() -> None:
    """Tails are masked in both operands, so nothing of a neighbour leaks into a tile."""
    x, weight = random(3, 17, 33), random(3, 19, 33)
    x[1, 5] = float("nan")
    y = gpu.forward(x, weight, None, "ieee")
    poisoned = torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    poisoned[1, 5] = True
    assert y[poisoned].isnan().all()
    assert y[~poisoned].isfinite().all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions(precision: str) -> None:
    x, weight, bias = random(2, 40, 70), random(2, 30, 70), random(2, 30)
    y = gpu.forward(x, weight, bias, precision)
    expected = reference.linear(x.double(), weight.double(), None, bias.double())
    size = reference.linear(x.double().abs(), weight.double().abs(), None, bias.double().abs())
    # tf32 keeps 10 bits of each factor; tf32x3 drops the product of two remainders, 2^-22.
    unit = {"ieee": 2.0**-24, "tf32": 2.0**-9, "tf32x3": 2.0**-20}[precision]
    assert ((y.double() - expected).abs() <= (unit + 72 * 2.0**-24) * size).all()


@pytest.mark.gpu
def test_bfloat16() -> None:
    """On a GPU only: the interpreter corrupts bfloat16."""
    x, weight = random(2, 40, 70, dtype=torch.bfloat16), random(2, 30, 70, dtype=torch.bfloat16)
    y = gpu.forward(x, weight, None, "ieee")
    expected = reference.linear(x.double(), weight.double(), None, None)
    size = reference.linear(x.double().abs(), weight.double().abs(), None, None)
    assert ((y.double() - expected).abs() <= (2.0**-8 + 72 * 2.0**-24) * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 64), (1000, 3), (4096, 4096)])
def test_tiles_fit_the_tensor_cores_and_the_shape(rows: int, cols: int, dtype: torch.dtype) -> None:
    tiles = gpu.choose_tiles(rows, cols, dtype, "ieee")
    for block, size in ((tiles.rows, rows), (tiles.cols, cols)):
        assert 16 <= block <= 64
        assert block & (block - 1) == 0
        assert block < max(2 * size, 17)
    assert tiles.depth in (16, 32, 64)


def test_too_large_a_matrix_is_refused() -> None:
    huge = torch.empty(1, 2**16, 2**15, device="meta")
    small = torch.empty(1, 4, 2**15, device="meta")
    with pytest.raises(ValueError, match="first operand must span fewer than 2"):
        gpu.forward(huge, small, None, "ieee")
    with pytest.raises(ValueError, match="second operand must span fewer than 2"):
        gpu.forward(small, huge, None, "ieee")


def test_too_many_tiles_are_refused() -> None:
    one = torch.empty(1, 1, 1, device="meta").expand(2**31, 1, 1)
    with pytest.raises(ValueError, match="fewer than 2\\*\\*31 tiles, got 2147483648"):
        gpu.forward(one, one, None, "ieee")
