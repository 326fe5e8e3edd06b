"""Our own ops as contenders, on a named backend and in a named format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.dispatch import resolve_backend
from sparse_tickets.kernels.linear import linear
from sparse_tickets.kernels.linear import plan as linear_plan
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.mlp import plan as mlp_plan
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import Contender, mismatch

from .problems import LinearProblem, PolicyProblem

__all__ = ["OURS", "linear_backward", "linear_forward", "on_backend", "policy"]

OURS = "sparse_tickets"
Result = TypeVar("Result")


def on_backend(name: str, run: Callable[[], Result]) -> Callable[[], Result]:
    """``run`` under `use_backend(name)`; ``auto`` adds nothing to the timed call."""
    if name == "auto":
        return run

    def chosen() -> Result:
        with use_backend(name):
            return run()

    return chosen


def linear_forward(problem: LinearProblem, backend: str = "auto", name: str = OURS) -> Contender:
    """`SparseLinear` for one ticket, `kernels.linear.linear` for several; row-major in and out."""
    layer = _module(problem, trained=False)
    row = problem.x[0]

    def run() -> Tensor:
        if layer is not None:
            return layer(row)[None]
        return linear(problem.x, problem.weight, problem.mask, problem.bias)

    timed = on_backend(backend, run)
    return Contender(
        name,
        timed,
        lambda: mismatch([timed()], problem.forward, problem.terms[:1]),
        plan=_linear_plan(problem, backend, layer),
    )


def linear_backward(problem: LinearProblem, backend: str = "auto", name: str = OURS) -> Contender:
    """The same and its gradients for x, weight and bias."""
    x, weight, bias = problem.leaves()
    layer = _module(problem, trained=True)
    row = problem.x[0].clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        if layer is not None:
            y = layer(row)
            parts = (row, layer.weight, layer.bias)
            grads = torch.autograd.grad(y, parts, problem.dy[0])
            return tuple(part[None] for part in (y.detach(), *grads))
        y = linear(x, weight, problem.mask, bias)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), problem.dy))

    timed = on_backend(backend, run)
    return Contender(
        name,
        timed,
        lambda: mismatch(timed(), problem.forward_backward, problem.terms),
        plan=_linear_plan(problem, backend, layer),
    )


def _module(problem: LinearProblem, trained: bool) -> SparseLinear | None:
    """What a user of one policy calls; a population has no module."""
    tickets, out, inp = problem.weight.shape
    if tickets != 1 or problem.dtype != torch.float32 or problem.mask is None:
        return None
    layer = SparseLinear(inp, out, device=problem.x.device, mask=problem.mask[0])
    with torch.no_grad():
        layer.weight.copy_(problem.weight[0])
        layer.bias.copy_(problem.bias[0])
    layer.apply_mask_()
    return layer.requires_grad_(trained)


def policy(
    problem: PolicyProblem, backend: str = "auto", density: float | None = None, name: str = OURS
) -> Contender:
    """`kernels.mlp.mlp` and its gradient; ``density`` overrides the nominal one: 1 runs dense."""
    nominal = problem.density if density is None else density
    net = problem.arena.actor
    weight = problem.weight.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        y = mlp(problem.x, weight, net, problem.mask, density=nominal)
        return y.detach(), torch.autograd.grad(y, weight, problem.dy)[0]

    with use_backend(backend):
        resolve_backend(problem.x.device)
        chosen = str(mlp_plan(net, problem.x.device, density=nominal))
    timed = on_backend(backend, run)
    return Contender(
        name,
        timed,
        lambda: mismatch(timed(), problem.forward_backward, problem.terms),
        plan=chosen,
    )


def _linear_plan(problem: LinearProblem, backend: str, layer: SparseLinear | None) -> str:
    _, out, inp = problem.weight.shape
    batch, density = problem.x.shape[1], problem.density
    with use_backend(backend):
        if layer is not None:
            return str(layer.plan(batch, training=layer.weight.requires_grad))
        return str(linear_plan(out, inp, batch, density, problem.dtype, problem.x.device))
