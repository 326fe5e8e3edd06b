"""Our own ops as contenders on a GPU: packed, blocked, dense with a mask, and pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.kernels import adam_
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked
from sparse_tickets.kernels.prune import prune
from sparse_tickets.timing import Contender

from .gpu_problems import ADAM, LayerProblem, Step, distance
from .ours import OURS

__all__ = [
    "DENSE_MASK",
    "adam_masked",
    "backward_blocked",
    "backward_masked",
    "prune_to",
    "step_masked",
]

DENSE_MASK = "sparse_tickets, dense+mask"
"""Our own kernels on the dense weight: what sparsity alone gains is over this."""


class _Masked:
    """A dense weight with its mask, and Adam's state, as rows of an arena."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem, self.mask = problem, problem.mask.flatten(1)
        self.rate = torch.full((len(problem.x),), ADAM["lr"], device=problem.device)
        self.restart()

    def restart(self) -> None:
        self.x = self.problem.x.clone().requires_grad_()
        self.row = self.problem.weight.flatten(1).clone()
        self.weight = self.row.view_as(self.problem.weight).requires_grad_()
        self.m, self.v = torch.zeros_like(self.row), torch.zeros_like(self.row)
        self.count = torch.zeros(len(self.row), dtype=torch.int64, device=self.row.device)

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, dx, dW)``."""
        problem = self.problem
        y = linear(self.x, self.weight, problem.mask, precision=problem.precision)
        return (y.detach(), *torch.autograd.grad(y, (self.x, self.weight), problem.dy))

    def update(self, dw: Tensor) -> None:
        beta1, beta2 = ADAM["betas"]
        adam_(
            *(self.row, dw.flatten(1), self.m, self.v, self.count, self.rate, self.mask),
            max_norm=None,
            beta1=beta1,
            beta2=beta2,
            eps=ADAM["eps"],
        )

    def found(self, y: Tensor, dx: Tensor) -> Step:
        shape = self.problem.weight.shape[1:]
        return Step(y, dx, *(t.unflatten(1, shape) for t in (self.row, self.m, self.v)))


def step_masked(problem: LayerProblem) -> Contender:
    """Forward, backward and one masked Adam step on the dense weight."""
    layer = _Masked(problem)

    def run() -> tuple[Tensor, Tensor]:
        y, dx, dw = layer.products()
        layer.update(dw)
        return y, dx

    def error() -> float:
        layer.restart()
        return problem.step_error(layer.found(*run()))

    return Contender(DENSE_MASK, run, error, plan="linear: dense+mask; adam_: masked")


def adam_masked(problem: LayerProblem) -> Contender:
    """One masked Adam step on the dense weight."""
    layer = _Masked(problem)
    _, _, dw = layer.products()

    def error() -> float:
        layer.restart()
        layer.update(dw)
        return problem.step_error(layer.found(problem.step.y, problem.step.dx))

    return Contender(DENSE_MASK, lambda: layer.update(dw), error, plan="adam_: masked")


def backward_masked(problem: LayerProblem) -> Contender:
    """``(y, dx, dW, db)`` with a mask that only the gradient needs."""
    x, weight, bias = problem.leaves()

    def run() -> tuple[Tensor, ...]:
        y = linear(x, weight, problem.mask, bias, precision=problem.precision)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), problem.dy))

    def error() -> float:
        return distance(run(), problem.forward_backward, problem.terms, problem.precision)

    return Contender(OURS, run, error, plan="linear: dense+mask")


def backward_blocked(problem: LayerProblem, block: int) -> Contender:
    """``(y, dx, dW, db)`` of kept blocks alone."""
    x, weight, bias = problem.leaves()
    pattern = block_pattern(problem.mask, block)

    def run() -> tuple[Tensor, ...]:
        y = linear_blocked(x, weight, pattern, bias, precision=problem.precision)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), problem.dy))

    def error() -> float:
        return distance(run(), problem.forward_backward, problem.terms, problem.precision)

    return Contender(OURS, run, error, plan=f"linear: blocked {block}")


def prune_to(scores: Tensor, mask: Tensor, kept: int, expected: Tensor) -> Contender:
    """Exactly ``kept`` per ticket; wrong entries: none are allowed."""
    k = torch.full((len(scores),), kept, device=scores.device)

    def run() -> Tensor:
        return prune(scores, mask, k, check=False)

    return Contender(OURS, run, lambda: 2.0 * float((run() != expected).sum()), plan="prune")
