"""A whole network on every backend against plain torch in float64, on drawn shapes and masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp, reference

# Sums of at most a hundred float32 products, through at most four layers: 32 roundings.
TOLERANCE = 32 * torch.finfo(torch.float32).eps

networks = st.lists(st.integers(1, 20), min_size=2, max_size=5).map(tuple)
in_registers = st.lists(st.integers(1, 64), min_size=4, max_size=5).map(tuple)


def _assert_equals_float64(
    backend, sizes, activation, tickets, samples, density, seed, to_input=True
) -> None:
    generator = torch.Generator().manual_seed(seed)
    arena = Arena.build(sizes, activation=activation)
    weight = torch.randn(tickets, arena.size, generator=generator) / max(sizes) ** 0.5
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    x = torch.randn(tickets, samples, sizes[0], generator=generator)
    dy = torch.randn(tickets, samples, sizes[-1], generator=generator)
    if backend == "triton" and torch.cuda.is_available():
        weight, mask, x, dy = (tensor.cuda() for tensor in (weight, mask, x, dy))

    def differentiate(network, *leaves, dy):
        y = network(*leaves)
        wanted = leaves if to_input else leaves[:1]
        return y, *torch.autograd.grad(y, wanted, dy)

    leaves = weight.clone().requires_grad_(), x.clone().requires_grad_(to_input)
    with use_backend(backend):
        found = differentiate(
            lambda weight, x: mlp(x, weight, arena.actor, mask, density=density), *leaves, dy=dy
        )
    exact = weight.double().requires_grad_(), x.double().requires_grad_(to_input)
    expected = differentiate(
        lambda weight, x: reference.mlp(x, weight, arena.actor, mask), *exact, dy=dy.double()
    )
    for ours, theirs in zip(found, (tensor.detach() for tensor in expected), strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE * max(scale, 1e-2))
    assert not found[1][:, : arena.prunable][~mask].any()


others = {
    "activation": st.sampled_from(KNOWN),
    "tickets": st.integers(0, 3),
    "samples": st.sampled_from([0, 1, 5, 33]),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "seed": st.integers(0, 99),
}
drawn = given(sizes=networks, **others)


@drawn
@settings(max_examples=100, deadline=None, derandomize=True)
def test_on_the_cpu(**shape) -> None:
    _assert_equals_float64("cpu", **shape)


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@drawn
@settings(max_examples=30, deadline=None, derandomize=True)
def test_in_triton(**shape) -> None:
    _assert_equals_float64("triton", **shape)


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@given(sizes=in_registers, **others)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_in_registers_in_triton(**shape) -> None:
    """Without the input's gradient, in one launch."""
    _assert_equals_float64("triton", **shape, to_input=False)
