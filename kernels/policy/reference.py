"""A network layer by layer, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layer


def run(
    layers: Sequence[Layer],
    masks: Iterator[Tensor],
    x: Tensor,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """``x`` through every layer; of each the weight counts on the mask alone.

    Args:
        layers: the network.
        masks: of the layers that have one.
        x: ``[B, I]``.
        parameters: of each layer the weight, then the bias or None; then the same of its norm.
    """
    given = iter(parameters)
    for layer in layers:
        weight = cast(Tensor, next(given))
        if layer.mask is not None:
            weight = torch.where(next(masks), weight, 0)
        x = F.linear(x, weight, next(given))
        if layer.norm is not None:
            x = F.layer_norm(x, (layer.out,), next(given), next(given), layer.norm.eps)
        if layer.activation is not None:
            x = layer.activation.module(x)
    return x


def differentiate(
    layers: Sequence[Layer],
    masks: Sequence[Tensor],
    x: Tensor,
    parameters: Sequence[Tensor | None],
    needed: Sequence[bool],
    dy: Tensor,
) -> list[Tensor | None]:
    """Gradients of x and the parameters where needed, as autograd's own ops: it may go on."""
    again = torch.is_grad_enabled()
    # Copies of the leaves' names alone: one leaf may have been made from another. Where nobody goes
    # on, fresh leaves: of a compiled backward pass the saved tensors know no gradient.
    own = [
        None if leaf is None else leaf.view_as(leaf) if again else leaf.detach().requires_grad_()
        for leaf in (x, *parameters)
    ]
    asked = [cast(Tensor, leaf) for leaf, need in zip(own, needed, strict=True) if need]
    with torch.enable_grad():
        y = run(layers, iter(masks), cast(Tensor, own[0]), own[1:])
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again))
    return [next(found) if need else None for need in needed]
