"""Activations by name: each with its derivative, and none that a kernel would take for another."""

import pytest
import torch

from sparse_tickets.kernels import activations
from sparse_tickets.kernels.activations import ACTIVATIONS, TorchActivation
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.rollout import policy

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
VALUES = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.25, 4.0, torch.nan])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_entry_is_one_function_and_its_derivative(name):
    function, into, derive = ACTIVATIONS[name]
    x = VALUES.clone().requires_grad_()
    y = function(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    found, dx = torch.empty_like(VALUES), torch.empty_like(VALUES)
    into(VALUES, found)
    derive(torch.ones_like(VALUES), found, dx)
    torch.testing.assert_close(found, y.detach(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx[:-1], expected[:-1])


@pytest.fixture
def softsign(monkeypatch):
    """A network of an activation that torch's terms alone know."""
    function = torch.nn.functional.softsign
    monkeypatch.setitem(activations.ACTIVATIONS, "softsign", TorchActivation(function, None, None))
    return Arena.build((3, 5, 2), activation="softsign")


def run(arena):
    weight = torch.zeros(1, arena.size, requires_grad=True)
    mlp(torch.zeros(1, 2, 3), weight, arena.actor).sum().backward()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_one_without_a_kernel_is_refused_by_name(softsign, backend):
    place = "a CPU" if backend == "cpu" else "a GPU"
    message = f"activation must be one of tanh, relu on {place}, got 'softsign'"
    with use_backend("reference"):
        run(softsign)
    with use_backend(backend), pytest.raises(ValueError, match=message):
        run(softsign)


def test_rollouts_refuse_it(softsign):
    with pytest.raises(ValueError, match="activation must be one of tanh, relu on a CPU, got 'so"):
        policy.network(softsign.actor, softsign, 1.0, 4)


@needs_triton
def test_rollouts_on_a_gpu_refuse_it(softsign):
    from sparse_tickets.kernels.rollout import policy_gpu

    with pytest.raises(ValueError, match="activation must be one of tanh, relu on a GPU, got 'so"):
        policy_gpu.describe(softsign.actor)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, got 'gelu'"):
        Arena.build((3, 5, 2), activation="gelu")
