"""Torch's dense product on explicit zeros (MKL on a CPU, cuBLAS on a GPU): the baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparse_tickets.timing import Contender

from ..problems import LinearProblem, PolicyProblem, difference

NAME = "torch dense"


def batched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer of all tickets at once, ``[P, B, I] -> [P, B, O]``."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def _layer(problem: LinearProblem, trained: bool) -> nn.Linear:
    """`nn.Linear`, as a policy holds it, with the weights of a lone ticket."""
    layer = nn.Linear(*problem.weight.shape[:0:-1], device="meta")
    layer.weight = nn.Parameter(problem.weight[0].clone(), requires_grad=trained)
    layer.bias = nn.Parameter(problem.bias[0].clone(), requires_grad=trained)
    return layer


def linear_forward(problem: LinearProblem) -> Contender:
    """`nn.Linear` for one ticket, `torch.baddbmm` for several."""
    layer = _layer(problem, trained=False) if len(problem.x) == 1 else None
    row = problem.x[0]

    def run() -> Tensor:
        if layer is not None:
            return layer(row)
        return batched(problem.x, problem.weight, problem.bias)

    return problem.contender(NAME, run)


def linear_backward(problem: LinearProblem) -> Contender:
    """The same with gradients; dW is dense, and masked untimed."""
    layer = _layer(problem, trained=True) if len(problem.x) == 1 else None
    row, row_dy = problem.x[0].clone().requires_grad_(), problem.dy[0]
    x, weight, bias = problem.leaves()

    def run() -> tuple[Tensor, ...]:
        if layer is not None:
            y = layer(row)
            return y, *torch.autograd.grad(y, (row, layer.weight, layer.bias), row_dy)
        y = batched(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), problem.dy)

    return problem.contender(NAME, run, dw=problem.on_mask)


def layer_inside(deep: PolicyProblem, shallow: PolicyProblem) -> Contender:
    """What a layer costs between others: two depths forward, the difference per layer between."""
    problems = deep, shallow
    networks = [partial(_chain, problem, problem.layers()) for problem in problems]
    return difference(NAME, problems, networks)


@torch.no_grad()
def _chain(problem: PolicyProblem, layers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    y = problem.x
    for index, (weight, bias, _) in enumerate(layers):
        y = batched(y, weight, bias)
        if index < len(layers) - 1:
            y = torch.relu_(y) if problem.activation == "relu" else torch.tanh_(y)
    return y


def network(problem: PolicyProblem, *, masked: bool) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The parameters, and every ticket's network at once as a function of them.

    Args:
        problem: whose.
        masked: multiply the masks in, on every call.
    """
    layers, activate = problem.layers(), problem.activate

    def forward() -> Tensor:
        y = problem.x
        for index, (weight, bias, mask) in enumerate(layers):
            y = batched(y, weight * mask if masked else weight, bias)
            if index < len(layers) - 1:
                y = activate(y)
        return y

    return [leaf for weight, bias, _ in layers for leaf in (weight, bias)], forward


def trained(
    name: str, problem: PolicyProblem, leaves: list[Tensor], forward: Callable[[], Tensor]
) -> Contender:
    """A network with the gradients of its parameters."""

    def run() -> tuple[Tensor, ...]:
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.dy))

    return problem.contender(name, run)


def policy(problem: PolicyProblem) -> Contender:
    """Layer by layer as `torch.baddbmm`, every ticket at once."""
    return trained(NAME, problem, *network(problem, masked=False))
