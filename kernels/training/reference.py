"""The training step in plain torch: autograd of the head's loss, clipping, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import differentiating
from ..update import adam_
from . import Update

Loss = Callable[..., tuple[Tensor, Tensor]]


def gradient(weight: Tensor, mask: Tensor, loss: Loss, arguments: tuple) -> tuple[Tensor, Tensor]:
    """Of a loss by every ticket's weights, ``[P, size]``; and what the loss measured.

    Args:
        weight: ``[P, size]``.
        mask: ``[P, prunable]`` bool, of the network that the loss sees.
        loss: see `step_`.
        arguments: see `step_`.
    """
    with differentiating():
        weight = weight.detach().requires_grad_()
        total, measured = loss(weight, mask, *arguments)
        (grad,) = torch.autograd.grad(total.sum(), weight)
    return grad, measured


def step_(update: Update[Any], loss: Loss, arguments: tuple) -> Tensor:
    """One update of every ticket, in place.

    Args:
        update: whose parameters, learning rates and numbers of Adam these are.
        loss: of the weights ``[P, size]``, the mask and ``arguments``, gives each ticket's loss
            ``[P]`` and what it measured, ``[., P]``.
        arguments: see ``loss``.

    Returns:
        What the loss measured, and each ticket's gradient norm before clipping, ``[. + 1, P]``.
    """
    parameters = update.parameters
    grad, measured = gradient(parameters.weight, parameters.mask, loss, arguments)
    return torch.cat([measured, adam_step_(update, grad)[None]])


def adam_step_(update: Update[Any], grad: Tensor) -> Tensor:
    """Clip a gradient ``[P, size]`` by each ticket's norm ``[P]``, which is returned, and step."""
    weight, mask, m, v, step = update.parameters
    config = update.config
    return adam_(
        weight,
        grad,
        m,
        v,
        step,
        update.lr,
        mask,
        max_norm=config.max_norm,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
    )
