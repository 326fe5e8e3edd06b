"""``weight * mask`` on every call, then the dense product: what pruning libraries do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_tickets.timing import Contender, mismatch

from ..problems import LinearProblem, PolicyProblem

__all__ = ["NAME", "linear_backward", "linear_forward", "masked_policy", "policy"]

NAME = "torch w*mask"


def _linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, (weight * mask).mT)


def linear_forward(problem: LinearProblem) -> Contender:
    """Masked, then `torch.baddbmm`."""

    def run() -> Tensor:
        return _linear(problem.x, problem.weight, problem.mask, problem.bias)

    return Contender(NAME, run, lambda: mismatch([run()], problem.forward, problem.terms[:1]))


def linear_backward(problem: LinearProblem) -> Contender:
    """The same with gradients; autograd masks dW."""
    x, weight, bias = problem.leaves()

    def run() -> tuple[Tensor, ...]:
        y = _linear(x, weight, problem.mask, bias)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), problem.dy))

    return Contender(NAME, run, lambda: mismatch(run(), problem.forward_backward, problem.terms))


def masked_policy(problem: PolicyProblem) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The parameters, and the network as a function of them."""
    layers = problem.layers()
    activation = torch.tanh if problem.activation == "tanh" else torch.relu

    def network() -> Tensor:
        y = problem.x
        for index, (weight, bias, mask) in enumerate(layers):
            y = _linear(y, weight, mask, bias)
            if index < len(layers) - 1:
                y = activation(y)
        return y

    return [leaf for weight, bias, _ in layers for leaf in (weight, bias)], network


def policy(problem: PolicyProblem) -> Contender:
    """A population's policies with a per-ticket mask, as one would vmap them."""
    leaves, network = masked_policy(problem)

    def run() -> tuple[Tensor, ...]:
        y = network()
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.dy))

    def error() -> float:
        y, *gradients = run()
        results = (y, problem.gather(gradients))
        return mismatch(results, problem.forward_backward, problem.terms)

    return Contender(NAME, run, error)
