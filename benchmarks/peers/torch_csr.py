"""Torch's own sparse tensors: `F.linear` with a CSR weight built before the clock starts."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_tickets.timing import Contender, mismatch

from ..problems import LinearProblem
from . import Unavailable

__all__ = ["NAME", "linear_backward", "linear_forward"]

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
    weight, x, bias = _compress(problem), problem.x[0], problem.bias[0]

    def run() -> Tensor:
        return F.linear(x, weight, bias)

    return Contender(NAME, run, lambda: mismatch([run()[None]], problem.forward, problem.terms[:1]))


def linear_backward(problem: LinearProblem) -> Contender:
    """One ticket, with gradients; dW comes back dense, and is masked untimed.

    Raises:
        Unavailable: more than one ticket.
    """
    weight = _compress(problem).requires_grad_()
    x, bias = (t[0].clone().requires_grad_() for t in (problem.x, problem.bias))
    dy = problem.dy[0]

    def run() -> tuple[Tensor, ...]:
        y = F.linear(x, weight, bias)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))

    def error() -> float:
        y, dx, dw, db = run()
        dw = (dw.to_dense() if dw.layout != torch.strided else dw)[None]
        results = (y[None], dx[None], dw.masked_fill(~problem.mask, 0), db[None])
        return mismatch(results, problem.forward_backward, problem.terms)

    return Contender(NAME, run, error)
