"""Activations between a network's layers, by name: one entry each, with its derivative.

The derivative is read off the output. Besides torch's terms here an activation needs a branch in
`activations_cpu` (Numba) and in `mlp.fused_gpu` and `rollout.policy_gpu` (Triton); until then their
kernels refuse it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "TorchActivation", "check_on_gpu"]


class TorchActivation(NamedTuple):
    """One activation in torch's terms.

    Attributes:
        function: of a layer's products; autograd knows its derivative.
        into: ``into(x, y)`` writes its value at x to y.
        derive: ``derive(dy, y, dx)`` writes the gradient by x to dx.
    """

    function: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    derive: Callable[[Tensor, Tensor, Tensor], Tensor]


_aten = torch.ops.aten

ACTIVATIONS = {
    "tanh": TorchActivation(
        torch.tanh,
        lambda x, y: torch.tanh(x, out=y),
        lambda dy, y, dx: _aten.tanh_backward.grad_input(dy, y, grad_input=dx),
    ),
    "relu": TorchActivation(
        torch.relu,
        lambda x, y: torch.clamp_min(x, 0, out=y),
        lambda dy, y, dx: _aten.threshold_backward.grad_input(dy, y, 0, grad_input=dx),
    ),
}

_ON_GPU = ("tanh", "relu")


def check_on_gpu(name: str) -> None:
    """Raise ``ValueError`` unless the Triton kernels know this activation."""
    if name not in _ON_GPU:
        raise ValueError(f"activation must be one of {', '.join(_ON_GPU)} on a GPU, got {name!r}")
