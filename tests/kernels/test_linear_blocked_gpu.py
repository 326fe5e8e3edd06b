"""Blocked masks in Triton: the contract of `linear`, on the kept blocks alone."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.linear import (
    BlockPattern,
    block_pattern,
    blocks,
    linear,
    linear_blocked,
    plan,
    plan_for,
    reference,
)

pytest.importorskip("triton")

from sparse_tickets.kernels.linear import blocked_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def inputs(
    shape: tuple[int, int, int, int],
    block: int,
    dtype: torch.dtype = torch.float32,
    density: float = 0.4,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x, weight, mask, bias, dy``; the shape's O and I count blocks.

    The first ticket loses its last row of blocks, the last one its first column.
    """
    generator = torch.Generator().manual_seed(seed)
    tickets, batch, rows, columns = shape
    kept = torch.rand(tickets, rows, columns, generator=generator) < density
    if density < 1:
        kept[:1, -1:], kept[-1:, :, :1] = False, False
    mask = kept.repeat_interleave(block, 1).repeat_interleave(block, 2)
    out, inp = rows * block, columns * block
    shapes = ((tickets, batch, inp), (tickets, out, inp), (tickets, out), (tickets, batch, out))
    x, weight, bias, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes
    )
    mask = mask.to(DEVICE)
    return x, weight.masked_fill(~mask, 0), mask, bias, dy


def assert_product(actual: Tensor, expected: Tensor, size: Tensor, terms: int, unit: float) -> None:
    """Every entry within its own rounding bound, ``size`` being the sum of absolute values."""
    assert actual.shape == expected.shape
    bound = (unit + torch.finfo(actual.dtype).eps + (terms + 2) * 2.0**-24) * size
    assert ((actual.double() - expected).abs() <= bound).all()


def check_parity(
    shape: tuple[int, int, int, int],
    block: int,
    dtype: torch.dtype = torch.float32,
    density: float = 0.4,
    precision: str = "ieee",
    seed: int = 0,
) -> None:
    x, weight, mask, bias, dy = inputs(shape, block, dtype, density, seed)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    pattern = block_pattern(mask, block)
    y = linear_blocked(x, weight, pattern, bias, precision=precision)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    assert {t.dtype for t in (y, dx, dw, db)} == {dtype}
    x, weight, bias, dy = (t.detach().double() for t in (x, weight, bias, dy))
    # tf32 keeps 10 bits of each factor; tf32x3 drops the product of two remainders, 2^-22.
    unit = {"ieee": 0.0, "tf32": 2.0**-9, "tf32x3": 2.0**-20}[precision]
    for actual, function, operands, terms in (
        (y, reference.linear, (x, weight, mask, bias), x.shape[2] + 1),
        (dx, reference.linear_dx, (dy, weight, mask), dy.shape[2]),
        (dw, reference.linear_dw, (dy, x, mask), x.shape[1]),
    ):
        sizes = [t if t.dtype == torch.bool else t.abs() for t in operands]
        assert_product(actual, function(*operands), function(*sizes), terms, unit)
    assert not dw[~mask].any()


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 2), (3, 17, 1, 5)], ids=str)
def test_product_and_gradients(shape: tuple[int, int, int, int], block: int) -> None:
    check_parity(shape, block)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float64, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "tf32x3"),
        (torch.float16, "ieee"),
        pytest.param(torch.bfloat16, "ieee", marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [16, 64])
def test_precisions(block: int, dtype: torch.dtype, precision: str) -> None:
    check_parity((2, 19, 2, 3), block, dtype, precision=precision)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_random_shapes_and_masks(
    shape: tuple[int, int, int, int], density: float, seed: int
) -> None:
    check_parity(shape, 16, density=density, seed=seed)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2), (2, 3, 2, 0)], ids=str)
def test_empty_axes(shape: tuple[int, int, int, int]) -> None:
    check_parity(shape, 16)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_pruned_and_dense(density: float) -> None:
    check_parity((2, 9, 3, 5), 16, density=density)


def test_many_blocks_in_a_row() -> None:
    """More than one group of the gradient's program, and several steps of the pipeline."""
    check_parity((2, 3, 2, 13), 16, density=0.6)


def test_double_backward() -> None:
    def second(on_mask: bool) -> list[Tensor]:
        x, weight, mask, bias, _ = inputs((2, 7, 2, 3), 16, torch.float64)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        if on_mask:
            y = linear_blocked(x, weight, block_pattern(mask, 16), bias)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), x, (weight * mask).mT)
        first = torch.autograd.grad(y.tanh().square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for left, right in zip(second(True), second(False), strict=True):
        scale = right.abs().max()
        assert ((left - right).abs().max() <= 1000 * torch.finfo(torch.float64).eps * scale).item()


def test_forward_mode_raises() -> None:
    x, weight, mask, bias, _ = inputs((1, 2, 1, 1), 16)
    pattern = block_pattern(mask, 16)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear_blocked(dual, weight, pattern, bias)


def test_strided_and_expanded_inputs() -> None:
    x, weight, mask, bias, _ = inputs((3, 5, 2, 3), 16)
    x = x[:1].mT.contiguous().mT.expand(3, -1, -1)
    weight = weight.mT.contiguous().mT
    bias = torch.stack([bias, bias], 2)[..., 0]
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = linear_blocked(leaves[0], leaves[1], block_pattern(mask, 16), leaves[2])
    # The gradient of a sum is an expanded scalar: every stride is zero.
    dx, dw, _ = torch.autograd.grad(y.sum(), leaves)
    ones = torch.ones_like(y)
    torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))
    torch.testing.assert_close(dx, reference.linear_dx(ones, weight, mask))
    torch.testing.assert_close(dw, reference.linear_dw(ones, x, mask))


def test_a_ticket_does_not_depend_on_its_batch() -> None:
    x, weight, mask, bias, dy = inputs((3, 9, 2, 5), 16)
    whole = [t.requires_grad_() for t in (x, weight, bias)]
    alone = [t[1:2].detach().requires_grad_() for t in whole]
    together_y = linear_blocked(whole[0], whole[1], block_pattern(mask, 16), whole[2])
    alone_y = linear_blocked(alone[0], alone[1], block_pattern(mask[1:2], 16), alone[2])
    assert torch.equal(together_y[1:2], alone_y)
    together = torch.autograd.grad(together_y, whole, dy)
    single = torch.autograd.grad(alone_y, alone, dy[1:2])
    for left, right in zip(together, single, strict=True):
        assert torch.equal(left[1:2], right)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pruned_blocks_see_nothing() -> None:
    """What lies there, in the weight or in the features it would meet, is neither read nor used."""
    x, weight, mask, bias, dy = inputs((2, 5, 3, 3), 16)
    expected = linear(x, weight, mask, bias)
    weight = weight.masked_fill(~mask, float("nan"))
    x[-1, :, :16] = float("inf")  # The last ticket's first column of blocks is pruned.
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = linear_blocked(*leaves, block_pattern(mask, 16), bias)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(y, expected)
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert not dw[~mask].any()


def test_compiles_to_one_graph() -> None:
    x, weight, mask, bias, _ = inputs((2, 3, 2, 2), 16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    pattern = block_pattern(mask, 16)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, pattern: BlockPattern) -> Tensor:
        return linear_blocked(x, weight, pattern, bias).tanh().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves, pattern), leaves)
    actual = torch.autograd.grad(compiled(*leaves, pattern), leaves)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_adds_tickets(axis: int) -> None:
    x, weight, mask, bias, _ = inputs((2, 3, 2, 2), 16)
    patterns = block_pattern(mask, 16)
    x = torch.stack([x, 2 * x], axis)

    def one(x: Tensor) -> Tensor:
        return linear_blocked(x, weight, patterns, bias)

    actual = torch.vmap(one, in_dims=axis)(x)
    torch.testing.assert_close(actual, torch.stack([one(x.select(axis, i)) for i in range(2)]))


class TestPattern:
    def test_lists(self) -> None:
        kept = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]]).bool()
        mask = kept.repeat_interleave(16, 1).repeat_interleave(16, 2)
        table = block_pattern(mask, 16).table
        assert table.tolist() == [
            [[2, 0, 2, 1], [0, 0, 1, 2], [1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]],
            [[3, 0, 1, 2], [1, 1, 0, 2], [1, 0, 1, 0], [2, 0, 1, 0], [1, 0, 1, 0]],
        ]

    def test_one_ticket_may_come_without_its_axis(self) -> None:
        mask = torch.ones(32, 48, dtype=torch.bool)
        assert torch.equal(block_pattern(mask, 16).table, block_pattern(mask[None], 16).table)

    def test_a_block_of_one_size_is_blocks_of_a_smaller_one(self) -> None:
        mask = inputs((2, 1, 2, 3), 32)[2]
        for block in (16, 32):
            assert (block_pattern(mask, block).table[:, :, 0].sum(1) * block**2 / 2).tolist() == (
                mask.sum((1, 2)).tolist()
            )

    @pytest.mark.parametrize(
        ("mask", "block", "error", "message"),
        [
            (torch.ones(1, 16, 16).bool(), 8, ValueError, "block must be one of 16, 32, 64, got 8"),
            (torch.ones(16).bool(), 16, ValueError, r"mask must have shape \(P, O, I\) or"),
            (torch.ones(1, 16, 16), 16, TypeError, "mask must be bool, got float32"),
            (torch.ones(1, 16, 24).bool(), 16, ValueError, "multiples of block=16 wide, got 16 x"),
            (
                torch.arange(2 * 32 * 32).view(2, 32, 32) < 2 * 32 * 32 - 1,
                16,
                ValueError,
                "got a mixed one at row 16, column 16 of ticket 1",
            ),
        ],
    )
    def test_errors(self, mask: Tensor, block: int, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            block_pattern(mask, block)

    def test_an_inference_mask_is_not_remembered(self) -> None:
        x, weight, mask, bias, _ = inputs((1, 2, 2, 2), 16)
        with torch.inference_mode():
            mask = mask.clone()
            before = len(blocks._known)
            y = linear_blocked(x, weight, block_pattern(mask, 16), bias)
            assert len(blocks._known) == before
            torch.testing.assert_close(y, linear(x, weight, mask, bias))


class TestLinear:
    """`linear` itself, on a mask that `block_pattern` was asked for."""

    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the blocked products that ran."""
        ran = []

        def watch(name: str) -> None:
            product = getattr(blocked_gpu, name)
            monkeypatch.setattr(
                blocked_gpu, name, lambda *arguments: ran.append(name) or product(*arguments)
            )

        for name in ("forward", "dx", "dw"):
            watch(name)
        return ran

    def test_runs_blocked_once_asked(self, ran: list[str]) -> None:
        x, weight, mask, bias, dy = inputs((2, 5, 2, 2), 16)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        before = torch.autograd.grad(linear(x, weight, mask, bias), leaves, dy)
        assert ran == []
        block_pattern(mask, 16)
        after = torch.autograd.grad(linear(x, weight, mask, bias), leaves, dy)
        assert sorted(ran) == ["dw", "dx", "forward"]
        for left, right in zip(after, before, strict=True):
            torch.testing.assert_close(left, right)

    def test_views_are_known_by_what_they_show(self, ran: list[str]) -> None:
        """As layers of an arena, or as the one ticket of a layer."""
        x, weight, mask, _, _ = inputs((2, 3, 1, 2), 16)
        flat = torch.zeros(2, 700, dtype=torch.bool, device=DEVICE)
        flat[:, 100:612] = mask.flatten(1)
        block_pattern(flat[:, 100:612].unflatten(1, (16, 32)), 16)
        linear(x, weight, flat[:, 100:612].unflatten(1, (16, 32)))
        assert ran == ["forward"]
        linear(x, weight, flat[:, 50:562].unflatten(1, (16, 32)))
        assert ran == ["forward"]
        layer = mask[0].clone()
        block_pattern(layer, 16)
        linear(x[:1], weight[:1], layer[None])
        assert ran == ["forward"] * 2

    def test_a_written_mask_is_looked_at_again(self, ran: list[str]) -> None:
        x, weight, mask, bias, _ = inputs((2, 5, 2, 2), 16, density=1.0)
        stale = block_pattern(mask, 16)
        mask[:, 16:, :16] = False
        weight = weight.masked_fill(~mask, 0)
        y = linear(x, weight, mask, bias)
        torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))
        assert ran == ["forward"]
        with pytest.raises(ValueError, match="pattern must be of the present mask, got version"):
            linear_blocked(x, weight, stale, bias)
        mask[0, 0, 0] = False
        linear(x, weight.masked_fill(~mask, 0), mask, bias)
        assert ran == ["forward"]
        mask[0, 0, 0] = True
        linear(x, weight, mask, bias)
        assert ran == ["forward"] * 2

    def test_asks_the_device_once_per_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight, mask, bias, _ = inputs((2, 5, 2, 2), 16)
        block_pattern(mask, 16)
        builds = []
        build = blocks._build
        monkeypatch.setattr(blocks, "_build", lambda *a: builds.append(a) or build(*a))
        for _ in range(3):
            linear(x, weight, mask, bias)
        assert builds == []
        mask[:, :16, :16] = False
        for _ in range(3):
            linear(x, weight.masked_fill(~mask, 0), mask, bias)
        assert len(builds) == 1

    @pytest.mark.long
    def test_a_mask_that_went_away_is_forgotten(self) -> None:
        mask = inputs((1, 1, 2, 2), 16)[2]
        gc.collect()
        before = len(blocks._known)
        pattern = block_pattern(mask, 16)
        assert len(blocks._known) == before + 1
        del mask, pattern
        gc.collect()
        assert len(blocks._known) == before

    def test_changing_the_mask_before_backward_raises(self) -> None:
        x, weight, mask, bias, _ = inputs((1, 2, 2, 2), 16)
        y = linear_blocked(x, weight.requires_grad_(), block_pattern(mask, 16), bias)
        mask.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_the_plan_says_so(self) -> None:
        mask = inputs((1, 1, 2, 2), 32)[2][0]
        assert plan_for(mask, 8, torch.float32).format == "dense+mask"
        block_pattern(mask, 32)
        chosen = plan_for(mask, 8, torch.float32)
        assert (chosen.backend, chosen.format) == ("triton", "blocked-32")
        assert plan(64, 64, 8, 0.5, torch.float32, DEVICE, block=32) == chosen
        with pytest.raises(ValueError, match="block must be 0 or one of"):
            plan(64, 64, 8, 0.5, torch.float32, DEVICE, block=8)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it() -> None:
    """Nothing asks the device: forward and backward go into a graph and see later weights."""
    x, weight, mask, bias, dy = inputs((2, 33, 2, 3), 32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    block_pattern(mask, 32)

    def step() -> tuple[Tensor, ...]:
        y = linear(x, weight, mask, bias)
        return y, *torch.autograd.grad(y, leaves, dy)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        weight.mul_(2.0)
    graph.replay()
    for left, right in zip(captured, step(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_take_the_pattern_too(backend: str) -> None:
    if DEVICE == "cuda" and backend == "cpu":
        pytest.skip("the CPU backend needs CPU tensors")
    x, weight, mask, bias, _ = inputs((2, 5, 2, 2), 16)
    with use_backend(backend):
        y = linear_blocked(x, weight, block_pattern(mask, 16), bias)
    torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))


def test_errors() -> None:
    x, weight, mask, bias, _ = inputs((2, 5, 2, 2), 16)
    pattern = block_pattern(mask, 16)
    with pytest.raises(TypeError, match="pattern must be a BlockPattern, got Tensor"):
        linear_blocked(x, weight, mask, bias)
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 32, 32\)"):
        linear_blocked(x[:1], weight[:1], pattern)
    with pytest.raises(ValueError, match="precision must be one of"):
        linear_blocked(x, weight, pattern, bias, precision="fp8")


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 80, 4096])
def test_tiles_fit(size: int, dtype: torch.dtype, block: int) -> None:
    product = blocked_gpu.choose_product_tiles(size, block, dtype, "ieee")
    gradient = blocked_gpu.choose_gradient_tiles(max(size, block), block, dtype, "ieee")
    assert 16 <= product.block_rows < max(2 * size, 17)
    assert gradient.block_cols % block == 0
    for tiles in (product, gradient):
        assert tiles.block_depth in (16, 32, 64)
        assert tiles.stages >= 3
