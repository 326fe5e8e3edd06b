"""A network layer by layer, by ops that are differentiable any number of times.

Slower than the fused kernels, whose gradients are numbers to autograd: these run where a gradient
is itself differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arena import Net
from ..linear import linear
from .reference import walk


def mlp(x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, precision: str) -> Tensor:
    """Arguments and result as the op's."""

    def product(layer: int, x: Tensor) -> Tensor:
        matrix, inside = net.weight(weight, layer), None
        if mask is not None and net.weights[layer] < mask.shape[1]:
            inside = net.weight(mask, layer)
            matrix = torch.where(inside, matrix, 0)
        return linear(x, matrix, inside, net.bias(weight, layer), precision=precision)

    _, outputs = walk(x, net, product)
    return outputs[-1]
