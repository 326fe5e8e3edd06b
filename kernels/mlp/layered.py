"""A network layer by layer, by ops that are differentiable any number of times.

Slower than the fused kernels, whose gradients are numbers to autograd: these run where a gradient
is itself differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..arena import Net
from ..linear import linear

__all__ = ["mlp"]


def mlp(x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, precision: str) -> Tensor:
    """Arguments and result as the op's."""
    for layer, begin in enumerate(net.weights):
        matrix, inside = net.weight(weight, layer), None
        if mask is not None and begin < mask.shape[1]:
            inside = net.weight(mask, layer)
            matrix = torch.where(inside, matrix, 0)
        x = linear(x, matrix, inside, net.bias(weight, layer), precision=precision)
        if layer < net.depth - 1:
            x = ACTIVATIONS[net.activation].function(x)
    return x
