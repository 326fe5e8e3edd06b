"""A network of a population as plain torch, one line per formula; autograd differentiates it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..activations import ACTIVATIONS
from ..arena import Net


def walk(
    x: Tensor, net: Net, product: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """A network layer by layer, whoever computes the products.

    Args:
        x: ``[..., I]``.
        net: which layers normalise, add and activate.
        product: ``product(layer, x)`` is ``x w^T + b`` of a layer.

    Returns:
        What every layer sums up, and what the activation, if one follows, makes of that.
    """
    activation = ACTIVATIONS[net.activation].function
    sums: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer in range(net.depth):
        total = product(
            layer, functional.layer_norm(x, x.shape[-1:]) if net.normalises(layer) else x
        )
        skipped = net.adds(layer)
        if skipped is not None:
            total = total + outputs[skipped]
        x = activation(total) if net.activates(layer) else total
        sums.append(total)
        outputs.append(x)
    return sums, outputs


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    _, outputs = _layers(x, weight, net, mask)
    return outputs[-1]


def hidden_layers(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None) -> Tensor:
    """``[P, B, net.kept]``, layer by layer in a row."""
    sums, outputs = _layers(x, weight, net, mask)
    sums = [] if ACTIVATIONS[net.activation].by_output else sums[:-1]
    return torch.cat([x[..., :0], *outputs[:-1], *sums], 2)


def _layers(
    x: Tensor, weight: Tensor, net: Net, mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    if mask is not None:
        prunable = mask.shape[1]
        weight = torch.cat([torch.where(mask, weight[:, :prunable], 0), weight[:, prunable:]], 1)

    def product(layer: int, x: Tensor) -> Tensor:
        matrix, bias = net.weight(weight, layer), net.bias(weight, layer)
        return torch.baddbmm(bias[:, None], x, matrix.mT)

    return walk(x, net, product)
