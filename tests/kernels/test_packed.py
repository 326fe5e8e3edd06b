"""Packed weights on every backend: where they lie, what they multiply to, and their contract."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.dispatch import Plan, has_triton, use_backend
from sparse_tickets.kernels.packed import (
    PackedPattern,
    build_pattern,
    cost,
    linear_packed,
    pack,
    plan,
    reference,
    unpack,
    write_gradient_,
)
from sparse_tickets.kernels.update import adam_

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]

DRAWN_LAYERS = {
    "sizes": st.lists(st.integers(1, 40), min_size=2, max_size=3),
    "density": st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.0]), max_size=2).map(tuple),
}

# Layers as (out, inp): one weight, odd sizes, whole tiles, several tiles both ways.
NETS = [((1, 1),), ((7, 9), (2, 7)), ((64, 32),), ((70, 20), (3, 70), (17, 3))]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def layers_of(net: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int]]:
    layers, offset = [], 0
    for out, inp in net:
        layers.append((offset, out, inp))
        offset += out * inp
    return layers


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def population(
    net: tuple[tuple[int, int], ...],
    density: tuple[float, ...] = (0.2, 1.0, 0.0),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    width: int | None = None,
) -> tuple[Tensor, Tensor, PackedPattern]:
    """Dense weights, zero off the mask, the mask and its pattern; one ticket per density."""
    layers = layers_of(net)
    size = sum(out * inp for out, inp in net)
    generator = torch.Generator().manual_seed(size)
    threshold = torch.tensor(density).reshape(-1, 1)
    mask = torch.rand(len(density), size, generator=generator) < threshold
    dense = draw(len(density), size, dtype=dtype).masked_fill(~mask, 0)
    mask, dense = mask.to(device), dense.to(device)
    return dense, mask, build_pattern(mask, layers, width=width)


def weights_of(dense: Tensor, pattern: PackedPattern, layer: int) -> Tensor:
    place = pattern.layers[layer]
    flat = dense[:, place.offset : place.offset + place.out * place.inp]
    return flat.unflatten(1, (place.out, place.inp))


# The pattern.


def test_tiles_bits_and_starts_by_hand() -> None:
    """A 2 x 65 layer takes two tiles of 16 x 64."""
    mask = torch.zeros(1, 2 * 65, dtype=torch.bool)
    mask[0, [0, 63, 65 + 64]] = True  # (0, 0), (0, 63), (1, 64)
    pattern = build_pattern(mask, [(0, 2, 65)])
    (layer,) = pattern.layers
    assert (layer.tile_out, layer.tile_in, layer.tiles_out, layer.tiles_in) == (16, 64, 1, 2)
    assert pattern.bits.shape == (1, 2 * 16 * 64 // 32)
    bits = pattern.bits[0].tolist()
    # Tile 0: row 0 is words 0 and 1. Tile 1 begins at word 32; column 64 is its first, row 1.
    assert (bits[0], bits[1], bits[32 + 2]) == (1, -(2**31), 1)
    assert sum(word != 0 for word in bits) == 3
    assert pattern.start.tolist() == [[0, 2, 3]]
    assert pattern.count.tolist() == [3]
    assert (pattern.width, pattern.size, pattern.tickets) == (3, 130, 1)
    assert pack(torch.arange(130.0)[None], pattern).tolist() == [[0, 63, 129]]


@pytest.mark.parametrize(
    ("size", "side"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (999, 64)]
)
def test_tile_sides(size: int, side: int) -> None:
    pattern = build_pattern(torch.ones(1, size, dtype=torch.bool), [(0, size, 1)])
    assert pattern.layers[0].tile_out == side
    assert pattern.layers[0].tile_in == 16


def test_pattern_of_an_arena() -> None:
    arena = Arena.build((4, 64, 64, 2), (4, 64, 1))
    mask = torch.rand(2, arena.prunable) < 0.3
    pattern = build_pattern(mask, arena.prunable_layers())
    assert [(p.offset, p.out, p.inp) for p in pattern.layers] == arena.prunable_layers()
    weight = torch.randn(2, arena.size)
    masked = weight[:, : arena.prunable].masked_fill(~mask, 0)
    assert torch.equal(unpack(pack(weight, pattern), pattern), masked)


def test_pattern_is_a_snapshot() -> None:
    dense, mask, pattern = population(((7, 9),))
    before = unpack(pack(dense, pattern), pattern)
    mask.zero_()
    assert torch.equal(unpack(pack(dense, pattern), pattern), before)


def test_a_width_given_needs_no_device() -> None:
    """Nothing asks for the counts' values; on a GPU that would wait for them."""
    dense, mask, _ = population(((7, 9),), (0.2, 0.3))
    pattern = build_pattern(mask, [(0, 7, 9)], width=40)
    values = pack(dense, pattern)
    assert values.shape == (2, 40)
    for ticket, count in enumerate(pattern.count.tolist()):
        assert not values[ticket, count:].any()
    assert torch.equal(unpack(values, pattern), dense)


@pytest.mark.parametrize(
    ("mask", "layers", "width", "error", "message"),
    [
        (torch.zeros(2, 6), [(0, 2, 3)], None, TypeError, "mask must be bool"),
        (torch.zeros(6, dtype=torch.bool), [(0, 2, 3)], None, ValueError, r"shape \(P, N\)"),
        (torch.zeros(2, 7, dtype=torch.bool), [(0, 2, 3)], None, ValueError, "cover the mask's 7"),
        (torch.zeros(2, 6, dtype=torch.bool), [(1, 2, 3)], None, ValueError, "one after the other"),
        (torch.zeros(2, 0, dtype=torch.bool), [(0, 0, 3)], None, ValueError, "at least one output"),
        (torch.zeros(2, 6, dtype=torch.bool), [(0, 2, 3)], -1, ValueError, "must be in .*, got -1"),
        (torch.ones(2, 6, dtype=torch.bool), [(0, 2, 3)], 5, ValueError, "count 6, got 5"),
        (
            torch.zeros(1, 1, dtype=torch.bool).expand(1, 2**31),
            [(0, 2**16, 2**15)],
            1,
            ValueError,
            "fewer than 2",
        ),
    ],
)
def test_bad_patterns(mask, layers, width, error, message) -> None:
    with pytest.raises(error, match=message):
        build_pattern(mask, layers, width=width)


# Packing and unpacking.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_and_unpack(backend: str, net, dtype: torch.dtype) -> None:
    dense, mask, pattern = population(net, dtype=dtype, device=device_of(backend))
    junk = torch.where(mask, dense, float("nan"))
    with use_backend(backend):
        values = pack(junk, pattern)
        assert torch.equal(unpack(values, pattern), dense)
    expected = reference.pack(dense, pattern.bits, pattern.start, pattern.layers, pattern.width)
    assert torch.equal(values, expected)
    # Every value that is there is there once, and nothing else is.
    for ticket in range(len(dense)):
        kept = dense[ticket][mask[ticket]]
        count = len(kept)
        assert torch.equal(values[ticket, :count].sort().values, kept.sort().values)
        assert not values[ticket, count:].any()


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    out=st.integers(1, 80),
    inp=st.integers(1, 80),
    density=st.floats(0, 1),
    tickets=st.integers(0, 3),
)
def test_any_layer_packs(out: int, inp: int, density: float, tickets: int) -> None:
    dense, _, pattern = population(((out, inp),), (density,) * tickets)
    with use_backend("reference"):
        values = pack(dense, pattern)
        assert torch.equal(unpack(values, pattern), dense)
    assert torch.equal(
        values, reference.pack(dense, pattern.bits, pattern.start, pattern.layers, pattern.width)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_reads_rows_of_the_arena(backend: str) -> None:
    """Rows longer than N, and any strides."""
    dense, _, pattern = population(((7, 9), (2, 7)), device=device_of(backend))
    wide = torch.cat([dense, dense.new_full((3, 4), float("nan"))], 1)
    with use_backend(backend):
        expected = pack(dense, pattern)
        assert torch.equal(pack(wide, pattern), expected)
        assert torch.equal(pack(dense.mT.contiguous().mT, pattern), expected)
        strided = expected.repeat_interleave(2, 1)[:, ::2]
        assert torch.equal(unpack(strided, pattern), dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_and_unpacking_are_transposes(backend: str) -> None:
    dense, _, pattern = population(((7, 9), (2, 7)), device=device_of(backend))
    values = torch.randn(3, pattern.width, device=dense.device, requires_grad=True)
    wide = torch.randn(3, pattern.size + 2, device=dense.device, requires_grad=True)
    with use_backend(backend):
        (dvalues,) = torch.autograd.grad(unpack(values, pattern), values, dense)
        (dwide,) = torch.autograd.grad(pack(wide, pattern), wide, values)
        assert torch.equal(dvalues, pack(dense, pattern))
        assert torch.equal(dwide[:, : pattern.size], unpack(values, pattern))
    assert not dwide[:, pattern.size :].any()


# Products.


def check_products(
    backend: str,
    net: tuple[tuple[int, int], ...],
    batch: int,
    dtype: torch.dtype = torch.float32,
    density: tuple[float, ...] = (0.2, 1.0, 0.0),
    precision: str = "ieee",
) -> None:
    """Forward, dX, dvalues and db against float64 within their own rounding."""
    dense, mask, pattern = population(net, density, dtype, device_of(backend))
    unit = torch.finfo(dtype).eps + {"tf32": 2.0**-9, "tf32x3": 2.0**-20}.get(precision, 0)
    for layer, place in enumerate(pattern.layers):
        x = draw(len(density), batch, place.inp, dtype=dtype).to(dense.device)
        dy = draw(len(density), batch, place.out, dtype=dtype, seed=1).to(dense.device)
        bias = draw(len(density), place.out, dtype=dtype, seed=2).to(dense.device)
        with use_backend(backend):
            values = pack(dense, pattern).requires_grad_()
            x.requires_grad_(), bias.requires_grad_()
            y = linear_packed(x, values, pattern, layer, bias, precision=precision)
            dx, dvalues, db = torch.autograd.grad(y, (x, values, bias), dy)
            plain = linear_packed(x, values, pattern, layer, precision=precision)
        assert y.dtype == dx.dtype == dvalues.dtype == dtype

        x, dy, bias, dense64 = (t.detach().cpu().double() for t in (x, dy, bias, dense))
        weight = weights_of(dense64, pattern, layer)
        support = weights_of(mask.cpu(), pattern, layer)

        def assert_product(actual: Tensor, expected: Tensor, size: Tensor, terms: int) -> None:
            bound = (terms + 2) * unit * size
            assert ((actual.detach().cpu().double() - expected).abs() <= bound).all()

        product, size = x @ weight.mT, x.abs() @ weight.abs().mT
        shift = bias[:, None]
        assert_product(y, product + shift, size + shift.abs(), place.inp + 1)
        assert_product(plain, product, size, place.inp)
        assert_product(dx, dy @ weight, dy.abs() @ weight.abs(), place.out)
        torch.testing.assert_close(db.cpu().double(), dy.sum(1), atol=50 * unit, rtol=50 * unit)
        gradient = torch.zeros_like(dense64)
        weights_of(gradient, pattern, layer).copy_((dy.mT @ x).masked_fill(~support, 0))
        largest = torch.zeros_like(dense64)
        weights_of(largest, pattern, layer).copy_(dy.abs().mT @ x.abs())
        with use_backend("reference"):
            cpu = replace(pattern, bits=pattern.bits.cpu(), start=pattern.start.cpu())
            expected, size = pack(gradient, cpu), pack(largest, cpu)
        # Zero outside the layer and beyond the count, exactly.
        assert_product(dvalues, expected, size, batch)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products(backend: str, net) -> None:
    check_products(backend, net, batch=5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(**DRAWN_LAYERS, batch=st.integers(0, 20))
def test_products_of_any_layers(backend: str, sizes, density, batch: int) -> None:
    check_products(backend, tuple(zip(sizes[1:], sizes, strict=False)), batch, density=density)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_products_of_other_dtypes(dtype: torch.dtype) -> None:
    check_products("reference", ((7, 9), (2, 7)), batch=5, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tickets", "batch"), [(0, 4), (2, 0), (2, 1)])
def test_empty_and_single_batches(backend: str, tickets: int, batch: int) -> None:
    check_products(backend, ((7, 9),), batch, density=(0.3,) * tickets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_left(backend: str) -> None:
    """A population without a single weight: k is 0."""
    check_products(backend, ((7, 9),), 3, density=(0.0, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: str) -> None:
    dense, _, pattern = population(((7, 9),), (0.3, 0.5), device=device_of(backend))
    x, dy = draw(9, 5, seed=3).to(dense.device), draw(2, 7, 5).to(dense.device)
    shared = x.mT.expand(2, 5, 9)
    with use_backend(backend):
        values = pack(dense, pattern).repeat_interleave(2, 1)[:, ::2].requires_grad_()
        bias = draw(7).to(dense.device).expand(2, 7)
        results = []
        for strided in (True, False):
            xs, b, g = shared, bias, dy.mT
            if not strided:
                xs, b, g = (t.contiguous() for t in (xs, b, g))
            xs = xs.requires_grad_() if not xs.requires_grad else xs
            y = linear_packed(xs, values, pattern, 0, b)
            results.append((y, *torch.autograd.grad(y, (xs, values), g)))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ticket_does_not_depend_on_the_others(backend: str) -> None:
    dense, mask, pattern = population(((17, 20),), (0.2, 0.9, 0.5), device=device_of(backend))
    x = draw(3, 6, 20).to(dense.device)
    alone = build_pattern(mask[1:2], layers_of(((17, 20),)))
    with use_backend(backend):
        y = linear_packed(x, pack(dense, pattern), pattern, 0)
        single = linear_packed(x[1:2], pack(dense[1:2], alone), alone, 0)
    # To the bit in our kernels; torch's product picks another code for another number of tickets.
    exact = 0.0 if backend == "triton" else 1e-5
    torch.testing.assert_close(y[1:2], single, atol=exact, rtol=exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward(backend: str) -> None:
    dense, _, pattern = population(((5, 6), (3, 5)), (0.4, 0.8), device=device_of(backend))
    x = draw(2, 4, 6).to(dense.device).requires_grad_()
    bias = draw(2, 5).to(dense.device).requires_grad_()

    def second(packed: bool) -> list[Tensor]:
        values = pack(dense, pattern).detach().requires_grad_()
        leaves = [x, values, bias]
        if packed:
            h = linear_packed(x, values, pattern, 0, bias).tanh()
            y = linear_packed(h, values, pattern, 1)
        else:
            flat = unpack(values, pattern)
            h = torch.baddbmm(bias[:, None], x, weights_of(flat, pattern, 0).mT).tanh()
            y = h @ weights_of(flat, pattern, 1).mT
        first = torch.autograd.grad(y.tanh().square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    with use_backend(backend):
        for left, right in zip(second(True), second(False), strict=True):
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_gradcheck() -> None:
    dense, _, pattern = population(((3, 4), (2, 3)), (0.5, 0.9), torch.float64)
    x = draw(2, 3, 3, dtype=torch.float64).requires_grad_()
    values = pack(dense, pattern).requires_grad_()
    with use_backend("reference"):
        torch.autograd.gradcheck(lambda x, v: linear_packed(x, v, pattern, 1), (x, values))
        torch.autograd.gradgradcheck(lambda x, v: linear_packed(x, v, pattern, 1), (x, values))


def check_write_gradient(
    backend: str, net: tuple[tuple[int, int], ...], density: tuple[float, ...], batch: int
) -> None:
    tickets = len(density)
    dense, _, pattern = population(net, density, device=device_of(backend))
    gradient = dense.new_full((tickets, pattern.width), float("nan"))
    squares = dense.new_full((tickets, pattern.start.shape[1] - 1), float("nan"))
    expected = 0
    with use_backend(backend):
        values = pack(dense, pattern).requires_grad_()
        for layer, (out, inp) in enumerate(net):
            x = draw(tickets, batch, inp).to(dense.device)
            dy = draw(tickets, batch, out, seed=1).to(dense.device)
            write_gradient_(gradient, dy, x, pattern, layer, squares=squares)
            y = linear_packed(x, values, pattern, layer)
            expected = expected + torch.autograd.grad(y, values, dy)[0]
    for ticket, count in enumerate(pattern.count.tolist()):
        assert torch.equal(gradient[ticket, :count], expected[ticket, :count])
        # Only the layers' entries are written.
        assert gradient[ticket, count:].isnan().all()
    torch.testing.assert_close(squares.sum(1), expected.square().sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_write_gradient(backend: str) -> None:
    """PackedLayer by layer into one buffer, with the squares that add up to the squared norm."""
    check_write_gradient(backend, ((70, 20), (3, 70)), (0.3, 1.0, 0.0), 4)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=6, derandomize=True)
@given(**DRAWN_LAYERS, batch=st.integers(0, 9))
def test_write_gradient_of_any_layers(backend: str, sizes, density, batch: int) -> None:
    check_write_gradient(backend, tuple(zip(sizes[1:], sizes, strict=False)), density, batch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_on_packed_rows_is_adam_on_the_mask(backend: str) -> None:
    """Two steps of a packed layer and of a dense one, with clipping that bites."""
    net = ((7, 20),)
    dense, mask, pattern = population(net, (0.3, 1.0, 0.0), device=device_of(backend), width=150)
    x, dy = draw(3, 4, 20).to(dense.device), draw(3, 4, 7, seed=1).to(dense.device)
    lr = torch.full((3,), 1e-2, device=dense.device)

    def state(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = torch.zeros(3, dtype=torch.int64, device=weight.device)
        return torch.zeros_like(weight), torch.zeros_like(weight), steps

    with use_backend(backend):
        values = pack(dense, pattern)
        m, v, step = state(values)
        gradient, squares = torch.full_like(values, float("nan")), values.new_empty(3, 1)
        for _ in range(2):
            write_gradient_(gradient, dy, x, pattern, 0, squares=squares)
            count = pattern.count
            rows = (values, gradient, m, v, step, lr, None)
            norm = adam_(*rows, count=count, norm_partials=squares, max_norm=0.5)
        unpacked = unpack(values, pattern)
    with use_backend("reference"):
        m, v, step = state(dense)
        grad = (dy.mT @ x).flatten(1)
        for _ in range(2):
            expected = adam_(dense, grad, m, v, step, lr, mask, max_norm=0.5)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(unpacked, dense)
    assert not unpacked[~mask].any()


# torch's machinery.


def test_compiles_to_one_graph() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    x, values = draw(2, 3, 4), pack(dense, pattern).requires_grad_()

    def loss(x: Tensor, values: Tensor) -> Tensor:
        return linear_packed(x, values, pattern, 0).tanh().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (loss, compiled):
        (gradient,) = torch.autograd.grad(function(x, values), values)
        if function is loss:
            expected = gradient
    torch.testing.assert_close(gradient, expected)


def test_vmap_is_more_tickets() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    x, values = draw(5, 2, 3, 4), pack(dense, pattern)
    y = torch.func.vmap(lambda x: linear_packed(x, values, pattern, 0))(x)
    for i in range(5):
        torch.testing.assert_close(y[i], linear_packed(x[i], values, pattern, 0))


def test_autocast() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_packed(draw(2, 3, 4), pack(dense, pattern), pattern, 0)
    assert y.dtype == torch.bfloat16


def test_a_backward_pass_under_autocast_is_of_the_forward_pass() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    leaves = draw(2, 3, 4).requires_grad_(), pack(dense, pattern).requires_grad_()

    def differentiate(cast: bool) -> tuple[torch.Tensor, ...]:
        loss = linear_packed(*leaves, pattern, 0).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return torch.autograd.grad(loss, leaves)

    for plain, cast in zip(differentiate(False), differentiate(True), strict=True):
        assert torch.equal(plain, cast)


def test_forward_mode_raises() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    values = pack(dense, pattern)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(draw(2, 3, 4), draw(2, 3, 4, seed=1))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear_packed(x, values, pattern, 0)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            unpack(forward_ad.make_dual(values, values), pattern)


def test_a_change_before_the_backward_pass_raises() -> None:
    dense, _, pattern = population(((3, 4),), (0.5, 0.9))
    values = pack(dense, pattern).requires_grad_()
    y = linear_packed(draw(2, 3, 4), values, pattern, 0)
    pattern.bits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Bad inputs.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must have shape \(2, B, 9\), got \(2, 4\)"),
        ({"x": torch.zeros(2, 4, 8)}, ValueError, r"x must have shape \(2, B, 9\)"),
        ({"x": torch.zeros(3, 4, 9)}, ValueError, r"x must have shape \(2, B, 9\)"),
        ({"x": torch.zeros(2, 4, 9).double()}, TypeError, "x must be float32, got float64"),
        ({"x": torch.zeros(2, 4, 9, device="meta")}, ValueError, "x must be on cpu, got meta"),
        ({"values": torch.zeros(2, 3)}, ValueError, "values must have shape"),
        ({"values": torch.zeros(2, 63).long()}, TypeError, "values must be float32"),
        ({"values": torch.zeros(2, 63, device="meta")}, ValueError, "values must be on cpu"),
        ({"pattern": None}, TypeError, "pattern must be a PackedPattern, got NoneType"),
        ({"layer": 1}, ValueError, r"layer must be in \[0, 1\), got 1"),
        ({"layer": -1}, ValueError, r"layer must be in \[0, 1\), got -1"),
        ({"bias": torch.zeros(2, 8)}, ValueError, r"bias must have shape \(2, 7\)"),
        ({"bias": torch.zeros(2, 7).double()}, TypeError, "bias must be float32"),
        ({"bias": torch.zeros(2, 7, device="meta")}, ValueError, "bias must be on cpu"),
        ({"precision": "fp8"}, ValueError, "precision must be one of ieee, tf32, tf32x3"),
    ],
)
def test_bad_products(change, error, message) -> None:
    mask = torch.ones(2, 63, dtype=torch.bool)
    arguments = {
        "x": torch.zeros(2, 4, 9),
        "values": torch.zeros(2, 63),
        "pattern": build_pattern(mask, [(0, 7, 9)]),
        "layer": 0,
        "bias": None,
        "precision": "ieee",
    }
    with pytest.raises(error, match=message):
        linear_packed(**(arguments | change))


def test_bad_packing() -> None:
    pattern = build_pattern(torch.ones(2, 63, dtype=torch.bool), [(0, 7, 9)])
    with pytest.raises(ValueError, match=r"shape \(2, 63 or more\), got \(2, 62\)"):
        pack(torch.zeros(2, 62), pattern)
    with pytest.raises(TypeError, match="dense must be float32"):
        pack(torch.zeros(2, 63, dtype=torch.int32), pattern)
    with pytest.raises(ValueError, match=r"values must have shape \(2, 63\)"):
        unpack(torch.zeros(2, 62), pattern)
    with pytest.raises(TypeError, match="pattern must be a PackedPattern"):
        unpack(torch.zeros(2, 63), "mask")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "write",
    [
        lambda pattern: pattern.bits.fill_(-1),
        lambda pattern: pattern.bits.zero_(),
        lambda pattern: pattern.start.fill_(10**6),
        lambda pattern: pattern.start.sub_(10**6),
    ],
)
def test_a_pattern_that_was_written_reads_no_foreign_memory(backend, write) -> None:
    mask = torch.rand(2, 40 * 70) < 0.1
    pattern = build_pattern(mask, [(0, 40, 70)])
    values = pack(torch.randn(2, 40 * 70), pattern)
    linear_packed(torch.randn(2, 3, 70), values, pattern, 0)
    write(pattern)
    calls = (
        lambda: linear_packed(torch.randn(2, 3, 70), values, pattern, 0),
        lambda: unpack(values, pattern),
        lambda: pack(torch.randn(2, 40 * 70), pattern),
    )
    for call in calls:
        with use_backend(backend), pytest.raises(ValueError, match="as build_pattern made it"):
            call()


def test_bad_gradients() -> None:
    pattern = build_pattern(torch.ones(2, 63, dtype=torch.bool), [(0, 7, 9)])
    gradient, dy, x = torch.zeros(2, 63), torch.zeros(2, 4, 7), torch.zeros(2, 4, 9)
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 4, 7\)"):
        write_gradient_(gradient, dy[:, :3], x, pattern, 0)
    with pytest.raises(ValueError, match="gradient must be contiguous"):
        write_gradient_(torch.zeros(63, 2).mT, dy, x, pattern, 0)
    with pytest.raises(ValueError, match=r"squares must have shape \(2, 1\)"):
        write_gradient_(gradient, dy, x, pattern, 0, squares=torch.zeros(2))


# Plans and costs.


def test_plans() -> None:
    with use_backend("auto"):
        found = plan(64, 64, 32, 0.1, torch.float32, "cpu")
    assert isinstance(found, Plan)
    assert (found.op, found.backend, found.format) == ("linear_packed", "reference", "dense")
    assert "unpacked" in found.reason
    with pytest.raises(ValueError, match="density must be in"):
        plan(64, 64, 32, 1.5, torch.float32, "cpu")


@needs_triton
def test_plans_of_triton() -> None:
    device = device_of("triton")
    with use_backend("triton"):
        assert plan(64, 64, 32, 0.1, torch.float32, device).format == "packed"
        assert plan(64, 64, 32, 0.1, torch.float64, device).backend == "reference"


def test_costs_by_hand() -> None:
    """2 tickets, batch 3, a 64 x 128 layer of two tiles with 100 nonzeros a ticket."""
    pattern = 2 * (64 * 128 / 8 + 2 * 4)
    numbers = 100 + 3 * 64 + 3 * 128
    assert cost.dx(2, 3, 64, 128, 100) == Cost(2 * 2 * 3 * 100, 4 * 2 * numbers + pattern)
    assert cost.dw(2, 3, 64, 128, 100) == cost.dx(2, 3, 64, 128, 100)
    forward = cost.forward(2, 3, 64, 128, 100, itemsize=2)
    assert forward.flops == 2 * 3 * (2 * 100 + 64)
    assert forward.bytes == 2 * 2 * (numbers + 64) + pattern
