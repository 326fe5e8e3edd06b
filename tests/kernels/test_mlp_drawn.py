"""A whole network on every backend against plain torch in float64, on drawn shapes and masks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain

from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp, reference

# Sums of at most a hundred float32 products, through at most four layers: 32 roundings.
TOLERANCE = 32 * torch.finfo(torch.float32).eps

networks = st.lists(st.integers(1, 20), min_size=2, max_size=5).map(tuple)
in_registers = st.lists(st.integers(1, 64), min_size=4, max_size=5).map(tuple)


def _assert_equals_float64(
    backend, sizes, tickets, samples, density, seed, to_input=True, **kind
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, *hidden, outputs = sizes
    sizes = any_chain(kind.get("architecture", "mlp"), inputs, hidden, outputs)
    arena = Arena.build(sizes, **kind)
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

    def in_torch(dtype):
        leaves = weight.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(to_input)
        network = partial(reference.mlp, net=arena.actor, mask=mask)
        found = differentiate(lambda weight, x: network(x, weight), *leaves, dy=dy.to(dtype))
        return [tensor.detach() for tensor in found]

    expected = in_torch(torch.float64)
    if arena.actor.has_layernorm:
        # LayerNorm of two units that are nearly equal is as steep as a step.
        scale = max((float(each.abs().max()) for each in expected if each.numel()), default=1.0)
        errors = [
            (one - other).abs()
            for one, other in zip(expected, in_torch(torch.float32), strict=True)
        ]
        steep = 4 * max((float(error.max()) for error in errors if error.numel()), default=0.0)
        bounds = len(expected) * [max(TOLERANCE * max(scale, 1e-2), steep)]
    else:
        scales = [float(each.abs().max()) if each.numel() else 1.0 for each in expected]
        bounds = [TOLERANCE * max(scale, 1e-2) for scale in scales]
    for ours, theirs, atol in zip(found, expected, bounds, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)
    assert not found[1][:, : arena.prunable][~mask].any()


others = {
    "tickets": st.integers(0, 3),
    "samples": st.sampled_from([0, 1, 5, 33]),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "seed": st.integers(0, 99),
}
in_triton = {"activation": st.sampled_from(KNOWN), **others}


@given(sizes=networks, **others, **KINDS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_on_the_cpu(**shape) -> None:
    _assert_equals_float64("cpu", **shape)


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@given(sizes=networks, **in_triton)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_in_triton(**shape) -> None:
    _assert_equals_float64("triton", **shape)


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@given(sizes=in_registers, **in_triton)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_in_registers_in_triton(**shape) -> None:
    """Without the input's gradient, in one launch."""
    _assert_equals_float64("triton", **shape, to_input=False)
