"""What only the Triton GEMM promises: tiles, precision, limits and the mask in its epilogue."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.linear import linear, reference

pytest.importorskip("triton")

from sparse_tickets.kernels.linear import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# tf32 keeps 10 bits of each factor; tf32x3 drops the product of two remainders, 2^-22.
ROUNDING = {"ieee": 0.0, "tf32": 2.0**-9, "tf32x3": 2.0**-20}
PRECISIONS = [
    (torch.float64, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float16, "ieee"),
    # On a GPU only: the interpreter corrupts bfloat16.
    pytest.param(torch.bfloat16, "ieee", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def random_mask(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.rand(shape, generator=generator) < density).to(DEVICE)


def assert_product(actual: Tensor, function, operands, terms: int, precision: str) -> None:
    """Every entry within its own bound: of rounding factors, of summing in float32, of the result.

    Args:
        actual: on the backend.
        function: of `reference`.
        operands: its arguments.
        terms: summands of an entry.
        precision: of the products.
    """

    def each(change) -> list[Tensor | None]:
        return [t if t is None or t.dtype == torch.bool else change(t) for t in operands]

    expected = function(*each(lambda t: t.detach().double()))
    size = function(*each(lambda t: t.detach().double().abs()))
    eps = torch.finfo(actual.dtype).eps
    summing = (terms + 2) * (eps if actual.dtype == torch.float64 else 2.0**-24)
    bound = (ROUNDING[precision] + eps + summing) * size
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max():.3e}"


def check_parity(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    precision: str,
    density: float = 0.3,
    seed: int = 0,
) -> None:
    """Forward, dX, dW and db of ``(P, B, O, I)`` against float64."""
    tickets, batch, out, inp = shape
    mask = random_mask(tickets, out, inp, density=density, seed=seed)
    mask[:1, -1:] = False
    x = random(tickets, batch, inp, dtype=dtype, seed=seed).requires_grad_()
    weight = random(tickets, out, inp, dtype=dtype, seed=seed).masked_fill(~mask, 0)
    bias = random(tickets, out, dtype=dtype, seed=seed).requires_grad_()
    dy = random(tickets, batch, out, dtype=dtype, seed=seed)
    weight.requires_grad_()
    with use_backend("triton"):
        y = linear(x, weight, mask, bias, precision=precision)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    assert {t.dtype for t in (y, dx, dw, db)} == {dtype}
    assert_product(y, reference.linear, (x, weight, mask, bias), inp + 1, precision)
    assert_product(dx, reference.linear_dx, (dy, weight, mask), out, precision)
    assert_product(dw, reference.linear_dw, (dy, x, mask), batch, precision)
    torch.testing.assert_close(db, dy.sum(1))
    assert not dw[~mask].any()


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 40, 30, 70), (3, 17, 5, 33)], ids=str)
def test_precisions(shape: tuple[int, int, int, int], dtype: torch.dtype, precision: str) -> None:
    check_parity(shape, dtype, precision)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS[:5], ids=str)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 48), st.integers(1, 48), st.integers(1, 48)),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_random_shapes_and_masks(
    dtype: torch.dtype,
    precision: str,
    shape: tuple[int, int, int, int],
    density: float,
    seed: int,
) -> None:
    check_parity(shape, dtype, precision, density, seed)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_empty_axes(shape: tuple[int, int, int, int], precision: str) -> None:
    check_parity(shape, torch.float32, precision)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_masks_with_no_ones_and_with_nothing_else(density: float) -> None:
    check_parity((2, 9, 20, 18), torch.float32, "ieee", density)


def test_double_backward() -> None:
    """Hessian-vector products of a layer under a non-linearity agree with dense torch."""

    def second(on_mask: bool) -> list[Tensor]:
        mask = random_mask(2, 20, 18, density=0.3)
        x, bias = random(2, 9, 18, dtype=torch.float64), random(2, 20, dtype=torch.float64)
        weight = random(2, 20, 18, dtype=torch.float64).masked_fill(~mask, 0)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        if on_mask:
            y = linear(x, weight, mask, bias)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), x, (weight * mask).mT)
        first = torch.autograd.grad(y.tanh().square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    with use_backend("triton"):
        actual, expected = second(on_mask=True), second(on_mask=False)
    for left, right in zip(actual, expected, strict=True):
        scale = right.abs().max()
        assert ((left - right).abs().max() <= 1000 * torch.finfo(torch.float64).eps * scale).item()


def test_forward_mode_raises() -> None:
    x, weight = random(1, 2, 4), random(1, 3, 4)
    mask = torch.ones_like(weight, dtype=torch.bool)
    with use_backend("triton"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear(dual, weight, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_overlapping_and_expanded_inputs(dtype: torch.dtype) -> None:
    """One row for the whole batch, windows that overlap, one weight for all tickets, columns."""
    mask = random_mask(1, 12, 10, density=0.5).mT.contiguous().mT.expand(3, -1, -1)
    weight = random(1, 12, 10, dtype=dtype).masked_fill(~mask[:1], 0).expand(3, -1, -1)
    bias = random(12, dtype=dtype).expand(3, -1)
    windows = random(40, dtype=dtype).as_strided((3, 7, 10), (2, 3, 1))
    for x in (random(1, 1, 10, dtype=dtype).expand(3, 7, 10), windows):
        for bias_ in (bias, None):
            leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            with use_backend("triton"):
                y = linear(*leaves, mask, bias_)
                # The gradient of a sum is an expanded scalar: every stride is zero.
                dx, dw = torch.autograd.grad(y.sum(), leaves)
            dy = torch.ones_like(y)
            assert_product(y, reference.linear, (x, weight, mask, bias_), 11, "ieee")
            assert_product(dx, reference.linear_dx, (dy, weight, mask), 12, "ieee")
            assert_product(dw, reference.linear_dw, (dy, x, mask), 7, "ieee")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x must have shape \(P, B, I\), got \(3, 5\)"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int8)}, TypeError, "x must be float32 or"),
        ({"x": torch.zeros(2, 3, 5).half()}, TypeError, "weight must be float16, got float32"),
        ({"weight": torch.zeros(2, 4, 6)}, ValueError, r"weight must have shape \(2, O, 5\)"),
        ({"weight": torch.zeros(1, 4, 5)}, ValueError, r"weight must have shape \(2, O, 5\)"),
        ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(4, 5).bool()}, ValueError, r"mask must have shape \(2, 4, 5\)"),
        ({"bias": torch.zeros(2, 5)}, ValueError, r"bias must have shape \(2, 4\), got \(2, 5\)"),
        ({"bias": torch.zeros(2, 4).double()}, TypeError, "bias must be float32, got float64"),
        ({"precision": "bf16"}, ValueError, "precision must be one of ieee, tf32, tf32x3, got 'bf"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 3, 5),
        "weight": torch.zeros(2, 4, 5),
        "mask": torch.ones(2, 4, 5).bool(),
        "bias": torch.zeros(2, 4),
    } | change
    arguments = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with use_backend("triton"), pytest.raises(error, match=message):
        linear(**arguments)


@pytest.mark.parametrize("name", ["weight", "mask", "bias"])
def test_another_device_is_refused(name: str) -> None:
    arguments = {"x": random(2, 3, 5), "weight": random(2, 4, 5), "bias": random(2, 4)}
    arguments["mask"] = random_mask(2, 4, 5, density=1.0)
    arguments[name] = arguments[name].to("meta")
    with use_backend("triton"), pytest.raises(ValueError, match=f"{name} must be on .*, got meta"):
        linear(**arguments)


@pytest.mark.gpu
def test_the_host_is_refused() -> None:
    """A kernel would read host memory by a device's address."""
    x, weight, mask = random(1, 2, 4), random(1, 3, 4), random_mask(1, 3, 4, density=0.5)
    with pytest.raises(ValueError, match="weight must be on cuda:0, got cpu"):
        linear(x, weight.cpu(), mask)
    with use_backend("triton"), pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        linear(x.cpu(), weight.cpu(), mask.cpu())


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 64), (1000, 3), (4096, 4096)])
def test_tiles_fit_the_tensor_cores_and_the_shape(rows: int, cols: int, dtype: torch.dtype) -> None:
    tiles = gpu.choose_tiles(rows, cols, dtype, "ieee")
    for block, size in ((tiles.block_rows, rows), (tiles.block_cols, cols)):
        assert 16 <= block <= 64
        assert block & (block - 1) == 0
        assert block < max(2 * size, 17)
    assert tiles.block_depth in (16, 32, 64)


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
