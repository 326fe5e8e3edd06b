"""Inputs of the benchmarks, and what the float64 reference makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.linear import reference as linear_reference
from sparse_tickets.kernels.mlp import reference as mlp_reference
from sparse_tickets.kernels.prune import prune

__all__ = [
    "SPARSITIES",
    "LinearProblem",
    "PolicyProblem",
    "density_of",
    "random_masks",
    "two_of_four",
]

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of weights pruned."""


def density_of(sparsity: float) -> float:
    """Share of weights kept, free of the rounding of ``1 - 0.99``."""
    return round((100.0 - sparsity) / 100.0, 6)


def random_masks(
    tickets: int, prunable: int, sparsity: float, generator: torch.Generator
) -> Tensor:
    """``[P, N]`` bool: a different unstructured mask per ticket, equally many kept in each."""
    scores = torch.rand(tickets, prunable, generator=generator)
    everything = torch.ones_like(scores, dtype=torch.bool)
    with use_backend("reference"):
        return prune(scores, everything, round(density_of(sparsity) * prunable))


def two_of_four(tickets: int, out: int, inp: int, generator: torch.Generator) -> Tensor:
    """``[P, O, I]`` bool: two of every four neighbours in a row are kept."""
    scores = torch.rand(tickets, out, inp // 4, 4, generator=generator)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(3, scores.topk(2, dim=3).indices, True).flatten(2)


class LinearProblem:
    """One linear layer of P tickets: ``x [P, B, I]``, ``weight [P, O, I]``, masks all different.

    Masks are unstructured, made of full ``block`` x ``block`` squares, or ``2:4``.
    """

    def __init__(
        self,
        tickets: int,
        batch: int,
        inp: int,
        out: int,
        sparsity: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        block: int = 1,
        two_four: bool = False,
    ) -> None:
        if out % block or inp % block:
            raise ValueError(f"block must divide {out} and {inp}, got {block}")
        if two_four and (sparsity != 50.0 or inp % 4 or block != 1):
            raise ValueError("two_four needs sparsity 50, inputs in fours and no block")
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        self.sparsity, self.dtype, self.device = sparsity, dtype, torch.device(device)
        self.x = draw(tickets, batch, inp)
        if two_four:
            mask = two_of_four(tickets, out, inp, generator)
        else:
            blocks = random_masks(tickets, out * inp // block**2, sparsity, generator)
            mask = blocks.unflatten(1, (out // block, inp // block))
            mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)
        self.mask = mask.to(device)
        self.weight = draw(tickets, out, inp, scale=inp**-0.5).masked_fill_(~self.mask, 0)
        self.bias = draw(tickets, out)
        self.dy = draw(tickets, batch, out)

    @property
    def density(self) -> float:
        """Nominal share of weights kept."""
        return density_of(self.sparsity)

    @property
    def terms(self) -> tuple[int, ...]:
        """Lengths of the sums behind y, dx, dW and db."""
        _, batch, inp = self.x.shape
        return inp, self.weight.shape[1], batch, batch

    @cached_property
    def forward(self) -> tuple[Tensor, ...]:
        """``(y,)`` in float64."""
        x, weight, bias = self.x.double(), self.weight.double(), self.bias.double()
        return (linear_reference.linear(x, weight, self.mask, bias),)

    @cached_property
    def forward_backward(self) -> tuple[Tensor, ...]:
        """``(y, dx, dW, db)`` in float64; dW is zero off the mask."""
        x, weight, dy = self.x.double(), self.weight.double(), self.dy.double()
        dx = linear_reference.linear_dx(dy, weight, self.mask)
        return (*self.forward, dx, linear_reference.linear_dw(dy, x, self.mask), dy.sum(1))

    def alike(self, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(y, dx, dW, db)``, or the first of them, of a lone ticket or of all: as for all."""
        wanted = self.forward_backward
        found = zip(results, wanted[: len(results)], strict=True)
        return tuple(result.detach().view_as(expected) for result, expected in found)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, weight, bias)`` as fresh leaves that want gradients."""
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, self.weight, self.bias))
        return x, weight, bias


@dataclass
class PolicyProblem:
    """Policies of P tickets, global masks all different, forward and backward to the weights."""

    tickets: int = 60
    batch: int = 128
    sizes: tuple[int, ...] = (4, 64, 64, 2)
    sparsity: float = 90.0
    activation: str = "tanh"
    device: torch.device | str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.arena = Arena.build(self.sizes, activation=self.activation)
        size, prunable = self.arena.size, self.arena.prunable
        mask = random_masks(self.tickets, prunable, self.sparsity, generator)
        weight = torch.randn(self.tickets, size, generator=generator)
        for matrix, bias in self.arena.actor.layers(weight):
            matrix.mul_(matrix.shape[2] ** -0.5)
            bias.mul_(0.1)
        weight[:, :prunable].masked_fill_(~mask, 0)
        self.mask, self.weight = mask.to(self.device), weight.to(self.device)
        shape = (self.tickets, self.batch)
        self.x = torch.randn(*shape, self.sizes[0], generator=generator).to(self.device)
        self.dy = torch.randn(*shape, self.sizes[-1], generator=generator).to(self.device)

    @property
    def density(self) -> float:
        """Nominal share of weights kept."""
        return density_of(self.sparsity)

    @property
    def terms(self) -> tuple[int, ...]:
        """Lengths of the sums behind the output and the gradients, over all layers."""
        return sum(self.sizes), self.batch + sum(self.sizes)

    @cached_property
    def forward_backward(self) -> tuple[Tensor, ...]:
        """``(y [P, B, O], dweight [P, size])`` in float64."""
        weight = self.weight.double().requires_grad_()
        y = mlp_reference.mlp(self.x.double(), weight, self.arena.actor, self.mask)
        (grad,) = torch.autograd.grad(y, weight, self.dy.double())
        return y.detach(), grad

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer ``(weight [P, O, I], bias [P, O], mask)`` as leaves of their own."""
        net = self.arena.actor
        return [
            (
                weight.clone().requires_grad_(),
                bias.clone().requires_grad_(),
                net.weight(self.mask, layer).contiguous(),
            )
            for layer, (weight, bias) in enumerate(net.layers(self.weight))
        ]

    def gather(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of `layers` (weight, bias, weight, ...) as an arena row, zero off the mask."""
        flat = torch.zeros_like(self.weight)
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        for (weight, bias), (dw, db) in zip(self.arena.actor.layers(flat), pairs, strict=True):
            weight.copy_(dw)
            bias.copy_(db)
        flat[:, : self.arena.prunable].masked_fill_(~self.mask, 0)
        return flat
