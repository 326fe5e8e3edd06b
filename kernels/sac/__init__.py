"""Soft actor-critic of a population: consecutive updates from each ticket's replay, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arena import Arena, Parameters
from ..dispatch import Plan, implementation
from ..errors import check_integer, check_tensor, check_untransformed
from ..memory import check_separate, mark_written
from ..mlp.checks import check_counts, check_optimiser
from ..registration import eager
from ..training import Update, plan_update
from ..transitions import Transitions, check_replay

__all__ = ["SACConfig", "SACStats", "plan", "sac_update_"]


class SACStats(NamedTuple):
    """Means over the updates of a call, each ``[P]``.

    Attributes:
        critic_loss: half the squared errors of both critics.
        value: the lower critic's, of the actions the policy takes now.
        entropy: of the policy after squashing, minus the log-density of its actions.
        temperature: before each update.
        grad_norm: of the ticket's gradient by all its parameters, before clipping.
    """

    critic_loss: Tensor
    value: Tensor
    entropy: Tensor
    temperature: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class SACConfig:
    """Hyper-parameters of a run of SAC updates.

    Attributes:
        updates: Adam steps per call, of actor, critics and temperature.
        batch: transitions per step, drawn with replacement.
        target_entropy: of the policy after squashing, which the temperature is to bring about.
        tau: share of the critics that goes into the targets after each step.
        max_norm: largest gradient norm of a ticket, or None.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's, added to the denominator.
    """

    updates: int
    batch: int
    target_entropy: float
    tau: float = 0.005
    max_norm: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_counts(updates=self.updates, batch=self.batch)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        check_optimiser(self.max_norm, self.beta1, self.beta2, self.eps)


@eager
@torch.no_grad()
def sac_update_(
    parameters: Parameters,
    arena: Arena,
    target: Tensor,
    replay: Transitions,
    stored: int,
    key: Tensor,
    first_update: int | Tensor,
    lr: Tensor,
    config: SACConfig,
    *,
    density: float = 1.0,
) -> SACStats:
    """Consecutive SAC updates of every ticket on its own transitions (Haarnoja et al., 2018).

    Update u, counted over the whole training, takes the transitions
    ``integers(key, batch, stored, stream=MINIBATCH, step=u)`` of the ticket, and the noise
    ``normal(key, 2 * batch * A, stream=UPDATE_ACTION, step=u)``: the first half samples actions at
    `next_obs`, the second at `obs`. With alpha the temperature, a and a' those actions, each part
    has its own loss, all at the weights before the update, and Adam steps once::

        y           = reward + discount * (min_i target_i(next_obs, a') - alpha * log pi(a'))
        critics     : sum_i mean 1/2 (q_i(obs, action) - y)^2
        actor       : mean alpha * log pi(a) - min_i q_i(obs, a)
        temperature : -log alpha * mean (log pi(a) + target_entropy)

    Then the targets go the share `tau` of the way to the weights. A ticket's result depends on its
    own rows alone.

    Args:
        parameters: of P tickets; weight, m, v and step are updated, the mask is not.
        arena: squashed, with critics; they value an observation followed by an action in [-1, 1].
        target: ``[P, size]`` float32, zero off the mask, of which the critics are the targets;
            updated.
        replay: see `Transitions`; actions are ``[P, C, A]`` in [-1, 1].
        stored: how many of each ticket's C transitions, the first ones, are there.
        key: ``[P]`` int64.
        first_update: number of the first update of this call; on a GPU also a 0-dim int64 tensor,
            so that a captured CUDA graph counts on.
        lr: ``[P]`` float32 learning rates.
        config: see `SACConfig`.
        density: nominal density of the level: chooses each layer's format, never its meaning.

    Returns:
        Statistics, means over the updates of this call.

    Raises:
        ValueError: an arena of another kind, a shape, a device, a number out of range, or a tensor
            that is written and not contiguous or shares memory with another.
        TypeError: a dtype, the kernels take float32 only; or `stored` or `first_update` no integer.
    """
    _check_arena(arena)
    stored = check_integer("stored", stored, 0, (1 << 31) + 1)
    update = Update(parameters, arena, key, first_update, lr, config, density)
    update = update.check("sac_update_", replay._asdict())
    check_untransformed("sac_update_", target)
    target = target.detach()
    _check_data(update, target, replay, stored)
    weight = update.parameters.weight
    statistics = implementation(__name__, weight.device, arena.actor).sac_update_(
        update, target, Transitions(*(field.detach() for field in replay)), stored
    )
    mark_written(*update.written(), target)
    return SACStats(*statistics.unbind())


def plan(arena: Arena, device: torch.device, *, density: float = 1.0) -> Plan:
    """What `sac_update_` does on ``device``, and why."""
    reason = "the networks' passes and Adam in Triton, the losses in torch; see `mlp.plan`"
    return plan_update("sac_update_", arena, arena.nets, device, density, reason)


def _check_arena(arena: Arena) -> None:
    if not arena.squashed or arena.critic is None:
        raise ValueError(
            "arena must be squashed and have critics, got "
            + (f"critic={arena.critic}" if arena.squashed else f"squashed={arena.squashed}")
        )
    features, actions = arena.actor.sizes[0], arena.actions
    if (arena.critic.sizes[0], arena.critic.sizes[-1]) != (features + actions, 1):
        raise ValueError(
            f"critic must map {features} features and {actions} numbers of an action to 1 output, "
            f"got {arena.critic.sizes}"
        )


def _check_data(
    update: Update[SACConfig], target: Tensor, replay: Transitions, stored: int
) -> None:
    parameters, arena, key, _, lr, *_ = update
    weight = parameters.weight
    check_tensor("target", target, weight.shape, weight.dtype, like=weight)
    if not target.is_contiguous():
        raise ValueError(f"target must be contiguous, got strides {target.stride()}")
    read = {"key": key, "lr": lr, **replay._asdict()}
    check_separate({"target": target}, {**read, **parameters._asdict()})
    features = arena.actor.sizes[0]
    check_replay(replay, stored, weight, features, arena.actions, action_dtype=weight.dtype)
