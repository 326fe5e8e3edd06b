"""Activations by name: each with its derivative, and none that a kernel would take for another."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from sparse_tickets.kernels import activations, activations_cpu, imitation, ppo
from sparse_tickets.kernels.activations import ACTIVATIONS, KNOWN, TorchActivation
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.mlp import plan as mlp_plan
from sparse_tickets.kernels.rollout import policy
from sparse_tickets.kernels.vector import LANES, aligned_empty

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["cpu", pytest.param("triton", marks=needs_triton)]
VALUES = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.25, 4.0, torch.nan])
# Sums of five products rounded to float32, and GELU's distribution function within 7.5e-8.
TOLERANCE = 1.5e-6


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_is_one_function_and_its_derivative(name):
    function, into, derive, by_output = ACTIVATIONS[name]
    x = VALUES.clone().requires_grad_()
    y = function(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    # Strided, as layers lie in one row.
    found, dx = torch.full((2, len(VALUES), 3), 7.0)[..., 1].unbind()
    into(VALUES, found)
    derive(torch.ones_like(VALUES), found if by_output else VALUES, dx)
    torch.testing.assert_close(found, y.detach(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx[:-1], expected[:-1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("width", [1, 130])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KNOWN)
def test_kernels_compute_it_and_its_derivative(name, backend, width):
    """Through a unit whose weights are one: in registers, through memory, and layer by layer."""
    arena = Arena.build((1, width, 1), activation=name)
    weight = torch.zeros(1, arena.size)
    arena.actor.weight(weight, 0)[0, 0, 0] = arena.actor.weight(weight, 1)[0, 0, 0] = 1.0
    x = torch.cat([torch.linspace(-12, 12, 401), torch.tensor([-90.0, 90.0])])
    expected = ACTIVATIONS[name].function(exact := x.double().requires_grad_())
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    x = x.view(1, -1, 1).requires_grad_()
    with use_backend(backend):
        y = mlp(x, weight, arena.actor)
        (dx,) = torch.autograd.grad(y.sum(), x)
        by_weight = torch.autograd.grad(
            mlp(x.detach(), weight.requires_grad_(), arena.actor).sum(), weight
        )[0]
    for found, wanted in ((y, expected), (dx, slope)):
        error = (found.detach().view(-1) - wanted.detach()).abs()
        assert (error <= TOLERANCE * wanted.abs().clamp(min=1)).all()
    wanted = (slope * exact).sum()
    found = arena.actor.weight(by_weight, 0)[0, 0, 0]
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-3)


def test_a_number_that_no_activation_has_computes_nan():
    for kept in (0, LANES):
        m = aligned_empty(2 * LANES)
        m[:] = 1.0
        activations_cpu.activate(m, np.int64(0), np.int64(kept), LANES, 99, np.float32(1.0))
        assert np.isnan(m[:LANES]).all()
    m[:] = 1.0
    deactivate = activations_cpu.deactivate
    deactivate(m, np.int64(0), np.int64(LANES), np.int64(0), LANES, 99, np.float32(1.0))
    assert np.isnan(m[:LANES]).all()


@pytest.fixture
def softplus(monkeypatch):
    """A network of an activation that torch's terms alone know."""
    made_up = TorchActivation(functional.softplus, None, None)
    monkeypatch.setitem(activations.ACTIVATIONS, "softplus", made_up)
    return Arena.build((3, 5, 2), activation="softplus")


def run(arena):
    """Its output and that of the formula, for weights of one."""
    weight, x = torch.ones(1, arena.size, requires_grad=True), torch.full((1, 2, 3), 0.1)
    y = mlp(x, weight, arena.actor)
    y.sum().backward()
    return y.detach(), 1 + 5 * functional.softplus(x.sum(2, keepdim=True) + 1).expand(1, 2, 2)


REFUSED = f"activation must be one of {', '.join(KNOWN)} on a {{}}PU, got 'softplus'"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_without_a_kernel_is_refused_by_name(softplus, backend):
    # Unless a backend is chosen, torch's own ops compute what the kernels do not have.
    torch.testing.assert_close(*run(softplus))
    message = REFUSED.format("C" if backend == "cpu" else "G")
    with use_backend(backend), pytest.raises(ValueError, match=message):
        run(softplus)


def test_rollouts_refuse_it(softplus):
    with pytest.raises(ValueError, match=REFUSED.format("C")):
        policy.network(softplus.actor, softplus, 1.0, 4)


@needs_triton
def test_rollouts_on_a_gpu_refuse_it(softplus):
    from sparse_tickets.kernels.rollout import policy_gpu

    with pytest.raises(ValueError, match=REFUSED.format("G")):
        policy_gpu.describe(softplus.actor)


def test_layernorm_is_the_formula_and_not_on_a_gpu():
    arena = Arena.build((3, 5, 4, 2), (3, 5, 4, 1), activation="layernorm-relu")
    net = arena.actor
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, arena.size, generator=generator).requires_grad_()
    mask = torch.rand(2, arena.prunable, generator=generator) < 0.5
    x = torch.randn(2, 7, 3, generator=generator)
    y = mlp(x, weight, net, mask)
    expected, kept = x, torch.where(mask, weight[:, : arena.prunable], 0)
    for layer in range(net.depth):
        expected = expected @ net.weight(kept, layer).mT + net.bias(weight, layer)[:, None]
        if layer < net.depth - 1:
            variance, mean = torch.var_mean(expected, 2, correction=0, keepdim=True)
            expected = ((expected - mean) * (variance + 1e-5).rsqrt()).relu()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (torch.autograd.grad(y.sum(), weight)[0][:, : arena.prunable][~mask] == 0).all()
    for plan in (mlp_plan, ppo.plan, imitation.plan):
        of = net if plan is mlp_plan else arena
        assert plan(of, torch.device("cpu")).backend == "cpu"
        on_gpu = plan(of, torch.device("cuda"))
        assert on_gpu.backend == "reference"
        assert "stands between the layers" in on_gpu.reason


def test_an_unknown_name_is_refused():
    message = f"activation must be one of {', '.join(KNOWN)}, layernorm-tanh, .*got 'mish'"
    with pytest.raises(ValueError, match=message):
        Arena.build((3, 5, 2), activation="mish")
