"""PPO's update as plain torch: CleanRL's loss for every ticket at once, autograd, clipped Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena
from ..mlp.reference import mlp
from ..random import Stream, permutation
from ..training import Update
from ..training.reference import step_

if TYPE_CHECKING:
    from . import Batch, PPOConfig


def log_prob_and_entropy(
    output: Tensor, log_std: Tensor | None, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a categorical with logits ``output [P, B, A]``, or of a diagonal Gaussian."""
    if log_std is None:
        logp = output.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, action[..., None]).squeeze(-1), entropy
    normal = torch.distributions.Normal(output, log_std.exp()[:, None].expand_as(output))
    return normal.log_prob(action).sum(-1), normal.entropy().sum(-1)


def loss(
    weight: Tensor, mask: Tensor, arena: Arena, batch: Batch, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Total loss ``[P]``, and ``[5, P]``: policy loss, value loss, entropy, KL, clip fraction."""
    if arena.critic is None:
        raise ValueError("arena must have a critic for PPO, got none")
    output = mlp(batch.obs, weight, arena.actor, mask)
    value = mlp(batch.obs, weight, arena.critic, mask).squeeze(-1)
    log_std = None
    if arena.log_std is not None:
        log_std = weight[:, arena.log_std : arena.log_std + arena.actor.sizes[-1]]
    logp, entropy = log_prob_and_entropy(output, log_std, batch.action)

    log_ratio = logp - batch.logp
    ratio = log_ratio.exp()
    advantage = batch.advantage
    if config.normalise_advantage:
        advantage = advantage - advantage.mean(1, keepdim=True)
        # Not torch's `std`, which warns of no tickets.
        square = advantage.square().sum(1, keepdim=True)
        advantage = advantage / ((square / (advantage.shape[1] - 1)).sqrt() + 1e-8)
    clipped_ratio = ratio.clamp(1 - config.clip, 1 + config.clip)
    policy_loss = torch.max(-advantage * ratio, -advantage * clipped_ratio).mean(1)

    square = (value - batch.target) ** 2
    if config.clip_value:
        clipped = batch.value + (value - batch.value).clamp(-config.clip, config.clip)
        square = torch.max(square, (clipped - batch.target) ** 2)
    value_loss = 0.5 * square.mean(1)

    entropy = entropy.mean(1)
    total = policy_loss - config.entropy_coef * entropy + config.value_coef * value_loss
    kl = (ratio - 1 - log_ratio).mean(1)
    clip_fraction = ((ratio - 1).abs() > config.clip).to(ratio.dtype).mean(1)
    return total, torch.stack([policy_loss, value_loss, entropy, kl, clip_fraction]).detach()


def ppo_update_(update: Update[PPOConfig], batch: Batch) -> Tensor:
    """Statistics ``[6, P]``: those of `loss` and the gradient norm."""
    _, arena, key, iteration, _, config, _ = update
    tickets, samples = batch.logp.shape
    row = torch.arange(tickets, device=key.device)[:, None]
    statistics: list[Tensor] = []
    for epoch in range(config.epochs):
        statistics.clear()
        step = iteration * config.epochs + epoch
        order = permutation(key, samples, stream=Stream.MINIBATCH, step=step)
        for index in order.split(samples // config.minibatches, dim=1):
            minibatch = type(batch)(*(field[row, index] for field in batch))
            statistics.append(step_(update, loss, (arena, minibatch, config)))
    return torch.stack(statistics).mean(0)
