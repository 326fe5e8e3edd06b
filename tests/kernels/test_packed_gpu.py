"""What only the Triton products by packed weights promise: precisions, limits, exact dots."""

import pytest
import torch
from torch import Tensor

from sparse_tickets.kernels.compile import compile_ops
from sparse_tickets.kernels.packed import PackedLayer, build_pattern, reference

pytest.importorskip("triton")

from sparse_tickets.kernels.packed import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def packed(out: int, inp: int, density: float = 0.3, tickets: int = 2, dtype=torch.float32):
    mask = random(tickets, out * inp).abs() > torch.distributions.Normal(0, 1).icdf(
        torch.tensor(1 - density / 2)
    ).to(DEVICE)
    pattern = build_pattern(mask, [(0, out, inp)])
    return random(tickets, pattern.width, dtype=dtype), pattern


def check(values, pattern, batch: int, precision: str, unit: float) -> None:
    """Forward, dX and dW of the only layer within ``unit`` and float32 sums."""
    (layer,) = pattern.layers
    tickets, dtype, where = len(values), values.dtype, (pattern.bits, pattern.start)
    x, dy = (random(tickets, batch, n, dtype=dtype) for n in (layer.inp, layer.out))
    bias = random(tickets, layer.out, dtype=dtype)
    y = gpu.forward(x, values, *where, bias, layer, precision)
    dx = gpu.dx(dy, values, *where, layer, precision)
    dw = torch.full_like(values, float("nan"))
    gpu.dw(dw, dy, x, *where, layer, precision)
    count = torch.arange(values.shape[1], device=DEVICE) < pattern.count[:, None]
    assert dw[~count].isnan().all()

    x, dy, bias, values = (t.double() for t in (x, dy, bias, values))

    def products(x: Tensor, dy: Tensor, bias: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        dw = torch.zeros_like(values)
        reference.dw(dw, dy, x, *where, layer)
        y = reference.forward(x, values, *where, bias, layer)
        return y, reference.dx(dy, values, *where, layer), dw

    sizes = products(*(t.abs() for t in (x, dy, bias, values)))
    actual = (y, dx, dw.masked_fill(~count, 0))
    terms = max(layer.inp, layer.out, batch) + 2
    for got, expected, size in zip(actual, products(x, dy, bias, values), sizes, strict=True):
        error = (got.double() - expected).abs()
        assert (error <= (unit + terms * 2.0**-24) * size).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions(precision: str) -> None:
    # tf32 keeps 10 bits of each factor; tf32x3 drops the product of two remainders, 2^-22.
    unit = {"ieee": 2.0**-24, "tf32": 2.0**-9, "tf32x3": 2.0**-20}[precision]
    check(*packed(30, 70), 20, precision, unit)


def test_several_tiles_each_way() -> None:
    check(*packed(66, 65, tickets=1), 34, "tf32x3", 2.0**-20)


def test_float16_accumulates_in_float32() -> None:
    check(*packed(20, 40, dtype=torch.float16), 17, "ieee", 2.0**-11)


@pytest.mark.gpu
def test_bfloat16() -> None:
    """On a GPU only: the interpreter corrupts bfloat16."""
    check(*packed(130, 100, dtype=torch.bfloat16), 70, "ieee", 2.0**-8)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pruned_gradients_and_their_squares_never_see_what_is_not_finite() -> None:
    mask = torch.zeros(1, 20 * 18, dtype=torch.bool, device=DEVICE)
    mask[0, ::7] = True
    pattern = build_pattern(mask, [(0, 20, 18)])
    (layer,) = pattern.layers
    dy, x = random(1, 5, 20), random(1, 5, 18)
    dy[0, 0, 3] = float("inf")
    dw, squares = random(1, pattern.width), random(1, 1)
    where = (pattern.bits, pattern.start)
    gpu.dw(dw, dy, x, *where, layer, "ieee", squares)
    expected = torch.zeros_like(dw)
    reference.dw(expected, dy, x, *where, layer)
    torch.testing.assert_close(dw, expected, equal_nan=True)
    finite = dy.nan_to_num(posinf=0.0)
    # Row 3 keeps nothing now: its gradients are not finite, and pruned.
    mask[0, 3 * 18 : 4 * 18] = False
    pattern = build_pattern(mask, [(0, 20, 18)], width=pattern.width)
    where = (pattern.bits, pattern.start)
    gpu.dw(dw, dy, x, *where, layer, "ieee", squares)
    gpu.dw(expected, finite, x, *where, layer, "ieee")
    count = int(pattern.count)
    assert torch.equal(dw[:, :count], expected[:, :count])
    torch.testing.assert_close(squares[0, 0], expected[0, :count].square().sum())


def test_only_its_own_rows_see_a_nan() -> None:
    """Tails are masked in both operands, so nothing of a neighbour leaks into a tile."""
    values, pattern = packed(19, 33, density=0.9, tickets=3)
    (layer,) = pattern.layers
    x = random(3, 17, 33)
    x[1, 5] = float("nan")
    y = gpu.forward(x, values, pattern.bits, pattern.start, None, layer, "ieee")
    poisoned = torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    poisoned[1, 5] = True
    assert y[poisoned].isnan().all()
    assert y[~poisoned].isfinite().all()


@pytest.mark.parametrize("product", ["forward", "dx", "dw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 17, 64, 4096])
def test_launches_fit_tensor_cores(product: str, dtype: torch.dtype, batch: int) -> None:
    layer = PackedLayer(0, 256, 256, 0, 0)
    for precision in ("ieee", "tf32", "tf32x3"):
        launch = gpu.choose_launch(product, batch, layer, dtype, precision)
        assert 16 <= launch.block_batch <= 128
        assert launch.block_batch & (launch.block_batch - 1) == 0
        assert launch.block_batch < max(2 * batch, 17)


def test_too_large_an_operand_is_refused() -> None:
    mask = torch.ones(1, 2**15, dtype=torch.bool)
    pattern = build_pattern(mask, [(0, 1, 2**15)])
    huge = torch.empty(1, 2**16, 2**15, device="meta")
    where = (pattern.bits, pattern.start)
    with pytest.raises(ValueError, match="x operand must span fewer than 2"):
        gpu.forward(huge, random(1, 2**15), *where, None, pattern.layers[0], "ieee")


def test_exact_products_use_no_tensor_core() -> None:
    """On Blackwell, Triton 3.6 and 3.7 turn larger IEEE float32 dots on such tiles into TF32."""
    reports = compile_ops(["packed"], [100], smoke=True)
    exact = [report for report in reports if report.dots == ("ieee",)]
    assert {report.case.split("_")[0] for report in exact} == {"forward", "dx", "dw"}
    assert not any(report.matrix for report in exact)
