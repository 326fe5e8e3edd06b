"""SparseProp (Nikdan et al., 2023): AVX2 kernels over compressed rows, forward and backward.

Its threads are OpenMP's own: `OMP_NUM_THREADS` or every core, not torch's count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_tickets.timing import Contender

from ..problems import LinearProblem
from . import Unavailable

NAME = "SparseProp"
REASON = (
    "SparseProp is not installed: pip install sparseprop compiles it, with a C++ compiler "
    "and for the AVX2 of this machine"
)


def linear_forward(problem: LinearProblem) -> Contender:
    """One ticket, row-major in and out.

    Raises:
        Unavailable: SparseProp is not installed, not float32 on a CPU, or more than one ticket.
    """
    layer, x = _layer(problem), problem.x[0]

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return problem.contender(NAME, run)


def linear_backward(problem: LinearProblem) -> Contender:
    """The same with gradients; dW comes back as the kept values, and is spread out untimed.

    Raises:
        Unavailable: see `linear_forward`.
    """
    layer, x, dy = _layer(problem), problem.x[0].clone().requires_grad_(), problem.dy[0]

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))

    def dense(kept: Tensor) -> Tensor:
        dw = torch.zeros_like(problem.weight)
        dw[problem.weight != 0] = kept
        return dw

    return problem.contender(NAME, run, dw=dense)


def _layer(problem: LinearProblem) -> nn.Module:
    if problem.device.type != "cpu" or problem.dtype != torch.float32:
        raise Unavailable("SparseProp knows float32 on the CPU only")
    if len(problem.x) != 1:
        raise Unavailable("SparseProp has no batched product: one ticket only")
    try:
        from sparseprop.modules import SparseLinear
    except ImportError as error:
        raise Unavailable(REASON) from error
    return SparseLinear(problem.weight[0], bias=nn.Parameter(problem.bias[0].clone()))
