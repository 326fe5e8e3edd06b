"""Whole networks on an NVIDIA GPU: every route and precision, with real launches and rounding."""

import pytest
import torch

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.mlp import mlp, plan, reference

pytest.importorskip("triton")

# Roundings of a factor, 10 bits in tf32 and what three of its products leave out in tf32x3, and of
# the sums of up to 256 products; a few layers add up.
UNIT = {"ieee": 2.0**-24, "tf32": 2.0**-10, "tf32x3": 2.0**-20}


def gradients(function, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "gelu"])
def test_equals_float64(width, precision, activation, device):
    generator = torch.Generator(device).manual_seed(0)
    arena = Arena.build((17, width, width, 6), activation=activation)
    net = arena.actor

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    weight = random(30, arena.size) / width**0.5
    mask = random(30, arena.prunable) > 0
    x, dy = random(30, 700, 17), random(30, 700, 6)
    expected = gradients(
        lambda x, w: reference.mlp(x, w, net, mask), x.double(), weight.double(), dy.double()
    )
    for to_input in (True, False):
        inputs = x.clone().requires_grad_(to_input)
        weights = weight.clone().requires_grad_()
        y = mlp(inputs, weights, net, mask, precision=precision)
        y.backward(dy)
        actual = (y.detach(), inputs.grad, weights.grad)
        for one, other in zip(actual, expected, strict=True):
            if one is None:
                continue
            # By the norm: relu's derivative may flip where a sum is nearly zero.
            error = (one.double() - other).norm() / other.norm()
            assert error <= 8 * (UNIT[precision] + 16 * 2.0**-24)
        assert not weights.grad[:, : arena.prunable][~mask].any()


@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_ticket_does_not_see_its_batch(width, device):
    arena = Arena.build((17, width, width, 6))
    weight = torch.randn(9, arena.size, device=device) / width**0.5
    mask = torch.rand(9, arena.prunable, device=device) < 0.3
    x = torch.randn(9, 300, 17, device=device)

    def run(tickets):
        dy = torch.ones(9, 300, 6, device=device)
        return gradients(
            lambda x, w: mlp(x, w, arena.actor, mask[tickets]),
            x[tickets],
            weight[tickets],
            dy[tickets],
        )

    together = run(slice(None))
    for repeated, first in zip(run(slice(None)), together, strict=True):
        assert torch.equal(repeated, first)
    for alone, first in zip(run(slice(4, 5)), together, strict=True):
        assert torch.equal(alone[0], first[4])


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.usefixtures("no_waiting")
def test_never_waits_for_the_device(width, device):
    arena = Arena.build((17, width, width, 6))
    weight = torch.zeros(3, arena.size, device=device, requires_grad=True)
    mask = torch.ones(3, arena.prunable, dtype=torch.bool, device=device)
    x = torch.zeros(3, 40, 17, device=device)
    mlp(x, weight, arena.actor, mask).sum().backward()
    assert plan(arena.actor, device).backend == "triton"
