"""SciPy's CSR product: single-threaded C++, here as the plainest sparse code one can install."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import LinearProblem
from . import Unavailable

NAME = "scipy CSR (1 thread)"


def linear_forward(problem: LinearProblem) -> Contender:
    """One ticket, row-major in and out.

    Raises:
        Unavailable: SciPy is not installed, the tensors are on a GPU, or more than one ticket.
    """
    if problem.device.type != "cpu":
        raise Unavailable("SciPy runs on the CPU only")
    if len(problem.x) != 1:
        raise Unavailable("SciPy has no batched sparse product: one ticket only")
    try:
        from scipy.sparse import csr_array
    except ImportError as missing:
        raise Unavailable(
            "scipy is not installed: pip install 'sparse-tickets[bench]'"
        ) from missing
    weight = csr_array(problem.weight[0].numpy())
    x, bias = problem.x[0].numpy(), problem.bias[0].numpy()

    def run() -> Tensor:
        y = np.ascontiguousarray((weight @ x.T).T)
        y += bias
        return torch.from_numpy(y)

    return problem.contender(NAME, run)
