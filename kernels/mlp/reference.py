"""A network of a population as plain torch, one line per formula; autograd differentiates it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.kernels.arena import Net

__all__ = ["mlp"]


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    if mask is not None:
        prunable = mask.shape[1]
        weight = torch.cat([torch.where(mask, weight[:, :prunable], 0), weight[:, prunable:]], 1)
    activation = torch.tanh if net.activation == "tanh" else torch.relu
    for layer, (matrix, bias) in enumerate(net.layers(weight)):
        x = torch.baddbmm(bias[:, None], x, matrix.mT)
        if layer < net.depth - 1:
            x = activation(x)
    return x
