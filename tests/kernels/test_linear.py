"""`linear` on every backend: the same numbers as plain torch in float64, and the same contract."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_tickets.kernels.dispatch import Plan, has_triton, use_backend
from sparse_tickets.kernels.linear import linear, plan, reference

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]

# (P, B, O, I): ones, odd sizes, several tiles, and every axis empty.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (2, 64, 64, 64),
    (2, 67, 65, 130),
    (0, 4, 3, 2),
    (2, 0, 3, 4),
    (2, 3, 0, 4),
    (2, 3, 4, 0),
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    density: float | tuple[float, ...] = 0.2,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x, weight, mask, bias``, the last row of the first ticket's weight all pruned.

    A tuple of densities gives every ticket its own.
    """
    generator = torch.Generator().manual_seed(seed)
    tickets, batch, out, inp = shape
    x = torch.randn(tickets, batch, inp, generator=generator, dtype=torch.float64)
    weight = torch.randn(tickets, out, inp, generator=generator, dtype=torch.float64)
    bias = torch.randn(tickets, out, generator=generator, dtype=torch.float64)
    threshold = torch.tensor(density).reshape(-1, 1, 1)
    mask = torch.rand(tickets, out, inp, generator=generator) < threshold
    mask[:1, -1:] = False
    weight = weight.masked_fill(~mask, 0)
    return (
        x.to(device, dtype),
        weight.to(device, dtype),
        mask.to(device),
        bias.to(device, dtype),
    )


def assert_product(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Compare a sum of products with float64, entry by entry within its own rounding bound.

    Args:
        actual: of any dtype.
        expected: the same in float64.
        magnitude: the same sum over absolute values.
        terms: number of summands.
    """
    assert actual.shape == expected.shape
    bound = (terms + 2) * torch.finfo(actual.dtype).eps * magnitude
    error = (actual.detach().cpu().double() - expected).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max():.3e}"


def check_parity(
    backend: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    density: float | tuple[float, ...] = 0.2,
    seed: int = 0,
) -> None:
    _, batch, out, inp = shape
    x, weight, mask, bias = inputs(shape, dtype, density, device_of(backend), seed)
    dy = inputs((shape[0], batch, 1, out), dtype, seed=seed + 1)[0].to(x.device)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    with use_backend(backend):
        y = linear(x, weight, mask, bias)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype,) * 4

    x, weight, bias, dy = (t.detach().cpu().double() for t in (x, weight, bias, dy))
    mask = mask.cpu()
    sizes = [t.abs() for t in (x, weight, bias, dy)]
    assert_product(
        y,
        reference.linear(x, weight, mask, bias),
        reference.linear(sizes[0], sizes[1], mask, sizes[2]),
        inp + 1,
    )
    assert_product(
        dx,
        reference.linear_dx(dy, weight, mask),
        reference.linear_dx(sizes[3], sizes[1], mask),
        out,
    )
    assert_product(
        dw,
        reference.linear_dw(dy, x, mask),
        reference.linear_dw(sizes[3], sizes[0], mask),
        batch,
    )
    assert_product(db, dy.sum(1), sizes[3].sum(1), batch)
    assert not dw.cpu()[~mask].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_product_and_gradients(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    check_parity(backend, shape, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_random_shapes(backend: str, shape: tuple[int, int, int, int], seed: int) -> None:
    check_parity(backend, shape, torch.float32, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tickets_of_different_densities(backend: str) -> None:
    """A level's tickets rarely differ so much, but each may take its own format."""
    check_parity(backend, (5, 70, 40, 50), torch.float32, density=(0.0, 0.02, 0.2, 0.6, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pruned_mask_is_noticed(backend: str) -> None:
    x, weight, mask, bias = inputs((2, 20, 40, 50), device=device_of(backend))
    dy = torch.ones(2, 20, 40, device=x.device)
    for column in range(3):
        mask[:, :, column::7] = False
        weight = weight.masked_fill(~mask, 0).requires_grad_()
        with use_backend(backend):
            y = linear(x, weight, mask, bias)
            (dw,) = torch.autograd.grad(y, weight, dy)
        torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))
        torch.testing.assert_close(dw, reference.linear_dw(dy, x, mask))


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_pruned_and_dense(backend: str, density: float) -> None:
    x, weight, mask, bias = inputs((2, 5, 6, 7), density=density, device=device_of(backend))
    weight.requires_grad_()
    with use_backend(backend):
        y = linear(x, weight, mask, bias)
        (dw,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))
    torch.testing.assert_close(dw, reference.linear_dw(torch.ones_like(y), x, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: str) -> None:
    tickets, batch, out, inp = 3, 20, 40, 50
    device = device_of(backend)
    _, weight, mask, bias = inputs((tickets, batch, out, inp), device=device)
    x = inputs((1, inp, 1, batch), device=device)[0].mT.expand(tickets, -1, -1)
    weight = weight.mT.contiguous().mT
    mask = mask.mT.contiguous().mT
    bias = torch.stack([bias, bias], 2)[..., 0]
    expected = reference.linear(x.double(), weight.double(), mask, bias.double())
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        y = linear(leaves[0], leaves[1], mask, leaves[2])
        # The gradient of a sum is an expanded scalar: every stride is zero.
        dx, dw, db = torch.autograd.grad(y.sum(), leaves)
    ones = torch.ones_like(y)
    torch.testing.assert_close(y, expected.float())
    torch.testing.assert_close(dx, reference.linear_dx(ones, weight, mask))
    torch.testing.assert_close(dw, reference.linear_dw(ones, x, mask))
    torch.testing.assert_close(db, ones.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_the_arena(backend: str) -> None:
    flat = torch.zeros(2, 40, device=device_of(backend))
    x, weight, mask, bias = inputs((2, 3, 4, 5), device=device_of(backend))
    flat[:, 3:23] = weight.flatten(1)
    flat[:, 30:34] = bias
    with use_backend(backend):
        y = linear(x, flat[:, 3:23].unflatten(1, (4, 5)), mask, flat[:, 30:34])
        expected = linear(x, weight, mask, bias)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ticket_does_not_depend_on_its_batch(backend: str) -> None:
    densities = (0.1, 0.6, 0.2, 1.0, 0.0)
    x, weight, mask, bias = inputs((5, 33, 40, 50), density=densities, device=device_of(backend))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    alone = [t[2:3].detach().requires_grad_() for t in leaves]
    with use_backend(backend):
        together_y = linear(leaves[0], leaves[1], mask, leaves[2])
        alone_y = linear(alone[0], alone[1], mask[2:3], alone[2])
        together = torch.autograd.grad(together_y.square().sum(), leaves)
        single = torch.autograd.grad(alone_y.square().sum(), alone)
    assert torch.equal(together_y[2:3], alone_y)
    for whole, part in zip(together, single, strict=True):
        assert torch.equal(whole[2:3], part)


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_numerically(bias: bool) -> None:
    x, weight, mask, offset = inputs((2, 3, 4, 5), torch.float64)
    leaves = [x, weight, offset] if bias else [x, weight]
    for tensor in leaves:
        tensor.requires_grad_()

    def function(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        # The differences step off the mask, where the weight must stay zero.
        return linear(x, weight * mask, mask, offset)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward(backend: str, dtype: torch.dtype) -> None:
    """Hessian-vector products of a layer under a non-linearity agree with dense torch."""

    def second(on_mask: bool) -> list[Tensor]:
        x, weight, mask, bias = inputs((2, 20, 40, 50), dtype, device=device_of(backend))
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        if on_mask:
            y = linear(x, weight, mask, bias)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), x, (weight * mask).mT)
        first = torch.autograd.grad(y.tanh().square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    with use_backend(backend):
        actual, expected = second(on_mask=True), second(on_mask=False)
    for left, right in zip(actual, expected, strict=True):
        scale = right.abs().max()
        assert ((left - right).abs().max() <= 1000 * torch.finfo(dtype).eps * scale).item()


@pytest.mark.long
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_once(backend: str, masked: bool) -> None:
    x, weight, mask, bias = inputs((2, 6, 5, 7), device=device_of(backend))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, mask if masked else None, bias).tanh().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    with use_backend(backend):
        for _ in range(3):
            expected = torch.autograd.grad(loss(x, weight, mask, bias), leaves)
            actual = torch.autograd.grad(compiled(x, weight, mask, bias), leaves)
            for left, right in zip(actual, expected, strict=True):
                torch.testing.assert_close(left, right)
            mask[:, :, 0] = False
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, masked: bool) -> None:
    x, weight, mask, bias = inputs((2, 6, 5, 7), device=device_of(backend))
    x = x.half()  # As the previous layer left it.
    weight.requires_grad_()
    bias.requires_grad_()
    with use_backend(backend), torch.autocast(x.device.type, torch.float16):
        y = linear(x, weight, mask if masked else None, bias)
        loss = y.float().sum()
    assert y.dtype == torch.float16
    expected = reference.linear(x.double(), weight.double(), mask, bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    with use_backend(backend):
        dw, db = torch.autograd.grad(loss, (weight, bias))
    assert dw.dtype == db.dtype == torch.float32
    assert masked is not bool(dw[~mask].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_under_autocast_is_of_the_forward_pass(backend: str) -> None:
    """In its dtype, and twice."""
    x, weight, mask, bias = inputs((2, 6, 5, 7), device=device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def differentiate(cast: bool) -> list[torch.Tensor]:
        with use_backend(backend):
            loss = linear(x, weight, mask, bias).square().sum()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    for plain, cast in zip(differentiate(False), differentiate(True), strict=True):
        assert torch.equal(plain, cast)


def test_autocast_leaves_float64_alone() -> None:
    x, weight, mask, bias = inputs((1, 2, 3, 4), torch.float64)
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, mask, bias).dtype == torch.float64


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_adds_tickets(axis: int) -> None:
    x, weight, mask, bias = inputs((6, 3, 4, 5))
    weight, mask = (t.unflatten(0, (2, 3)).movedim(0, axis) for t in (weight, mask))
    x, bias = x[:3], bias[:3]
    with use_backend("reference"):
        actual = torch.vmap(linear, in_dims=(None, axis, axis, None))(x, weight, mask, bias)
        expected = [linear(x, weight.select(axis, i), mask.select(axis, i), bias) for i in range(2)]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_raises(grad: bool) -> None:
    x, weight, mask, bias = inputs((1, 2, 3, 4))
    with (
        use_backend("reference"),
        torch.set_grad_enabled(grad),
        torch.autograd.forward_ad.dual_level(),
    ):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear(dual, weight, mask, bias)


@pytest.mark.parametrize("changed", ["mask", "weight", "x"])
def test_changing_an_input_before_backward_raises(changed: str) -> None:
    x, weight, mask, bias = inputs((1, 2, 3, 4))
    leaf = torch.zeros_like(weight).requires_grad_()
    x_leaf = torch.zeros_like(x).requires_grad_()
    with use_backend("reference"):
        y = linear(x + x_leaf, weight + leaf, mask, bias)
        named = {
            "mask": mask,
            "weight": y.grad_fn.saved_tensors[1],
            "x": y.grad_fn.saved_tensors[0],
        }
        named[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_functional_gradients_raise() -> None:
    x, weight, mask, bias = inputs((1, 2, 3, 4))
    with use_backend("reference"), pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda weight: linear(x, weight, mask, bias).sum())(weight)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            return linear(x, weight, mask, bias)

    arguments = inputs((2, 3, 4, 5))
    with use_backend("reference"):
        exported = torch.export.export(Layer(), arguments)
        torch.testing.assert_close(exported.module()(*arguments), linear(*arguments))


def test_unmasked_is_torch_itself() -> None:
    x, weight, _, bias = inputs((2, 3, 4, 5))
    weight.requires_grad_()
    assert linear(x, weight, None, bias).grad_fn.name() == "BaddbmmBackward0"
    assert linear(x, weight).grad_fn.name() == "BmmBackward0"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must have shape \(P, B, I\), got \(2, 3\)"),
        ({"weight": torch.zeros(4, 5)}, ValueError, r"weight must have shape \(2, O, 5\)"),
        ({"weight": torch.zeros(2, 4, 6)}, ValueError, r"weight must have shape \(2, O, 5\)"),
        ({"weight": torch.zeros(1, 4, 5)}, ValueError, r"weight must have shape \(2, O, 5\)"),
        ({"weight": torch.zeros(2, 4, 5).half()}, TypeError, "weight must be float32, got float16"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int32)}, TypeError, "x must be float32 or"),
        ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(2, 5, 4) > 0}, ValueError, r"mask must have shape \(2, 4, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(2, 4\), got \(4,\)"),
        ({"bias": torch.zeros(2, 4).double()}, TypeError, "bias must be float32, got float64"),
        ({"bias": torch.zeros(2, 4, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        (
            {"precision": "fp8"},
            ValueError,
            "precision must be one of ieee, tf32, tf32x3, got 'fp8'",
        ),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    names = ("x", "weight", "mask", "bias")
    arguments = dict(zip(names, inputs((2, 3, 4, 5)), strict=True)) | change
    with pytest.raises(error, match=message):
        linear(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan(backend: str) -> None:
    device = torch.device(device_of(backend))
    with use_backend(backend):
        single = plan(256, 256, 64, 0.1, torch.float32, device)
        half = plan(256, 256, 64, 0.1, torch.float16, device)
    assert isinstance(single, Plan)
    assert single.op == "linear"
    assert single.backend == backend
    assert half.backend == ("reference" if backend == "cpu" else backend)
    assert half.format == "dense+mask"


def test_plan_refuses_an_impossible_density() -> None:
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.2"):
        plan(4, 4, 4, 1.2, torch.float32, torch.device("cpu"))
