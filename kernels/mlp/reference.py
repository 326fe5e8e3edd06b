"""A network of a population as plain torch, one line per formula; autograd differentiates it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..arena import Net

__all__ = ["hidden_layers", "mlp"]


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    return _layers(x, weight, net, mask)[-1]


def hidden_layers(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    """``[P, B, sum of hidden sizes]``, layer by layer in a row."""
    return torch.cat([x[..., :0], *_layers(x, weight, net, mask)[:-1]], 2)


def _layers(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> list[Tensor]:
    if mask is not None:
        prunable = mask.shape[1]
        weight = torch.cat([torch.where(mask, weight[:, :prunable], 0), weight[:, prunable:]], 1)
    activation = ACTIVATIONS[net.activation].function
    outputs = []
    for layer, (matrix, bias) in enumerate(net.layers(weight)):
        x = torch.baddbmm(bias[:, None], x, matrix.mT)
        if layer < net.depth - 1:
            x = activation(x)
        outputs.append(x)
    return outputs
