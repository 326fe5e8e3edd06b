"""Our own ops as contenders, on a named backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.dispatch import has_triton, resolve_backend
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked, plan_for
from sparse_tickets.kernels.linear import plan as linear_plan
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.mlp import plan as mlp_plan
from sparse_tickets.kernels.prune import prune
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import Contender

from .problems import LinearProblem, PolicyProblem, PruneProblem, difference

OURS = "sparse_tickets"
Result = TypeVar("Result")

BACKENDS = ("reference", "cpu", *(["triton"] if torch.cuda.is_available() and has_triton() else []))
"""Triton's interpreter is far too slow to time: only with a GPU."""


def device_of(backend: str) -> str:
    """``cuda`` for Triton, the CPU for others."""
    return "cuda" if backend == "triton" else "cpu"


def swept(levels: Sequence[float], backends: Sequence[str] = BACKENDS) -> list[tuple[str, float]]:
    """Every backend at every sparsity or level, but the reference at the first and the middle.

    Plain torch multiplies by zeros as by anything else: two levels show that its time stays.
    """
    few = {levels[0], levels[len(levels) // 2]}
    return [
        (backend, level)
        for backend in backends
        for level in levels
        if backend != "reference" or level in few
    ]


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
    row, precision = problem.x[0], problem.precision

    def run() -> Tensor:
        if layer is not None:
            return layer(row)
        return linear(problem.x, problem.weight, problem.mask, problem.bias, precision=precision)

    plan = _linear_plan(problem, backend, layer, training=False)
    return problem.contender(name, on_backend(backend, run), plan=plan)


def linear_backward(problem: LinearProblem, backend: str = "auto", name: str = OURS) -> Contender:
    """The same and its gradients for x, weight and bias."""
    x, weight, bias = problem.leaves()
    layer = _module(problem, trained=True)
    row, row_dy = problem.x[0].clone().requires_grad_(), problem.dy[0]

    def run() -> tuple[Tensor, ...]:
        if layer is not None:
            y = layer(row)
            return y, *torch.autograd.grad(y, (row, layer.weight, layer.bias), row_dy)
        y = linear(x, weight, problem.mask, bias, precision=problem.precision)
        return y, *torch.autograd.grad(y, (x, weight, bias), problem.dy)

    plan = _linear_plan(problem, backend, layer, training=True)
    return problem.contender(name, on_backend(backend, run), plan=plan)


def backward_blocked(problem: LinearProblem, block: int) -> Contender:
    """``(y, dx, dW, db)`` of `kernels.linear.linear_blocked`: of kept blocks alone."""
    x, weight, bias = problem.leaves()
    pattern = block_pattern(problem.mask, block)

    def run() -> tuple[Tensor, ...]:
        y = linear_blocked(x, weight, pattern, bias, precision=problem.precision)
        return (y, *torch.autograd.grad(y, (x, weight, bias), problem.dy))

    return problem.contender(OURS, run, plan=f"linear: blocked {block}")


def prune_to(problem: PruneProblem) -> Contender:
    """`kernels.prune.prune`, told to look at nothing that would wait for a GPU."""

    def run() -> Tensor:
        return prune(problem.scores, problem.mask, problem.k, check=False)

    return problem.contender(OURS, run, plan="prune")


def _module(problem: LinearProblem, trained: bool) -> SparseLinear | None:
    """What a user of one policy calls; a population has no module."""
    tickets, out, inp = problem.weight.shape
    if tickets != 1 or problem.dtype != torch.float32:
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
    return problem.contender(name, on_backend(backend, run), lambda found: found, chosen)


def layer_inside(deep: PolicyProblem, shallow: PolicyProblem, name: str = OURS) -> Contender:
    """What a layer costs inside `kernels.mlp.mlp`: two depths, the difference per layer between.

    Activations stay packed between the layers of a network; packing the input and unpacking the
    output is in both depths and cancels. Both are verified, forward alone.
    """
    chosen = mlp_plan(deep.arena.actor, deep.x.device, density=deep.density)
    plan = f"mlp: {chosen.backend}/{chosen.format.split('/')[-1]} (inside a network)"
    problems = deep, shallow
    return difference(name, problems, [partial(_forward, problem) for problem in problems], plan)


def _forward(problem: PolicyProblem) -> Tensor:
    net = problem.arena.actor
    return mlp(problem.x, problem.weight, net, problem.mask, density=problem.density)


def _linear_plan(
    problem: LinearProblem,
    backend: str,
    layer: SparseLinear | None,
    training: bool,
) -> str:
    batch, device = problem.x.shape[1], problem.x.device
    with use_backend(backend):
        if layer is not None:
            return str(layer.plan(batch, training=training))
        if device.type == "cpu":
            return str(plan_for(problem.mask[0], batch, problem.dtype, training))
        _, out, inp = problem.weight.shape
        return str(linear_plan(out, inp, batch, problem.density, problem.dtype, device))
