"""The training step in plain torch: autograd of the head's loss, clipping, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arena import Parameters
from ..dispatch import differentiating
from ..update import adam_

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


def step_(
    parameters: Parameters, loss: Loss, arguments: tuple, lr: Tensor, optimiser: Any
) -> Tensor:
    """One update of every ticket, in place.

    Args:
        parameters: of P tickets; weight, m, v and step are updated.
        loss: of the weights ``[P, size]``, the mask and ``arguments``, gives each ticket's loss
            ``[P]`` and what it measured, ``[., P]``.
        arguments: see ``loss``.
        lr: ``[P]``.
        optimiser: has ``max_norm``, ``beta1``, ``beta2`` and ``eps``.

    Returns:
        What the loss measured, and each ticket's gradient norm before clipping, ``[. + 1, P]``.
    """
    grad, measured = gradient(parameters.weight, parameters.mask, loss, arguments)
    norm = adam_(
        parameters.weight,
        grad,
        parameters.m,
        parameters.v,
        parameters.step,
        lr,
        parameters.mask,
        max_norm=optimiser.max_norm,
        beta1=optimiser.beta1,
        beta2=optimiser.beta2,
        eps=optimiser.eps,
    )
    return torch.cat([measured, norm[None]])
