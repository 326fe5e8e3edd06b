"""Gradients of networks that are differentiated again, on every backend against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
KERNELS = ["cpu", pytest.param("triton", marks=needs_triton)]
BACKENDS = ["reference", *KERNELS]
# Sums of at most a hundred products, through four layers three times: 64 roundings.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


class TwiceDifferentiated:
    """Networks of some sizes beside another one in the row, their input, and directions."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        density: float,
        *,
        activation: str = "tanh",
        tickets: int = 2,
        samples: int = 5,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(sizes) + samples)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.arena = Arena.build((3, 4, 1), sizes, activation=activation, prune_critic=True)
        self.net = self.arena.critic
        self.x = draw(tickets, samples, sizes[0])
        self.mask = torch.rand(tickets, self.arena.prunable, generator=generator) < density
        self.weight = draw(tickets, self.arena.size) / max(sizes) ** 0.5
        self.weight[:, : self.arena.prunable].masked_fill_(~self.mask, 0)
        self.dy = draw(tickets, samples, sizes[-1])
        self.directions = draw(*self.x.shape), draw(*self.weight.shape)

    def on(self, backend: str) -> TwiceDifferentiated:
        """Where a backend computes."""
        if backend == "triton" and torch.cuda.is_available():
            for name in ("x", "mask", "weight", "dy"):
                setattr(self, name, getattr(self, name).cuda())
            self.directions = tuple(tensor.cuda() for tensor in self.directions)
        return self

    def twice(self, backend: str, *, dtype: torch.dtype, to_input: bool) -> Any:
        """First derivatives, and those of their sum along the directions, by x, weight and dy."""
        x, weight, dy = (t.to(dtype).requires_grad_() for t in (self.x, self.weight, self.dy))
        of_x, of_weight = (direction.to(dtype) for direction in self.directions)
        with use_backend(backend):
            y = mlp(x if to_input else x.detach(), weight, self.net, self.mask)
            leaves = (x, weight) if to_input else (weight,)
            first = torch.autograd.grad(y, leaves, dy, create_graph=True)
            along = (of_x, of_weight) if to_input else (of_weight,)
            total = sum((g * d).sum() for g, d in zip(first, along, strict=True))
            # The gradient of a single layer's weight does not depend on the weight.
            sources = (*leaves, dy)
            options = {"allow_unused": True, "materialize_grads": True}
            second = torch.autograd.grad(total, sources, **options)
        return *(gradient.detach() for gradient in first), *second


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = max(float(other.abs().max()) if other.numel() else 1.0, 1.0)
        torch.testing.assert_close(one.double().cpu(), other.cpu(), rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=5).map(tuple),
    activation=st.sampled_from(KNOWN),
    tickets=st.integers(0, 2),
    samples=st.sampled_from([0, 1, 5, 17]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    to_input=st.booleans(),
)
def test_any_network(backend, to_input, sizes, density, **shape) -> None:
    given = TwiceDifferentiated(sizes, density, **shape).on(backend)
    found = given.twice(backend, dtype=torch.float32, to_input=to_input)
    exact = given.twice("reference", dtype=torch.float64, to_input=to_input)
    assert_near(found, exact)
    by_weight = found[3 if to_input else 1]
    assert not by_weight[:, : given.arena.prunable][~given.mask].any()


@pytest.mark.parametrize("sizes", [(4, 64, 64, 2), (5, 130, 3), (3, 300, 2)])
@needs_triton
def test_every_route_of_a_gpu(sizes) -> None:
    given = TwiceDifferentiated(sizes, 0.3, samples=17).on("triton")
    found = given.twice("triton", dtype=torch.float32, to_input=True)
    assert_near(found, given.twice("reference", dtype=torch.float64, to_input=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_is_the_same_where_it_may_be_differentiated(backend) -> None:
    given = TwiceDifferentiated((6, 9, 7, 2), 0.5).on(backend)
    x, weight = given.x.requires_grad_(), given.weight.requires_grad_()
    with use_backend(backend):
        found, again = (
            torch.autograd.grad(
                mlp(x, weight, given.net, given.mask), (x, weight), given.dy, create_graph=create
            )
            for create in (False, True)
        )
    for one, other in zip(found, again, strict=True):
        assert not one.requires_grad
        assert other.requires_grad
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_weights_made_from_the_input(backend) -> None:
    """What a weight was made from is not what the network was given."""

    def differentiate(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = TwiceDifferentiated((3, 6, 2), 0.7).on(backend)
        x = given.x.to(dtype).requires_grad_()
        with use_backend(backend):
            weight = given.weight.to(dtype) * x.sum((1, 2))[:, None].sin()
            y = mlp(x, weight, given.net, given.mask)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    assert_near(differentiate(backend, torch.float32), differentiate("reference", torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
def test_three_times(backend) -> None:
    def differentiate(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = TwiceDifferentiated((3, 6, 2), 0.7).on(backend)
        weight = given.weight.to(dtype).requires_grad_()
        with use_backend(backend):
            total = mlp(given.x.to(dtype), weight, given.net, given.mask).square().sum()
            for _ in range(2):
                (gradient,) = torch.autograd.grad(total, weight, create_graph=True)
                total = gradient.square().sum()
            return torch.autograd.grad(total, weight)

    found = differentiate(backend, torch.float32)
    (exact,) = differentiate("reference", torch.float64)
    assert exact.any()
    torch.testing.assert_close(found[0].double().cpu(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_backward_pass_under_autocast_is_of_the_forward_pass(backend, create_graph) -> None:
    given = TwiceDifferentiated((3, 6, 2), 0.7).on(backend)
    x, weight = given.x.requires_grad_(), given.weight.requires_grad_()

    def differentiate(cast: bool) -> tuple[Tensor, ...]:
        with use_backend(backend):
            loss = mlp(x, weight, given.net, given.mask).square().sum()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
            return torch.autograd.grad(loss, (x, weight), create_graph=create_graph)

    for plain, cast in zip(differentiate(False), differentiate(True), strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_input_may_change_in_between(backend) -> None:
    given = TwiceDifferentiated((3, 6, 2), 0.7).on(backend)
    with use_backend(backend):
        y = mlp(given.x, given.weight.requires_grad_(), given.net, given.mask)
        given.x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), given.weight, create_graph=True)
