"""Residual networks: the reference is the paper's modules, and each layer says its part."""

import pytest
import torch
from torch import nn

from sparse_tickets.kernels import imitation, ppo
from sparse_tickets.kernels.arena import Arena, Net, chain
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.mlp import plan as mlp_plan

SIZES = chain("residual", 3, (6, 10, 4), 2)


class Block(nn.Module):
    """SimBa's, by hand."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, h):
        return h + self.second(torch.relu(self.first(self.norm(h))))


def by_hand(row, net, dtype):
    stem, head = nn.Linear(3, 6), nn.Linear(6, 2)
    blocks = Block(6, 10), Block(6, 4)
    layers = stem, *(layer for b in blocks for layer in (b.first, b.second)), head
    for layer, (weight, bias) in zip(layers, net.layers(row[None]), strict=True):
        layer.weight, layer.bias = nn.Parameter(weight[0].clone()), nn.Parameter(bias[0].clone())
    model = nn.Sequential(stem, *blocks, nn.LayerNorm(6, elementwise_affine=False), head)
    return model.to(dtype), layers


def test_sizes_follow_from_the_hidden_ones():
    assert SIZES == (3, 6, 10, 6, 4, 6, 2)
    assert chain("residual", 3, (6,), 2) == (3, 6, 2)
    assert chain("mlp", 3, (6, 10), 2) == (3, 6, 10, 2)
    net = Arena.build(SIZES, architecture="residual").actor
    assert [net.normalises(layer) for layer in range(6)] == [False, True, False, True, False, True]
    assert [net.activates(layer) for layer in range(6)] == [False, True, False, True, False, False]
    assert [net.adds(layer) for layer in range(6)] == [None, None, 0, None, 2, None]
    assert Net.decode(net.code) == net


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "layer by layer"])
def test_it_is_the_networks_of_the_paper(create_graph, generator):
    arena = Arena.build(SIZES, activation="relu", architecture="residual")
    weight = torch.randn(2, arena.size, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, arena.prunable, generator=generator) < 0.7
    weight[:, : arena.prunable][~mask] = 0
    x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight.requires_grad_()
    with use_backend("reference"):
        y = mlp(x, weight, arena.actor, mask)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=create_graph)
    assert (dweight[:, : arena.prunable][~mask] == 0).all()
    for ticket in range(2):
        model, layers = by_hand(weight[ticket].detach(), arena.actor, torch.float64)
        leaf = x[ticket].detach().requires_grad_()
        expected = model(leaf)
        expected.backward(dy[ticket])
        torch.testing.assert_close(y[ticket], expected)
        torch.testing.assert_close(dx[ticket], leaf.grad)
        for index, layer in enumerate(layers):
            kept = arena.actor.weight(mask[ticket][None], index)[0]
            found = arena.actor.weight(dweight[ticket][None], index)[0]
            torch.testing.assert_close(found, layer.weight.grad * kept)
            torch.testing.assert_close(
                arena.actor.bias(dweight[ticket][None], index)[0], layer.bias.grad
            )


def test_it_is_plain_torch_on_a_gpu_and_plans_say_so():
    arena = Arena.build(SIZES, (3, 6, 1), architecture="residual")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (mlp_plan(arena.actor, cpu).backend, ppo.plan(arena, cpu).backend) == ("cpu", "cpu")
    for plan in mlp_plan(arena.actor, gpu), ppo.plan(arena, gpu), imitation.plan(arena, gpu):
        assert plan.backend == "reference"
        assert "stands between the layers" in plan.reason


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_triton_refuses_it_by_name():
    arena = Arena.build(SIZES, architecture="residual")
    message = "architecture must be mlp on a GPU, got 'residual'"
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        mlp(torch.zeros(1, 2, 3), torch.zeros(1, arena.size), arena.actor)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Arena.build((3, 2), architecture="residual"), "actor must be inputs, width, then"),
        (
            lambda: Arena.build((3, 6, 9, 5, 2), architecture="residual"),
            r"actor must be inputs, width, .*residual, got \(3, 6, 9, 5, 2\)",
        ),
        (
            lambda: Arena.build(SIZES, (3, 6, 9, 1), architecture="residual"),
            "critic must be inputs, width, then",
        ),
        (lambda: Arena.build((3, 2), architecture="dense"), "architecture must be one of mlp, res"),
        (lambda: chain("residual", 3, (), 2), "hidden must name a width, and the inner size of"),
        (lambda: chain("dense", 3, (4,), 2), "architecture must be one of mlp, residual, got 'de"),
    ],
)
def test_other_sizes_and_names_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
