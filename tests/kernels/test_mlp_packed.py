"""A network by packed weights: every backend and route against plain torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import cost, mlp_packed, plan_packed, reference
from sparse_tickets.kernels.packed import build_pattern, pack, unpack

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]

# Sums of at most a few hundred float32 products, through at most four layers: 32 roundings.
TOLERANCE = 32 * torch.finfo(torch.float32).eps


SPLIT = ((3, 70, 2), (3, 130, 2))
"""A network through memory, and one layer by layer."""


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def population(
    sizes, density=0.4, *, tickets=2, samples=37, activation="tanh", critic=None, spare=3
):
    """Dense weights, their mask, packed ones with some room to spare, an input and a gradient."""
    generator = torch.Generator().manual_seed(sum(sizes) + samples)
    arena = Arena.build(sizes, critic, activation=activation, prune_critic=critic is not None)
    net = arena.actor if critic is None else arena.critic
    weight = 0.3 * torch.randn(tickets, arena.size, generator=generator)
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    weight[:, : arena.prunable].masked_fill_(~mask, 0)
    x = torch.randn(tickets, samples, net.sizes[0], generator=generator)
    dy = torch.randn(tickets, samples, net.sizes[-1], generator=generator)
    width = (int(mask.sum(1).amax()) if tickets else 0) + spare
    return arena, net, weight, mask, width, x, dy


def run(backend, arena, net, weight, mask, width, x, dy, *, to_input=False, precision="ieee"):
    """y, then gradients of the values, of what follows them, and of the input if asked for."""
    device = device_of(backend)
    pattern = build_pattern(mask.to(device), arena.prunable_layers(), width=width)
    values = pack(weight.to(device), pattern).requires_grad_()
    rest = weight[:, arena.prunable :].to(device).clone().requires_grad_()
    x = x.to(device).detach().requires_grad_(to_input)
    with use_backend(backend):
        y = mlp_packed(x, values, pattern, rest, net, precision=precision)
        wanted = (values, rest, x) if to_input else (values, rest)
        found = torch.autograd.grad(y, wanted, dy.to(device))
    return [tensor.detach().cpu() for tensor in (y, *found)], pattern


def expect(arena, net, weight, mask, x, dy, *, to_input=False):
    """The same of `reference.mlp` in float64, with the weight's gradient dense."""
    x, weight = x.double().requires_grad_(to_input), weight.double().requires_grad_()
    y = reference.mlp(x, weight, net, mask)
    found = torch.autograd.grad(y, (weight, x) if to_input else (weight,), dy.double())
    dense, rest = found[0].split([arena.prunable, arena.size - arena.prunable], 1)
    return [y.detach(), dense, rest, *found[1:]]


def assert_equals_float64(backend, *problem, **options):
    arena, net, weight, mask, width, x, dy = problem
    actual, pattern = run(backend, *problem, **options)
    options.pop("precision", None)
    expected = expect(arena, net, weight, mask, x, dy, **options)
    # Beyond each ticket's count, there is nothing to differentiate by.
    for ticket, count in enumerate(pattern.count.tolist()):
        assert not actual[1][ticket, count:].any()
    assert actual[1].shape == (len(x), width)
    actual[1] = unpack(actual[1].to(pattern.bits.device), pattern).cpu()
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE * max(scale, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ((4, 20, 2), "tanh"),
        ((3, 17, 33, 5), "relu"),
        ((5, 8, 16, 9, 1), "tanh"),
        ((20, 30), "tanh"),
        ((1, 1), "relu"),
        ((3, 64, 2), "relu"),
        ((3, 17, 33, 5), "tanh"),
        ((33, 64, 47, 64, 60), "relu"),
        ((64, 64, 64, 64, 64), "tanh"),
    ],
)
def test_forward_and_gradients_equal_float64(sizes, activation, backend):
    assert_equals_float64(backend, *population(sizes, activation=activation))


@needs_triton
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        # Through memory, for the input's gradient, or too wide or too deep; then layer by layer.
        ((3, 9, 2), "tanh"),
        ((3, 70, 2), "relu"),
        ((2, 3, 4, 4, 3, 2), "relu"),
        ((90, 33, 100), "tanh"),
        ((3, 130, 2), "tanh"),
        ((140, 5, 3), "relu"),
    ],
)
def test_through_memory_and_layer_by_layer(sizes, activation, to_input):
    problem = population(sizes, samples=18, activation=activation)
    assert_equals_float64("triton", *problem, to_input=to_input)


@needs_triton
@pytest.mark.parametrize("sizes", SPLIT)
def test_the_gradients_of_many_samples_are_added(sizes, monkeypatch):
    from sparse_tickets.kernels.mlp import passes_gpu

    monkeypatch.setattr(passes_gpu, "SPLIT_STRETCH", 32)
    assert_equals_float64("triton", *population(sizes, samples=34), to_input=True)
    problem = population((3, 9, 2), critic=(*sizes[:-1], 1), samples=34)
    assert_equals_float64("triton", *problem)


@needs_triton
@pytest.mark.parametrize("sizes", SPLIT)
@pytest.mark.parametrize(("density", "spare"), [(0.0, 0), (0.0, 3), (1.0, 0)])
def test_all_or_nothing_through_memory(sizes, density, spare):
    problem = population(sizes, density, spare=spare, samples=18)
    assert_equals_float64("triton", *problem, to_input=True)


@needs_triton
@pytest.mark.parametrize("sizes", SPLIT)
def test_pruned_tiles_and_tickets_through_memory(sizes):
    """The second ticket lost all, the first a row and a column of tiles."""
    arena, net, weight, mask, *others = population(sizes, samples=18)
    net.weight(mask, 0)[0, :64] = False
    net.weight(mask, 1)[0, :, 64:] = False
    mask[1] = False
    weight[:, : arena.prunable].masked_fill_(~mask, 0)
    assert_equals_float64("triton", arena, net, weight, mask, *others, to_input=True)


@needs_triton
@pytest.mark.parametrize(("tickets", "samples"), [(2, 0), (0, 5), (1, 1), (2, 33)])
def test_any_number_of_samples_through_memory(tickets, samples):
    for sizes in SPLIT:
        problem = population(sizes, tickets=tickets, samples=samples)
        assert_equals_float64("triton", *problem, to_input=True)


@needs_triton
@pytest.mark.parametrize("sizes", [(3, 17, 33, 5), (5, 8, 16, 9, 1), (20, 40)])
def test_in_one_launch_where_no_gradient_is_asked_for(sizes):
    arena, net, weight, mask, width, x, dy = population(sizes, activation="relu")
    device = device_of("triton")
    pattern = build_pattern(mask.to(device), arena.prunable_layers(), width=width)
    with use_backend("triton"):
        y = mlp_packed(
            x.to(device),
            pack(weight.to(device), pattern),
            pattern,
            weight[:, arena.prunable :].to(device),
            net,
        )
    expected, *_ = expect(arena, net, weight, mask, x, dy)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=4 * TOLERANCE)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter multiplies exactly")
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("sizes", [(3, 9, 2), *SPLIT])
def test_other_precisions(sizes, precision):
    problem = population(sizes, samples=18)
    assert_equals_float64("triton", *problem, precision=precision, to_input=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tickets", "samples"), [(2, 0), (0, 5), (1, 1), (3, 16), (2, 65)])
def test_any_number_of_tickets_and_samples(tickets, samples, backend):
    assert_equals_float64(backend, *population((3, 9, 2), tickets=tickets, samples=samples))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_pruned_and_none_pruned(density, spare, backend):
    assert_equals_float64(backend, *population((3, 9, 2), density, spare=spare))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_rows_columns_and_layers(backend):
    arena, net, weight, mask, *others = population((5, 18, 7, 3))
    net.weight(mask, 0)[0, ::2] = False
    net.weight(mask, 1)[0, :, 3:] = False
    net.weight(mask, 1)[1] = False
    weight[:, : arena.prunable].masked_fill_(~mask, 0)
    assert_equals_float64(backend, arena, net, weight, mask, *others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [20, 70])
def test_another_network_beside_it(samples, backend):
    """The critic's tiles follow the actor's, whose gradient stays zero, and the other way round."""
    arena, critic, *others = population((3, 9, 2), critic=(3, 17, 1), samples=samples)
    assert_equals_float64(backend, arena, critic, *others)
    *others, _ = others
    dy = torch.ones(2, samples, 2)
    assert_equals_float64(backend, arena, arena.actor, *others, dy)


@needs_triton
@pytest.mark.parametrize("sizes", [(3, 9, 2), *SPLIT])
def test_a_ticket_does_not_see_its_batch(sizes):
    to_input = sizes in SPLIT
    samples = 20 if to_input else 70
    arena, net, weight, mask, width, x, dy = population(sizes, samples=samples)

    def part(rows):
        problem = arena, net, weight[rows], mask[rows], width, x[rows], dy[rows]
        results, _ = run("triton", *problem, to_input=to_input)
        return results

    together = part(slice(None))
    for ticket in range(2):
        for one, other in zip(part(slice(ticket, ticket + 1)), together, strict=True):
            assert torch.equal(one[0], other[ticket])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@needs_triton
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", [(3, 9, 2), *SPLIT])
def test_nan_of_one_ticket_stays_there(sizes, activation):
    problem = population(sizes, samples=18, activation=activation)
    arena, _, weight, mask, *_ = problem
    weight[1, : arena.prunable].masked_fill_(mask[1], torch.nan)
    results, _ = run("triton", *problem, to_input=sizes in SPLIT)
    assert results[0][1].isnan().all()
    for tensor in results:
        assert tensor[0].isfinite().all()


@needs_triton
def test_strided_and_expanded_inputs():
    arena, net, weight, mask, width, *_ = population((3, 9, 2), tickets=3)
    device = device_of("triton")
    weight, mask = weight.to(device), mask.to(device)
    pattern = build_pattern(mask, arena.prunable_layers(), width=width)
    values = pack(weight, pattern)
    apart = torch.stack([values, values + 1], 2)[..., 0]
    wide = torch.randn(3, 20, 6, device=device)[..., ::2]
    shared = torch.randn(1, 20, 3, device=device).expand(3, -1, -1)
    rest = weight[:, arena.prunable :]
    for x in (wide, shared):
        with use_backend("triton"):
            actual = mlp_packed(x, apart, pattern, rest, net)
            assert torch.equal(
                actual, mlp_packed(x.contiguous(), values, pattern, rest.contiguous(), net)
            )
        expected = reference.mlp(x.double(), weight.double(), net, mask)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * TOLERANCE)


@needs_triton
@pytest.mark.parametrize("sizes", [(3, 9, 2), *SPLIT])
def test_a_pattern_changed_before_the_backward_pass_raises(sizes):
    arena, net, weight, mask, width, x, _ = population(sizes)
    device = device_of("triton")
    pattern = build_pattern(mask.to(device), arena.prunable_layers(), width=width)
    values = pack(weight.to(device), pattern).requires_grad_()
    with use_backend("triton"):
        y = mlp_packed(x.to(device), values, pattern, weight[:, arena.prunable :].to(device), net)
    pattern.bits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    activation=st.sampled_from(["tanh", "relu"]),
    tickets=st.integers(0, 2),
    samples=st.sampled_from([0, 1, 5, 17]),
    to_input=st.booleans(),
)
def test_any_network(backend, sizes, density, activation, tickets, samples, to_input):
    shape = {"tickets": tickets, "samples": samples, "activation": activation}
    assert_equals_float64(backend, *population(sizes, density, **shape), to_input=to_input)


def test_reference_gradcheck():
    arena, net, weight, mask, width, x, _ = population((3, 4, 2), samples=3)
    pattern = build_pattern(mask, arena.prunable_layers(), width=width)
    values = pack(weight.double(), pattern).requires_grad_()
    rest = weight[:, arena.prunable :].double().requires_grad_()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, v, r: mlp_packed(x, v, pattern, r, net),
            (x.double().requires_grad_(), values, rest),
        )


def test_plan_says_what_runs():
    def reason(backend, *sizes, **options):
        net = Arena.build(sizes).actor
        with use_backend(backend):
            found = plan_packed(net, torch.device(device_of(backend)), **options)
        assert (found.op, found.backend) == ("mlp_packed", backend)
        assert (found.format == "packed") == (backend == "triton")
        return found.reason

    for backend in ("cpu", "reference"):
        assert reason(backend, 4, 64, 64, 2).startswith("unpacked for every call, then as mlp: ")
    if has_triton():
        for sizes in ((4, 64, 64, 2), (64, 64, 64, 64, 64)):
            found = reason("triton", *sizes)
            assert "that recomputes them" in found
            assert found.endswith("backward in scratch that L2 can hold")
        found = reason("triton", 4, 64, 2, to_input=True)
        assert "in registers, or in memory where a backward pass reads them" in found
        assert "a launch for the deltas" in found
        walked = "forward in one launch with activations in memory"
        assert reason("triton", 4, 128, 2).startswith(walked)
        assert reason("triton", 4, 64, 2, precision="tf32").startswith(walked)
        assert reason("triton", 4, 129, 2).startswith("forward layer by layer; deltas layer by")
        assert reason("triton", 4, 129, 2).endswith("tiles expanded in registers")


@needs_triton
def test_routes():
    from sparse_tickets.kernels.mlp import gpu

    def route(*sizes, precision="ieee", to_input=False):
        chosen = gpu.choose(Arena.build(sizes).actor, precision, to_input=to_input)
        return chosen.forward, chosen.backward

    assert route(4, 64, 64, 2) == ("fused", "fused")
    assert route(4, 64, 64, 2, to_input=True) == ("fused", "split")
    assert route(64, 64, 64, 64, 64) == ("fused", "fused")
    assert route(64, 64, 64, 64, 64, 64) == ("walk", "split")
    assert route(4, 64, 64, 2, precision="tf32x3") == ("walk", "split")
    assert route(4, 128, 128, 2) == ("walk", "split")
    assert route(4, 256, 256, 2) == ("layers", "layers")


def test_refuses_what_it_cannot_do():
    arena, net, weight, mask, width, x, _ = population((3, 9, 2), critic=(3, 9, 1))
    pattern = build_pattern(mask, arena.prunable_layers(), width=width)
    values, rest = pack(weight, pattern), weight[:, arena.prunable :]
    with pytest.raises(ValueError, match="x must have shape"):
        mlp_packed(x[..., :2], values, pattern, rest, net)
    with pytest.raises(ValueError, match=r"pattern\.bits must have shape \(1, "):
        mlp_packed(x[:1], values, pattern, rest, net)
    with pytest.raises(ValueError, match="values must have shape"):
        mlp_packed(x, values[:, 1:], pattern, rest, net)
    with pytest.raises(ValueError, match=r"rest must have shape \[2, at least 21\], got \(2, 20\)"):
        mlp_packed(x, values, pattern, rest[:, :20], net)
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        mlp_packed(x, values, mask, rest, net)
    with pytest.raises(ValueError, match="must cover the network's layers"):
        mlp_packed(x, values, pattern, rest, Arena.build((3, 9, 1)).actor)
    with pytest.raises(ValueError, match="precision must be one of"):
        mlp_packed(x, values, pattern, rest, net, precision="bf16")
    with pytest.raises(TypeError, match="rest must be float32"):
        mlp_packed(x, values, pattern, rest.double(), net)
    with pytest.raises(TypeError, match="values must be float32"):
        mlp_packed(x.double(), values.double(), pattern, rest.double(), net)


@pytest.mark.parametrize(
    ("actual", "flops", "moved"),
    [
        # 6 and 4 of 25 weights, 7 biases and 5 hidden units; 2 tickets of 7 samples. A bit a weight
        # of two tiles of 16 x 16, and their two starts.
        (
            cost.packed_forward(2, 7, (3, 5, 2), (6, 4)),
            7 * (2 * 10 + 7 + 5),
            4 * (7 * 5 + 10 + 7) + 2 * (32 + 4),
        ),
        (
            cost.packed_backward(2, 7, (3, 5, 2), (6, 4)),
            7 * ((2 * 6 + 5 + 5) + (2 * 4 + 15) + (2 * 10 + 7)),
            4 * (7 * 5 + 2 * (10 + 7)) + 2 * (32 + 4),
        ),
        (
            cost.packed_forward(2, 7, (3, 5, 2), (6, 4), keep=True),
            7 * (2 * 10 + 7 + 5),
            4 * (7 * (5 + 5) + 10 + 7) + 2 * (32 + 4),
        ),
        # Deltas read the upper layer's values and pattern alone, unless the input's are asked for.
        (
            cost.packed_split_backward(2, 7, (3, 5, 2), (6, 4)),
            7 * ((2 * 4 + 15) + (2 * 10 + 7)),
            4 * (7 * (2 + 5 + 5) + 4 + 7 * (2 + 5 + 3 + 5) + 10 + 7) + 3 * (32 + 4),
        ),
        (
            cost.packed_split_backward(2, 7, (3, 5, 2), (6, 4), to_input=True),
            7 * ((2 * 10 + 15) + (2 * 10 + 7)),
            4 * (7 * (2 + 5 + 5 + 3) + 10 + 7 * (2 + 5 + 3 + 5) + 10 + 7) + 4 * (32 + 4),
        ),
    ],
)
def test_costs_by_hand(actual, flops, moved):
    assert actual == Cost(2 * flops, 2 * moved)
