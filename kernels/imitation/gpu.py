"""Cloning in Triton: minibatches of many updates at once, then the network, the loss, Adam.

Six or seven launches an update, one more where actions are continuous, and nothing between them
that waits for the device, so that a CUDA graph can hold the call; with `first_update` and `lr` as
tensors on the device it moves on at every replay. Gradients off the mask are computed and never
read: Adam knows the mask, and that the critic stays as it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..squashed.reference import distribution
from ..training import Update
from ..training.gpu import Outputs, adam_step_, gradient
from ..transitions import draw, runs
from . import loss_gpu
from .reference import critic_spans, gaussian_divergence

if TYPE_CHECKING:
    from . import CloneConfig

EXAMPLES = loss_gpu.EXAMPLES


def clone_update_(
    update: Update[CloneConfig], obs: Tensor, target: Tensor, dataset: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss ``[P]`` and gradient norm; see the op. All tensors are contiguous."""
    parameters, arena, key, first, _, config, _ = update
    losses, norms = obs.new_zeros(len(key)), obs.new_zeros(len(key))
    frozen = tuple(bound for span in critic_spans(arena) for bound in span)
    loss = _squashed_loss if arena.squashed else _loss
    for begin, updates in runs(config.updates, config.batch):
        rows, minibatches = _draw(obs, dataset, key, first + begin, updates, config.batch)
        for number in range(updates):
            head = partial(loss, rows[:, number], target, 1.0 / config.updates, losses)
            grad = gradient(parameters.weight, arena, (arena.actor,), minibatches[:, number], head)
            norms += adam_step_(update, grad, frozen=frozen)
    return losses, norms / config.updates


def _draw(
    obs: Tensor, dataset: Tensor, key: Tensor, first: int | Tensor, updates: int, batch: int
) -> tuple[Tensor, Tensor]:
    """The minibatches of updates ``first, first + 1, ...``: ``[P, U, B]`` rows, and observations.

    A row is one of ``obs.flatten(0, 1)``. A ticket whose dataset is none of the D gets -1 and NaN:
    that is seen, where a check would wait for the device.
    """
    datasets, samples, _ = obs.shape
    index = draw(samples, key, first, updates, batch).unflatten(1, (updates, batch))
    known = ((dataset >= 0) & (dataset < datasets))[:, None, None]
    rows = torch.where(known, dataset[:, None, None] * samples + index, -1)
    minibatches = obs.flatten(0, 1)[rows.clamp(min=0)]
    return rows, torch.where(known[..., None], minibatches, torch.nan)


def _loss(rows: Tensor, target: Tensor, share: float, losses: Tensor, outputs: Outputs) -> None:
    (output,), (d_output,) = outputs.values, outputs.d_values
    loss_gpu.loss_and_gradient(
        output, outputs.log_std, rows, target, share, (d_output, outputs.d_log_std), losses
    )


def _squashed_loss(
    rows: Tensor, target: Tensor, share: float, losses: Tensor, outputs: Outputs
) -> None:
    """In torch, by autograd of the outputs alone."""
    (output,), (d_output,) = outputs.values, outputs.d_values
    wanted = target.flatten(0, 1)[rows.clamp(min=0)]
    wanted = torch.where(rows[..., None] < 0, torch.nan, wanted)
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        loss = gaussian_divergence(*distribution(leaf), wanted).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    losses += share * loss.detach()
    d_output.copy_(gradient)
