"""Torch's dense product on explicit zeros (MKL on a CPU, cuBLAS on a GPU): the baseline."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sparse_tickets.timing import Contender, mismatch

from ..problems import LinearProblem, PolicyProblem

__all__ = ["NAME", "batched", "layer_inside", "linear_backward", "linear_forward", "policy"]

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
    networks = [partial(_chain, problem, problem.layers()) for problem in (deep, shallow)]
    return Contender(
        NAME,
        networks[0],
        lambda: max(
            mismatch([run()], problem.forward_backward[:1], problem.terms[:1])
            for run, problem in zip(networks, (deep, shallow), strict=True)
        ),
        units=deep.arena.actor.depth - shallow.arena.actor.depth,
        without=networks[1],
    )


@torch.no_grad()
def _chain(problem: PolicyProblem, layers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    y = problem.x
    for index, (weight, bias, _) in enumerate(layers):
        y = batched(y, weight, bias)
        if index < len(layers) - 1:
            y = torch.relu_(y) if problem.activation == "relu" else torch.tanh_(y)
    return y


def policy(problem: PolicyProblem) -> Contender:
    """Layer by layer as `torch.baddbmm`, every ticket at once."""
    layers, activate = problem.layers(), problem.activate
    leaves = [leaf for weight, bias, _ in layers for leaf in (weight, bias)]

    def run() -> tuple[Tensor, ...]:
        y = problem.x
        for index, (weight, bias, _) in enumerate(layers):
            y = batched(y, weight, bias)
            if index < len(layers) - 1:
                y = activate(y)
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.dy))

    return problem.contender(NAME, run)
