"""SAC's update in plain torch: three losses of every ticket at once, autograd, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena, Net
from ..mlp.reference import mlp
from ..random import Stream, normal
from ..squashed.reference import sample
from ..training import Update
from ..training.reference import step_
from ..transitions import Transitions, take

if TYPE_CHECKING:
    from . import SACConfig

Network = Callable[[Tensor, Tensor, Net, Tensor], Tensor]
"""`mlp` of input, weights, network and mask."""


def draw_noise(
    key: Tensor, first: int | Tensor, config: SACConfig, updates: int, actions: int
) -> Tensor:
    """Of updates ``first, first + 1, ...``: ``[P, updates, 2, batch, A]`` float32."""
    number = (first + torch.arange(updates, device=key.device)).repeat(len(key))
    drawn = normal(
        key.repeat_interleave(updates),
        2 * config.batch * actions,
        stream=Stream.UPDATE_ACTION,
        step=number,
    )
    return drawn.view(len(key), updates, 2, config.batch, actions)


def loss(
    weight: Tensor,
    mask: Tensor,
    arena: Arena,
    batch: Transitions,
    noise: Tensor,
    target: Tensor,
    config: SACConfig,
    network: Network = mlp,
) -> tuple[Tensor, Tensor]:
    """The three losses' sum ``[P]``, whose gradients meet in no parameter; statistics ``[4, P]``.

    Args:
        weight: ``[P, size]``.
        mask: ``[P, N]``.
        arena: see the op.
        batch: ``[P, B]``.
        noise: ``[P, 2, B, A]``.
        target: ``[P, size]``.
        config: see `SACConfig`.
        network: how a network is computed.
    """
    frozen = weight.detach()
    begin = arena.temperature or 0
    log_alpha = weight[:, begin]
    alpha = log_alpha.detach().exp()[:, None]

    def values(rows: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """Of both critics, ``[2, P, B]``."""
        seen = torch.cat([obs, action], -1)
        return torch.stack([network(seen, rows, net, mask).squeeze(-1) for net in arena.critics])

    with torch.no_grad():
        following, logp = sample(network(batch.next_obs, frozen, arena.actor, mask), noise[:, 0])
        value = values(target, batch.next_obs, following).amin(0) - alpha * logp
        ends = batch.discount == 0
        wanted = batch.reward + torch.where(ends, 0.0, batch.discount * value)
    error = values(weight, batch.obs, batch.action) - wanted
    critic_loss = 0.5 * error.square().sum(0).mean(1)

    action, logp = sample(network(batch.obs, weight, arena.actor, mask), noise[:, 1])
    first, second = values(frozen, batch.obs, action)
    value = torch.where(second < first, second, first)
    actor_loss = (alpha * logp - value).mean(1)

    entropy = -logp.detach().mean(1)
    temperature_loss = log_alpha * (entropy - config.target_entropy)
    measured = torch.stack([critic_loss, value.mean(1), entropy, alpha.squeeze(1)]).detach()
    return critic_loss + actor_loss + temperature_loss, measured


def sac_update_(
    update: Update[SACConfig],
    target: Tensor,
    replay: Transitions,
    stored: int,
    *,
    network: Network = mlp,
) -> Tensor:
    """Statistics ``[5, P]``; see the op."""
    parameters, arena, key, first, _, config, _ = update
    statistics = []
    for number in range(config.updates):
        batch = take(replay, stored, key, first + number, 1, config.batch)
        noise = draw_noise(key, first + number, config, 1, arena.actions)[:, 0].to(target.dtype)
        arguments = (arena, batch, noise, target, config, network)
        statistics.append(step_(update, loss, arguments))
        target.lerp_(parameters.weight, config.tau)
    return torch.stack(statistics).mean(0)
