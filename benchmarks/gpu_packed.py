"""Packed weights as contenders: the products and Adam read and write the kept weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.kernels import adam_
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.packed import (
    build_pattern,
    linear_packed,
    pack,
    unpack,
    write_gradient_,
)
from sparse_tickets.kernels.packed import cost as packed_cost
from sparse_tickets.kernels.update import cost as update_cost
from sparse_tickets.timing import Contender

from .gpu_problems import ADAM, LayerProblem, Step
from .ours import OURS

__all__ = ["adam", "step", "step_cost"]


class _Packed:
    """One layer's values and Adam's state, packed; the pattern is built before the clock starts."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        tickets, out, inp = problem.weight.shape
        kept = int(problem.mask[0].sum())
        self.pattern = build_pattern(problem.mask.flatten(1), [(0, out, inp)], width=kept)
        self.rate = torch.full((tickets,), ADAM["lr"], device=problem.device)
        self.restart()

    def restart(self) -> None:
        self.x = self.problem.x.clone().requires_grad_()
        self.values = pack(self.problem.weight.flatten(1), self.pattern)
        self.m, self.v = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.gradient = torch.full_like(self.values, torch.nan)
        self.count = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)

    def products(self) -> tuple[Tensor, Tensor]:
        """``(y, dx)``; the packed dW goes to a buffer, as in a trainer's own backward pass."""
        precision, dy = self.problem.precision, self.problem.dy
        y = linear_packed(self.x, self.values, self.pattern, 0, precision=precision)
        (dx,) = torch.autograd.grad(y, self.x, dy)
        write_gradient_(self.gradient, dy, self.x, self.pattern, 0, precision=precision)
        return y.detach(), dx

    def update(self) -> None:
        """One Adam step."""
        beta1, beta2 = ADAM["betas"]
        adam_(
            *(self.values, self.gradient, self.m, self.v, self.count, self.rate, None),
            count=self.pattern.count,
            max_norm=None,
            beta1=beta1,
            beta2=beta2,
            eps=ADAM["eps"],
        )

    def found(self, y: Tensor, dx: Tensor) -> Step:
        shape = self.problem.weight.shape[1:]
        dense = (
            unpack(t.detach(), self.pattern).unflatten(1, shape)
            for t in (self.values, self.m, self.v)
        )
        return Step(y, dx, *dense)


def step(problem: LayerProblem) -> Contender:
    """Forward, backward and one Adam step on packed weights."""
    layer = _Packed(problem)

    def run() -> tuple[Tensor, Tensor]:
        found = layer.products()
        layer.update()
        return found

    def error() -> float:
        layer.restart()
        return problem.step_error(layer.found(*run()))

    return Contender(OURS, run, error, plan="linear_packed; adam_ on packed values")


def step_cost(problem: LayerProblem) -> Cost:
    """Of the three products and Adam; without clipping the norm is nobody's work."""
    tickets, batch, inp = problem.x.shape
    out, kept = problem.weight.shape[1], int(problem.mask[0].sum())
    cost = packed_cost.forward(tickets, batch, out, inp, kept)
    cost = cost.plus(packed_cost.dx(tickets, batch, out, inp, kept))
    cost = cost.plus(packed_cost.dw(tickets, batch, out, inp, kept))
    return cost.plus(update_cost.adam(tickets, kept, partials=True))


def adam(problem: LayerProblem) -> Contender:
    """One Adam step on packed weights."""
    layer = _Packed(problem)

    def error() -> float:
        layer.restart()
        layer.products()
        layer.update()
        return problem.step_error(layer.found(problem.step.y, problem.step.dx))

    return Contender(OURS, layer.update, error, plan="adam_ on packed values")
