"""PPO's update in Triton: per minibatch a gather, two networks forward, the loss, both back, Adam.

A dozen launches a minibatch with nothing between them that waits for the device, so that a CUDA
graph can hold the whole iteration; with ``iteration`` and `lr` as tensors on the device it moves on
at every replay. Gradients off the mask are computed and never read: Adam knows the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena, Net, Parameters
from ..mlp import gpu as mlp
from ..random import Stream, permutation
from ..update import adam_
from . import loss_gpu

if TYPE_CHECKING:
    from . import Batch, PPOConfig

__all__ = ["COMPILE_CASES", "ppo_update_"]

COMPILE_CASES = loss_gpu.COMPILE_CASES

_NORM = loss_gpu.LOSS_STATISTICS


def ppo_update_(
    parameters: Parameters,
    arena: Arena,
    batch: Batch,
    key: Tensor,
    iteration: int | Tensor,
    lr: Tensor,
    config: PPOConfig,
) -> Tensor:
    """Statistics ``[6, P]``; see `reference.ppo_update_`."""
    tickets, samples = batch.logp.shape
    statistics = batch.logp.new_zeros(tickets, _NORM + 1)
    fields = type(batch)(*(field.contiguous() for field in batch))
    for epoch in range(config.epochs):
        step = iteration * config.epochs + epoch
        order = permutation(key, samples, stream=Stream.MINIBATCH, step=step)
        # The statistics are the last epoch's.
        share = (epoch == config.epochs - 1) / config.minibatches
        size = samples // config.minibatches
        for first in range(0, samples, size):
            grad = _gradient(
                parameters, arena, fields, order, first, size, config, statistics, share
            )
            norm = adam_(
                parameters.weight,
                grad,
                parameters.m,
                parameters.v,
                parameters.step,
                lr,
                parameters.mask,
                max_norm=config.max_norm,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
            )
            statistics[:, _NORM].add_(norm, alpha=share)
    return statistics.mT.contiguous()


def _gradient(
    parameters: Parameters,
    arena: Arena,
    batch: Batch,
    order: Tensor,
    first: int,
    size: int,
    config: PPOConfig,
    statistics: Tensor,
    share: float,
) -> Tensor:
    """Of one minibatch's loss, for every parameter ``[P, size of a row]``."""
    weight = parameters.weight
    if arena.critic is None:
        raise ValueError("arena must have a critic for PPO, got none")
    index = order[:, first : first + size, None].expand(-1, -1, batch.obs.shape[2])
    obs = batch.obs.gather(1, index)
    # Weights are zero off the mask already.
    output, kept = _forward(obs, weight, arena.actor)
    value, kept_by_critic = _forward(obs, weight, arena.critic)
    d_output, d_value = torch.empty_like(output), torch.empty_like(value)
    d_log_std = None
    if arena.log_std is not None:
        d_log_std = torch.empty_like(_log_std(weight, arena))
    loss_gpu.loss_and_gradient(
        output,
        value,
        None if arena.log_std is None else _log_std(weight, arena),
        order,
        first,
        batch,
        config,
        share,
        (d_output, d_value, d_log_std),
        statistics,
    )
    _, grad = mlp.backward(d_output, obs, weight, arena.actor, hidden=kept)
    _, of_critic = mlp.backward(d_value, obs, weight, arena.critic, hidden=kept_by_critic)
    grad += of_critic
    if d_log_std is not None:
        _log_std(grad, arena).copy_(d_log_std)
    return grad


def _forward(obs: Tensor, weight: Tensor, net: Net) -> tuple[Tensor, Tensor | None]:
    """The output, and the activations if the backward pass does not recompute them."""
    keep = mlp.choose(net, "ieee").backward != "fused"
    return mlp.forward(obs, weight, net, keep=keep)


def _log_std(rows: Tensor, arena: Arena) -> Tensor:
    begin = arena.log_std or 0
    return rows[:, begin : begin + arena.actor.sizes[-1]]
