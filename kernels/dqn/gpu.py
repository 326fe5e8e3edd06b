"""DQN's updates on a GPU: the networks' passes and Adam in Triton, between them torch.

Nothing waits for the device. Gradients off the mask are computed and never read: Adam knows the
mask.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..mlp import mlp
from ..training import Update
from ..training.gpu import Outputs, adam_step_, gradient
from .reference import LOSSES, bootstrap, draws

if TYPE_CHECKING:
    from ..transitions import Transitions
    from . import DQNConfig


def dqn_update_(
    update: Update[DQNConfig], target: Tensor, replay: Transitions, stored: int
) -> Tensor:
    """Statistics ``[3, P]``; see the op."""
    (weight, mask, *_), arena, key, _, _, config, density = update
    statistics = target.new_zeros((3, len(key)))
    norm = target.new_empty(len(key))
    for updates, drawn in draws(update, replay, stored):
        values = mlp(drawn.next_obs, target, arena.actor, mask, density=density)
        for number in range(updates):
            span = slice(number * config.batch, (number + 1) * config.batch)
            batch = type(drawn)(*(field[:, span].contiguous() for field in drawn))
            judges = values[:, span]
            if config.double:
                judges = mlp(batch.next_obs, weight, arena.actor, mask, density=density)
            wanted = bootstrap(batch, values[:, span], judges)
            head = partial(_loss, config.loss, batch.action, wanted, statistics)
            grad = gradient(weight, arena, (arena.actor,), batch.obs, head)
            adam_step_(update, grad, norm=norm)
            statistics[2] += norm
    return statistics / config.updates


def _loss(kind: str, action: Tensor, wanted: Tensor, statistics: Tensor, outputs: Outputs) -> None:
    (values,), (d_values,) = outputs.values, outputs.d_values
    value = values.gather(-1, action[..., None]).squeeze(-1)
    error = value - wanted
    loss_of = LOSSES[kind]
    statistics[0] += loss_of(value, wanted, reduction="none").mean(1)
    statistics[1] += value.mean(1)
    slope = (error.clamp(-1.0, 1.0) if kind == "huber" else 2 * error) / action.shape[1]
    d_values.zero_().scatter_(-1, action[..., None], slope[..., None])
