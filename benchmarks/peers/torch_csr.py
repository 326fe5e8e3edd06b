"""Torch's own sparse tensors: `F.linear` with a CSR weight built before the clock starts."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import LinearProblem
from . import Unavailable

NAME = "torch CSR"


def _compress(problem: LinearProblem) -> Tensor:
    if len(problem.x) != 1:
        raise Unavailable("CSR tensors in a batch have no linear: one ticket only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "CSR support is in beta state"
        return problem.weight[0].to_sparse_csr()


def linear_forward(problem: LinearProblem) -> Contender:
    """One ticket.

    Raises:
        Unavailable: more than one ticket.
    """
    return compressed_forward(NAME, problem, _compress(problem))


def linear_backward(problem: LinearProblem) -> Contender:
    """One ticket, with gradients; dW comes back dense, and is masked untimed.

    Raises:
        Unavailable: more than one ticket.
    """
    return compressed_backward(NAME, problem, _compress(problem))


def compressed_forward(name: str, problem: LinearProblem, weight: Tensor) -> Contender:
    """`F.linear` of one ticket with a weight in whatever layout."""
    x, bias = problem.x[0], problem.bias[0]
    return problem.contender(name, lambda: F.linear(x, weight, bias))


def compressed_backward(name: str, problem: LinearProblem, weight: Tensor) -> Contender:
    """The same with gradients."""
    weight.requires_grad_()
    x, bias = (t[0].clone().requires_grad_() for t in (problem.x, problem.bias))
    dy = problem.dy[0]

    def run() -> tuple[Tensor, ...]:
        y = F.linear(x, weight, bias)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))

    def dense(dw: Tensor) -> Tensor:
        return problem.on_mask(dw if dw.layout == torch.strided else dw.to_dense())

    return problem.contender(name, run, dw=dense)
