"""``weight * mask`` on every call, then the dense product: what pruning libraries do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import LinearProblem, PolicyProblem
from .torch_dense import batched, network, trained

NAME = "torch w*mask"


def _one_or_all(problem: LinearProblem, trained: bool) -> list[Tensor]:
    """``x, weight, mask, bias, dy``: of a lone ticket without the axis of tickets."""
    tensors = [problem.x, problem.weight, problem.mask, problem.bias, problem.dy]
    if len(problem.x) == 1:
        tensors = [tensor[0] for tensor in tensors]
    leaves = [tensor.clone() for tensor in tensors]
    for place in (0, 1, 3):
        leaves[place].requires_grad_(trained)
    return leaves


def _apply(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return (F.linear if x.dim() == 2 else batched)(x, weight * mask, bias)


def linear_forward(problem: LinearProblem) -> Contender:
    """Masked, then `F.linear` for one ticket, `torch.baddbmm` for several."""
    *parts, _ = _one_or_all(problem, trained=False)
    return problem.contender(NAME, lambda: _apply(*parts))


def linear_backward(problem: LinearProblem) -> Contender:
    """The same with gradients; autograd masks dW."""
    x, weight, mask, bias, dy = _one_or_all(problem, trained=True)

    def run() -> tuple[Tensor, ...]:
        y = _apply(x, weight, mask, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), dy)

    return problem.contender(NAME, run)


def policy(problem: PolicyProblem) -> Contender:
    """A population's policies with a per-ticket mask, as one would vmap them."""
    return trained(NAME, problem, *network(problem, masked=True))
