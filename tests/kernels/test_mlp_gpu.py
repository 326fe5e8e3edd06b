"""A whole network in Triton: every route against plain torch in float64, forward and gradients."""

import pytest
import torch

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.mlp import mlp, plan, reference

pytest.importorskip("triton")

from sparse_tickets.kernels.mlp import fused_gpu, gpu, launches_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sums of at most a few hundred float32 products, through at most four layers: 32 roundings. The
# interpreter multiplies every precision exactly.
TOLERANCE = 32 * torch.finfo(torch.float32).eps
PRECISE = ("tf32x3",) if DEVICE == "cuda" else ("tf32", "tf32x3")

THREE = ((3, 9, 2), (3, 70, 2), (3, 130, 2))
"""A network for each route: in registers, through memory, by layers."""

DEEP = (33, 64, 47, 64, 64)
"""As many layers as registers hold, and almost as wide."""


def population(sizes, density=0.5, *, tickets=2, samples=37, activation="tanh", critic=None):
    generator = torch.Generator().manual_seed(sum(sizes) + samples)
    arena = Arena.build(sizes, critic, activation=activation)
    net = arena.actor if critic is None else arena.critic
    weight = 0.3 * torch.randn(tickets, arena.size, generator=generator)
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    x = torch.randn(tickets, samples, net.sizes[0], generator=generator)
    dy = torch.randn(tickets, samples, net.sizes[-1], generator=generator)
    return net, *(tensor.to(DEVICE) for tensor in (weight, mask, x, dy))


def gradients(function, x, weight, dy, *, to_input=True):
    x = x.clone().requires_grad_(to_input)
    weight = weight.clone().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (weight, x) if to_input else (weight,), dy)


def assert_equals_float64(net, weight, mask, x, dy, *, to_input, precision="ieee"):
    expected = gradients(
        lambda x, w: reference.mlp(x, w, net, mask),
        x.double(),
        weight.double(),
        dy.double(),
        to_input=to_input,
    )
    with use_backend("triton"):
        actual = gradients(
            lambda x, w: mlp(x, w, net, mask, precision=precision), x, weight, dy, to_input=to_input
        )
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE * max(scale, 1e-3))
    if mask is not None:
        assert not actual[1][:, : mask.shape[1]][~mask].any()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory holds NaN, as the last to use it may have left it."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    monkeypatch.setattr(gpu.torch, "empty_like", poison(empty_like))


@pytest.mark.parametrize(
    ("sizes", "activation", "to_input"),
    [
        ((4, 20, 2), "tanh", False),
        ((4, 20, 2), "relu", True),
        ((3, 17, 33, 5), "relu", False),
        ((3, 17, 33, 5), "tanh", True),
        ((5, 8, 16, 9, 1), "tanh", False),
        ((20, 30), "tanh", False),
        ((20, 30), "tanh", True),
        ((1, 1), "relu", True),
        ((90, 33, 7), "relu", False),
        ((64, 64, 64, 64, 64), "tanh", False),
        ((64, 64, 64, 64, 64), "relu", False),
        ((33, 64, 47, 64, 64), "tanh", False),
        ((17, 61, 61, 61, 6), "relu", False),
        ((4, 70, 2), "tanh", True),
        ((4, 130, 9, 3), "relu", False),
        ((3, 5, 4, 4, 6, 130), "tanh", True),
        ((3, 17, 33, 5), "elu", False),
        ((3, 17, 33, 5), "elu", True),
        ((3, 17, 33, 5), "gelu", False),
        ((3, 17, 33, 5), "silu", True),
        ((4, 70, 20, 2), "gelu", True),
        ((4, 130, 9, 3), "silu", False),
        ((4, 130, 9, 3), "gelu", True),
        ((4, 130, 9, 3), "elu", True),
    ],
)
def test_forward_and_gradients_equal_float64(sizes, activation, to_input):
    assert_equals_float64(*population(sizes, activation=activation), to_input=to_input)


@pytest.mark.parametrize("precision", PRECISE)
@pytest.mark.parametrize("sizes", THREE)
def test_other_precisions(sizes, precision):
    assert_equals_float64(*population(sizes), to_input=True, precision=precision)


@pytest.mark.parametrize("samples", [0, 1, 16, 65])
@pytest.mark.parametrize("to_input", [False, True])
def test_any_number_of_samples(samples, to_input):
    assert_equals_float64(*population((3, 9, 2), samples=samples), to_input=to_input)


@pytest.mark.long
def test_the_gradients_of_many_samples_are_added(monkeypatch):
    monkeypatch.setattr(launches_gpu, "SPLIT_STRETCH", 64)
    for sizes in THREE:
        assert_equals_float64(*population(sizes, samples=150), to_input=True)


@pytest.mark.parametrize("sizes", THREE)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_pruned_and_none_pruned(sizes, density):
    assert_equals_float64(*population(sizes, density), to_input=False)


@pytest.mark.parametrize("sizes", THREE)
def test_without_a_mask_and_for_the_critic(sizes):
    net, weight, _, x, dy = population(sizes)
    assert_equals_float64(net, weight, None, x, dy, to_input=True)
    net, weight, mask, x, dy = population((3, 9, 2), critic=(*sizes[:-1], 1), samples=70)
    assert_equals_float64(net, weight, mask, x, dy, to_input=False)


@pytest.mark.parametrize("sizes", THREE)
def test_no_tickets_strided_and_expanded_inputs(sizes):
    net, weight, mask, x, dy = population(sizes, tickets=3, samples=20)
    with use_backend("triton"):
        assert mlp(x[:0], weight[:0], net, mask[:0]).shape == (0, 20, 2)
    assert_equals_float64(net, weight[:0], mask[:0], x[:0], dy[:0], to_input=True)
    wide = torch.randn(3, 20, 6, device=DEVICE)[..., ::2]
    many = torch.randn(3, weight.shape[1] + 5, device=DEVICE)[:, :-5] * 0.3
    shared = torch.randn(1, 20, 3, device=DEVICE).expand(3, -1, -1)
    for inputs in (wide, shared):
        constant = torch.ones(1, 1, 1, device=DEVICE).expand_as(dy)
        assert_equals_float64(net, many, mask, inputs, constant, to_input=False)


@pytest.mark.parametrize("sizes", THREE)
def test_a_ticket_does_not_see_its_batch(sizes):
    net, weight, mask, x, dy = population(sizes, tickets=3, samples=70)

    def run(tickets):
        with use_backend("triton"):
            return gradients(
                lambda x, w: mlp(x, w, net, mask[tickets]), x[tickets], weight[tickets], dy[tickets]
            )

    together = run(slice(None))
    for ticket in range(3):
        for one, other in zip(run(slice(ticket, ticket + 1)), together, strict=True):
            assert torch.equal(one[0], other[ticket])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", THREE)
def test_nan_stays_with_its_ticket_and_off_pruned_weights(sizes, activation):
    net, weight, mask, x, dy = population(sizes, activation=activation)
    weight[1] = torch.nan
    with use_backend("triton"):
        y, grad, _ = gradients(lambda x, w: mlp(x, w, net, mask), x, weight, dy)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert grad[0].isfinite().all()
    assert not grad[1, : mask.shape[1]][~mask[1]].any()
    weight[1, : mask.shape[1]].masked_fill_(mask[1], 0.1)
    weight[1, mask.shape[1] :] = 0.1
    with use_backend("triton"):
        assert mlp(x, weight, net, mask).isfinite().all()


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("sizes", THREE)
def test_kept_activations_serve_as_those_made_again(sizes, activation):
    net, weight, mask, x, dy = population(sizes, activation=activation)
    y, hidden = gpu.forward(x, weight, net, mask, keep=True)
    expected = reference.hidden_layers(x, weight, net, mask)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert gpu.forward(x, weight, net, mask)[1] is None
    back = gpu.backward(dy, x, weight, net, mask, hidden=hidden, to_input=True)
    again = gpu.backward(dy, x, weight, net, mask, to_input=True)
    for one, other in zip(back, again, strict=True):
        assert torch.equal(one, other)
    for tensor in (y, hidden, *back):
        assert tensor.isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("density", "activation"), [(0.0, "relu"), (0.5, "tanh"), (1.0, "relu"), (None, "tanh")]
)
def test_deep_networks_in_registers(density, activation):
    """With and without a mask; a ticket's gradients are the same alone, and every time."""
    net, weight, mask, x, dy = population(DEEP, density or 1.0, samples=70, activation=activation)
    if density is None:
        mask = None
    elif density == 0:
        mask.zero_()
    assert_equals_float64(net, weight, mask, x, dy, to_input=False)
    whole = gpu.backward(dy, x, weight, net, mask)[1]
    alone = gpu.backward(dy[1:], x[1:], weight[1:], net, None if mask is None else mask[1:])[1]
    assert torch.equal(alone[0], whole[1])
    assert torch.equal(gpu.backward(dy, x, weight, net, mask)[1], whole)


def test_a_mask_changed_before_the_backward_pass_raises():
    net, weight, mask, x, _ = population((3, 9, 2))
    weight.requires_grad_()
    with use_backend("triton"):
        y = mlp(x, weight, net, mask)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_tanh_is_accurate_and_saturates():
    """Through a network of one unit a layer, whose weights are one."""
    net = Arena.build((1, 1, 1)).actor
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=DEVICE)
    x = torch.cat([torch.linspace(-10, 10, 2001), torch.logspace(-30, 38, 500)]).to(DEVICE)
    y = gpu.forward(x.view(1, -1, 1), weight, net)[0].view(-1)
    expected = x.double().tanh()
    assert ((y - expected).abs() <= 4e-7 * expected.abs()).all()
    assert (y[x.abs() > 10].abs() == 1).all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradients_are_those_of_finite_differences(activation):
    """Along random directions, of the float64 reference around the float32 gradient."""
    net, weight, mask, x, dy = population((3, 9, 7, 2), activation=activation)
    with use_backend("triton"):
        _, grad, dx = gradients(lambda x, w: mlp(x, w, net, mask), x, weight, dy)
    for tensor, gradient, other in ((weight, grad, x), (x, dx, weight)):
        step = torch.randn_like(tensor).double()
        if tensor is weight:
            step[:, : mask.shape[1]].masked_fill_(~mask, 0)

        def loss(scale, tensor=tensor, other=other, step=step):
            moved = tensor.double() + scale * step
            pair = (other.double(), moved) if tensor is weight else (moved, other.double())
            return (reference.mlp(*pair, net, mask) * dy).sum()

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-4, atol=1e-3)


def test_routes():
    def route(*sizes, precision="ieee", to_input=False):
        chosen = gpu.choose(Arena.build(sizes).actor, precision, to_input=to_input)
        return chosen.forward, chosen.backward

    assert route(4, 64, 64, 2) == ("fused", "fused")
    assert route(17, 64, 64, 64, 6) == ("fused", "fused")
    assert route(4, 64, 64, 2, to_input=True) == ("fused", "split")
    assert route(64, 64, 64, 64, 64) == ("fused", "fused")
    assert route(64, 64, 64, 64, 64, to_input=True) == ("fused", "split")
    assert route(4, 64, 64, 2, precision="tf32x3") == ("walk", "split")
    assert route(4, 128, 128, 2) == ("walk", "split")
    assert route(4, 256, 256, 2) == ("layers", "layers")
    assert route(4, 8, 8, 8, 8, 2) == ("walk", "split")


@pytest.mark.parametrize(
    ("width", "words"),
    [(64, "recomputes them"), (128, "activations in memory"), (256, "layer by layer")],
)
def test_plan_names_the_route_and_the_precision(width, words):
    net = Arena.build((4, width, width, 2)).actor
    with use_backend("triton"):
        chosen = plan(net, torch.device(DEVICE), precision="ieee")
    assert (chosen.backend, chosen.format) == ("triton", "dense+mask")
    assert words in chosen.reason
    assert "ieee" in chosen.reason


def test_plan_tells_why_tensor_cores_go_through_memory():
    net = Arena.build((4, 64, 64, 2)).actor
    with use_backend("triton"):
        assert "tensor cores want the registers" not in plan(net, torch.device(DEVICE)).reason
        reason = plan(net, torch.device(DEVICE), precision="tf32").reason
        assert "activations in memory" in reason
        assert "tensor cores want the registers" in reason
        # The forward pass then keeps what the backward pass reads.
        with_input = plan(net, torch.device(DEVICE), to_input=True).reason
        assert "or in memory where a backward pass reads them" in with_input


def test_refuses_what_it_cannot_do():
    net, weight, mask, x, _ = population((3, 9, 2))
    with use_backend("triton"):
        with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3"):
            mlp(x, weight, net, mask, precision="bf16")
        with pytest.raises(TypeError, match="weight must be float32"):
            mlp(x.double(), weight.double(), net, mask)


def test_stretches_are_whole_tiles_and_cover_the_samples():
    for samples in (1, 31, 64, 65, 130, 5000, 10**6):
        for stretch in (launches_gpu.FUSED_STRETCH, launches_gpu.SPLIT_STRETCH):
            splits, length = launches_gpu.cut(samples, stretch)
            assert 1 <= splits <= launches_gpu.MOST_STRETCHES
            assert (splits - 1) * length < samples <= splits * length
            assert length % launches_gpu.STRETCH_UNIT == 0
            for launch in fused_gpu.launches((16, 32, 16)):
                assert length % launch.rows == 0
