"""A network layer by layer, by ops that are differentiable any number of times.

Slower than the fused kernels, whose gradients are numbers to autograd: these run where a gradient
is itself differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arena import Net
from ..linear import linear
from ..packed import registration as packed
from ..packed.layout import lay_out

__all__ = ["mlp", "mlp_packed"]


def mlp(x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, precision: str) -> Tensor:
    """Arguments and result as the op's."""
    for layer, begin in enumerate(net.weights):
        matrix, inside = net.weight(weight, layer), None
        if mask is not None and begin < mask.shape[1]:
            inside = net.weight(mask, layer)
            matrix = torch.where(inside, matrix, 0)
        x = linear(x, matrix, inside, net.bias(weight, layer), precision=precision)
        x = _activate(x, net, layer)
    return x


def mlp_packed(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    rest: Tensor,
    net: Net,
    shapes: list[int],
    precision: str,
) -> Tensor:
    """Arguments and result as the op's."""
    places = lay_out(*shapes)
    first = [place.offset for place in places].index(net.weights[0])
    prunable = places[-1].offset + places[-1].out * places[-1].inp
    for layer, begin in enumerate(net.biases):
        bias = rest[:, begin - prunable : begin - prunable + net.sizes[layer + 1]]
        x = packed.LINEAR(x, values, bits, start, bias, shapes, first + layer, precision)
        x = _activate(x, net, layer)
    return x


def _activate(x: Tensor, net: Net, layer: int) -> Tensor:
    """Of every layer but the last."""
    if layer == net.depth - 1:
        return x
    return torch.tanh(x) if net.activation == "tanh" else torch.relu(x)
