"""DQN's update in plain torch: the temporal-difference error of every ticket at once, Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, smooth_l1_loss

from ..arena import Arena
from ..mlp.reference import mlp
from ..training import Update
from ..training.reference import step_
from ..transitions import Transitions, runs, take

if TYPE_CHECKING:
    from . import DQNConfig

LOSSES: dict[str, Callable[..., Tensor]] = {"huber": smooth_l1_loss, "squared": mse_loss}


def draw(
    replay: Transitions,
    stored: int,
    key: Tensor,
    first: int | Tensor,
    updates: int,
    batch: int,
    arena: Arena,
) -> Transitions:
    """What `take` gives, of which each action is one of the arena's.

    Raises:
        ValueError: an action drawn that is none; on a GPU nobody looks.
    """
    drawn = take(replay, stored, key, first, updates, batch)
    if key.device.type == "cpu" and len(key):
        low, high = (int(bound) for bound in drawn.action.aminmax())
        if not 0 <= low <= high < arena.actor.sizes[-1]:
            raise ValueError(f"action must be in [0, {arena.actor.sizes[-1]}), got {low}..{high}")
    return drawn


def draws(
    update: Update[DQNConfig], replay: Transitions, stored: int
) -> Iterator[tuple[int, Transitions]]:
    """All updates of a call in runs: how many, and their transitions; see `draw`."""
    _, arena, key, first, _, config, _ = update
    for begin, updates in runs(config.updates, config.batch):
        yield updates, draw(replay, stored, key, first + begin, updates, config.batch, arena)


def bootstrap(batch: Transitions, values: Tensor, judges: Tensor) -> Tensor:
    """What each transition's value should be, ``[P, B]``.

    Args:
        batch: ``[P, B]``; where its discount is zero, what follows may be anything.
        values: ``[P, B, A]``, the target network's, of `next_obs`.
        judges: likewise, by which the next action is chosen.
    """
    choice = judges.argmax(-1, keepdim=True)
    following = batch.discount * values.gather(-1, choice).squeeze(-1)
    return batch.reward + torch.where(batch.discount == 0, 0.0, following)


def wanted(
    batch: Transitions, arena: Arena, weight: Tensor, mask: Tensor, target: Tensor, double: bool
) -> Tensor:
    """`bootstrap` of the networks' values; see the op."""
    values = mlp(batch.next_obs, target, arena.actor, mask)
    judges = mlp(batch.next_obs, weight, arena.actor, mask) if double else values
    return bootstrap(batch, values, judges)


def loss(
    weight: Tensor,
    mask: Tensor,
    arena: Arena,
    obs: Tensor,
    action: Tensor,
    target: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Loss ``[P]`` of a kind; and that with the mean value of the actions taken, ``[2, P]``."""
    values = mlp(obs, weight, arena.actor, mask)
    value = values.gather(-1, action[..., None]).squeeze(-1)
    total = LOSSES[kind](value, target, reduction="none").mean(1)
    return total, torch.stack([total, value.mean(1)]).detach()


def dqn_update_(
    update: Update[DQNConfig], target: Tensor, replay: Transitions, stored: int
) -> Tensor:
    """Statistics ``[3, P]``; see the op."""
    (weight, mask, *_), arena, key, first, _, config, _ = update
    statistics = []
    for number in range(config.updates):
        batch = draw(replay, stored, key, first + number, 1, config.batch, arena)
        values = wanted(batch, arena, weight, mask, target, config.double)
        arguments = (arena, batch.obs, batch.action, values, config.loss)
        statistics.append(step_(update, loss, arguments))
    return torch.stack(statistics).mean(0)
