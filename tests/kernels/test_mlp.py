"""A whole network: the fused CPU kernel against plain torch in float64, forward and gradients."""

import numpy as np
import pytest
import torch

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.mlp import bits, layout, mlp, packing, plan, reference
from sparse_tickets.kernels.vector import LANES

# Sums of at most a few hundred float32 products, through at most five layers: 32 roundings.
TOLERANCE = 32 * torch.finfo(torch.float32).eps


def population(sizes, density, tickets=3, samples=20, critic=None, **kind):
    generator = torch.Generator().manual_seed(sum(sizes) + samples)
    arena = Arena.build(sizes, critic, **kind)
    weight = 0.3 * torch.randn(tickets, arena.size, generator=generator)
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    x = torch.randn(tickets, samples, sizes[0], generator=generator)
    dy = torch.randn(tickets, samples, sizes[-1], generator=generator)
    return arena, weight, mask, x, dy


def gradients(function, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def assert_near(actual, expected):
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE * max(scale, 1e-3))


@pytest.fixture
def poisoned(monkeypatch):
    """Scratch starts as NaN and as absurd indices, as the last ticket may have left it."""
    allocate = layout.allocate

    def poison(*arguments):
        floats, integers = allocate(*arguments)
        floats.fill(np.nan)
        integers.fill(2**30)
        return floats, integers

    monkeypatch.setattr(layout, "allocate", poison)


@pytest.mark.parametrize("samples", [1, LANES, 5 * LANES + 3, 2 * layout.PANEL + 1])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1, 0.0])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ((4, 64, 64, 2), "tanh"),
        ((3, 17, 33, 5), "relu"),
        ((20, 16, 9, 40, 30), "tanh"),
        # More than one word of the mask to a row, and a row that ends inside a word.
        ((70, 130, 64, 9), "relu"),
        ((1, 1), "tanh"),
        ((20, 30), "relu"),
        ((4, 64, 64, 2), "gelu"),
        ((5, 40, 24, 3), "silu"),
        ((5, 40, 24, 3), "elu"),
        ((5, 40, 24, 3), "layernorm-relu"),
        ((5, 40, 24, 3), "layernorm-silu"),
        ((5, 24, 70, 24, 9, 24, 3), "residual"),
    ],
)
def test_forward_and_gradients_equal_float64(sizes, activation, density, samples, poisoned):
    kind = {"activation": activation}
    if activation == "residual":
        kind = {"activation": "relu", "architecture": activation}
    arena, weight, mask, x, dy = population(sizes, density, samples=samples, **kind)
    actual = gradients(lambda x, w: mlp(x, w, arena.actor, mask, density=density), x, weight, dy)
    expected = gradients(
        lambda x, w: reference.mlp(x, w, arena.actor, mask),
        x.double(),
        weight.double(),
        dy.double(),
    )
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)
    assert (actual[2][:, : arena.prunable][~mask] == 0).all()
    for leaf in (0, 1):
        alone = [x.clone(), weight.clone()]
        alone[leaf].requires_grad_()
        y = mlp(*alone, arena.actor, mask, density=density)
        (found,) = torch.autograd.grad(y, alone[leaf], dy)
        assert torch.equal(found, actual[1 + leaf])


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_ticket_does_not_see_its_batch_or_the_threads(density):
    arena, weight, mask, x, dy = population((7, 40, 24, 3), density, tickets=7, samples=150)

    def run(tickets):
        return gradients(
            lambda x, w: mlp(x, w, arena.actor, mask[tickets], density=density),
            x[tickets],
            weight[tickets],
            dy[tickets],
        )

    together = run(slice(None))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, other in zip(run(slice(None)), together, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    for ticket in range(7):
        for one, other in zip(run(slice(ticket, ticket + 1)), together, strict=True):
            assert torch.equal(one[0], other[ticket])


def test_without_a_mask_and_for_the_critic():
    arena, weight, mask, x, _ = population((5, 24, 2), 0.5, critic=(5, 33, 1))
    everything = torch.ones_like(mask)
    assert torch.equal(mlp(x, weight, arena.actor), mlp(x, weight, arena.actor, everything))
    expected = reference.mlp(x.double(), weight.double(), arena.critic, mask)
    assert_near(mlp(x, weight, arena.critic, mask, density=0.1), expected)


def test_strided_and_empty_inputs():
    arena, weight, mask, x, _ = population((5, 24, 2), 0.5, tickets=4)
    wide = torch.randn(4, 20, 10)
    assert torch.equal(
        mlp(wide[..., ::2], weight, arena.actor, mask),
        mlp(wide[..., ::2].contiguous(), weight, arena.actor, mask),
    )
    assert mlp(x[:0], weight[:0], arena.actor, mask[:0]).shape == (0, 20, 2)
    assert mlp(x[:, :0], weight, arena.actor, mask).shape == (4, 0, 2)


def test_nan_of_one_ticket_stays_there():
    arena, weight, mask, x, _ = population((5, 24, 2), 0.5)
    weight[1] = torch.nan
    y = mlp(x, weight, arena.actor, mask)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_reference_gradcheck():
    arena, weight, mask, x, _ = population((3, 4, 2), 0.5, tickets=2, samples=3)
    inputs = (x.double().requires_grad_(), weight.double().requires_grad_())
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, w: mlp(x, w, arena.actor, mask), inputs)


def test_build_rows_is_scipy_csr_order():
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 1], bool)
    pointer, columns, positions = (np.full(8, -1, np.int32) for _ in range(3))
    count = packing.build_rows(mask, 1, 3, 3, pointer, columns, positions, 2)
    assert count == 7
    assert pointer[:4].tolist() == [2, 4, 5, 7]
    assert columns[2:7].tolist() == [0, 1, 2, 1, 2]
    assert positions[2:7].tolist() == [1, 2, 6, 8, 9]


def test_mask_words():
    mask = np.random.default_rng(0).random(200) < 0.5
    for begin, length in ((0, 64), (0, 1), (3, 50), (136, 64), (137, 63), (150, 50), (199, 1)):
        word = int(bits.mask_word(mask, begin, length))
        assert word == sum(1 << i for i in range(length) if mask[begin + i])
    assert int(bits.mask_word(mask, 200, 5)) == 0b11111


def packed(arena, density, mask_row, keep_dead):
    """The layout, a packed ticket and its number of entries."""
    plan = layout.lay_out(arena.nets, arena.prunable, density)
    floats, integers = layout.allocate(plan, 1)
    scratch = packing.open_scratch(plan, floats[0], integers[0])
    return plan, scratch, packing.pack(plan, scratch, mask_row, keep_dead)


def test_a_packed_ticket_knows_what_reaches_the_output():
    arena = Arena.build((3, 9, 10, 2), (3, 9, 1))
    mask = np.zeros(arena.prunable, bool)
    first, second, third = (
        arena.actor.weight(torch.from_numpy(mask)[None], i)[0] for i in (0, 1, 2)
    )
    first[:] = True
    second[4, 2] = second[4, 7] = second[6, 1] = True
    third[1, 4] = True
    plan, scratch, count = packed(arena, 0.1, mask, keep_dead=False)
    assert [
        scratch.rows[plan.layers[layer, layout.ROWS] :][: scratch.live[layer]].tolist()
        for layer in range(3)
    ] == [[2, 7], [4], [0, 1]]
    biases = 9 + 10 + 2 + 9 + 1
    critic = 3 * 9 + 9
    assert count == 1 + 2 + 2 * 3 + critic + biases

    # An optimiser moves the others too.
    plan, scratch, count = packed(arena, 0.1, mask, keep_dead=True)
    weights = count - biases
    assert weights == mask.sum() + critic
    assert sorted(scratch.position[critic:weights]) == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_units_that_reach_no_output(activation, density, poisoned):
    """Dead units beside living ones, under sparse rows and between tiles (density 0.6)."""
    arena, weight, mask, x, dy = population((12, 20, 18, 16, 10), 0.3, activation=activation)
    net = arena.actor
    net.weight(mask, 1)[0, :, 5:] = False
    net.weight(mask, 2)[1, :, ::2] = False
    net.weight(mask, 3)[2] = False
    actual = gradients(lambda x, w: mlp(x, w, net, mask, density=density), x, weight, dy)
    expected = gradients(
        lambda x, w: reference.mlp(x, w, net, mask), x.double(), weight.double(), dy.double()
    )
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)
    # Nothing of the third ticket's input reaches its output.
    assert (actual[1][2] == 0).all()


def test_format_depends_on_shape_and_nominal_density_only():
    assert plan(Arena.build((4, 64, 64, 2)).actor, torch.device("cpu")).format == (
        "csr/dense+mask/csr"
    )
    net = Arena.build((40, 64, 64, 20)).actor
    assert plan(net, torch.device("cpu"), density=0.1).format == "csr/csr/csr"
    with use_backend("reference"):
        assert plan(net, torch.device("cpu")).backend == "reference"


def test_refuses_what_it_cannot_do():
    arena, weight, mask, x, _ = population((5, 24, 2), 0.5)
    net = arena.actor
    with pytest.raises(ValueError, match="x must have shape"):
        mlp(x[..., :4], weight, net, mask)
    with pytest.raises(ValueError, match="weight must have shape"):
        mlp(x, weight[:, :9], net, mask)
    with pytest.raises(ValueError, match="must not end inside a layer"):
        mlp(x, weight, net, mask[:, :-1])
    with pytest.raises(ValueError, match="must not cover biases"):
        mlp(x, weight, net, torch.ones(weight.shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="density must be in"):
        mlp(x, weight, net, mask, density=1.2)
    with pytest.raises(TypeError, match="weight must be float32"):
        mlp(x.double(), weight.double(), net, mask)
