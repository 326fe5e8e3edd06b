"""Deep Q-learning of a population: consecutive updates from each ticket's replay, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arena import Arena, Parameters
from ..dispatch import Plan, implementation
from ..errors import check_integer, check_tensor
from ..memory import mark_written
from ..mlp.checks import check_counts, check_optimiser
from ..registration import eager
from ..training import Update, plan_update
from ..transitions import Transitions, check_replay
from .reference import LOSSES

__all__ = ["DQNConfig", "DQNStats", "check_loss", "dqn_update_", "plan"]


class DQNStats(NamedTuple):
    """Means over the updates of a call, each ``[P]``.

    Attributes:
        loss: the configuration's, before each update.
        value: of the actions taken.
        grad_norm: norm of the ticket's gradient before clipping.
    """

    loss: Tensor
    value: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class DQNConfig:
    """Hyper-parameters of a run of DQN updates.

    Attributes:
        updates: Adam steps per call.
        batch: transitions per step, drawn with replacement.
        double: the network chooses the next action and the target network values it (van Hasselt
            et al., 2016); otherwise the target network does both.
        loss: mean over the batch, by the error e of the value of the action taken: ``huber``, of
            threshold 1, e^2 / 2 up to |e| = 1 and |e| - 1/2 beyond; or ``squared``, e^2 and no half
            of it, as `torch.nn.functional.mse_loss`.
        max_norm: largest gradient norm of a ticket, or None.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's, added to the denominator.
    """

    updates: int
    batch: int
    double: bool = False
    loss: str = "huber"
    max_norm: float | None = 10.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_counts(updates=self.updates, batch=self.batch)
        check_loss("loss", self.loss)
        check_optimiser(self.max_norm, self.beta1, self.beta2, self.eps)


@eager
@torch.no_grad()
def dqn_update_(
    parameters: Parameters,
    arena: Arena,
    target: Tensor,
    replay: Transitions,
    stored: int,
    key: Tensor,
    first_update: int | Tensor,
    lr: Tensor,
    config: DQNConfig,
    *,
    density: float = 1.0,
) -> DQNStats:
    """Consecutive DQN updates of every ticket on its own transitions, in place (Mnih et al., 2015).

    Update u, counted over the whole training, takes the transitions
    ``integers(key, batch, stored, stream=MINIBATCH, step=u)`` of the ticket. The loss (see
    `DQNConfig`) is that of the value of the action taken against
    ``reward + discount * max_a target(next_obs)_a``. A ticket's result depends on its own rows
    alone.

    Args:
        parameters: of P tickets; weight, m, v and step are updated, the mask is not.
        arena: whose actor is the Q-network, an output per action; no critic, no `log_std`.
        target: ``[P, size]`` float32, weights of the target networks, zero off the mask.
        replay: see `Transitions`.
        stored: how many of each ticket's C transitions, the first ones, are there.
        key: ``[P]`` int64.
        first_update: number of the first update of this call; on a GPU also a 0-dim int64 tensor,
            so that a captured CUDA graph counts on.
        lr: ``[P]`` float32 learning rates.
        config: see `DQNConfig`.
        density: nominal density of the level: chooses each layer's format, never its meaning.

    Returns:
        Statistics, means over the updates of this call.

    Raises:
        ValueError: an arena of anything but a Q-network, a shape, a device, a number out of range,
            or a tensor that is written and not contiguous or shares memory with another. On a GPU
            actions are not looked at, since that would wait for them: one that is none makes its
            ticket NaN.
        TypeError: a dtype, the kernels take float32 only; or `stored` or `first_update` no integer.
    """
    if arena.critic is not None or arena.continuous:
        raise ValueError(
            "arena must be a Q-network alone, got one with "
            + ("continuous actions" if arena.continuous else "a critic")
        )
    stored = check_integer("stored", stored, 0, (1 << 31) + 1)
    update = Update(parameters, arena, key, first_update, lr, config, density)
    update = update.check("dqn_update_", {"target": target, **replay._asdict()})
    weight, features = update.parameters.weight, arena.actor.sizes[0]
    check_tensor("target", target, weight.shape, weight.dtype, like=weight)
    check_replay(replay, stored, weight, features, action_dtype=torch.int64)
    statistics = implementation(__name__, weight.device, arena.actor).dqn_update_(
        update,
        target.detach().contiguous(),
        Transitions(*(field.detach() for field in replay)),
        stored,
    )
    mark_written(*update.written())
    return DQNStats(*statistics.unbind())


def check_loss(name: str, loss: str) -> None:
    """Raise ``ValueError`` unless DQN knows the loss."""
    if loss not in LOSSES:
        raise ValueError(f"{name} must be one of {', '.join(LOSSES)}, got {loss!r}")


def plan(arena: Arena, device: torch.device, *, density: float = 1.0) -> Plan:
    """What `dqn_update_` does on ``device``, and why."""
    return plan_update("dqn_update_", arena, (arena.actor,), device, density)
