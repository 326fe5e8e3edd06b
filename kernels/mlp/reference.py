"""A network of a population as plain torch, one line per formula; autograd differentiates it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..arena import Net

__all__ = ["hidden_layers", "mlp"]


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    sums, _ = _layers(x, weight, net, mask)
    return sums[-1]


def hidden_layers(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    """``[P, B, net.kept]``, layer by layer in a row."""
    sums, outputs = _layers(x, weight, net, mask)
    sums = [] if ACTIVATIONS[net.activation].by_output else sums[:-1]
    return torch.cat([x[..., :0], *outputs, *sums], 2)


def _layers(
    x: Tensor, weight: Tensor, net: Net, mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What every layer sums up, and what activations make of that in the hidden ones."""
    if mask is not None:
        prunable = mask.shape[1]
        weight = torch.cat([torch.where(mask, weight[:, :prunable], 0), weight[:, prunable:]], 1)
    activation = ACTIVATIONS[net.activation].function
    sums, outputs = [], []
    for layer, (matrix, bias) in enumerate(net.layers(weight)):
        sums.append(torch.baddbmm(bias[:, None], x, matrix.mT))
        if layer < net.depth - 1:
            x = activation(sums[-1])
            outputs.append(x)
    return sums, outputs
