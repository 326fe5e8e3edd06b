"""PPO's update of a population: all epochs and minibatches of one iteration, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arena import Arena, Parameters
from ..dispatch import Plan, implementation
from ..errors import check_tensor
from ..memory import mark_written
from ..mlp.checks import check_counts, check_optimiser
from ..registration import eager
from ..training import Update, plan_update
from . import reference

__all__ = ["Batch", "PPOConfig", "Stats", "plan", "ppo_update_"]


class Batch(NamedTuple):
    """One iteration's samples of every ticket.

    Attributes:
        obs: ``[P, S, D]`` float32, normalised.
        action: ``[P, S]`` int64, or ``[P, S, A]`` float32 for continuous actions.
        logp: ``[P, S]`` log-probability of the action when it was taken.
        value: ``[P, S]`` the critic's value then.
        advantage: ``[P, S]``, not normalised.
        target: ``[P, S]`` of the value.
    """

    obs: Tensor
    action: Tensor
    logp: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor


class Stats(NamedTuple):
    """Means over the minibatches of the last epoch, each ``[P]``.

    Attributes:
        policy_loss: the clipped surrogate.
        value_loss: half the mean (clipped) squared error, before `value_coef`.
        entropy: of the policy.
        approx_kl: mean of ``ratio - 1 - log(ratio)``.
        clip_fraction: share of samples with ``|ratio - 1| > clip``.
        grad_norm: norm of the ticket's gradient before clipping.
    """

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters of one iteration's update; the defaults are CleanRL's.

    Attributes:
        epochs: passes over the samples.
        minibatches: equal parts of each pass; they must divide the samples.
        clip: of the probability ratio, and of the value's move.
        clip_value: whether the value's move is clipped.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        max_norm: largest gradient norm of a ticket, actor, critic and log_std together, or None.
        normalise_advantage: per ticket and minibatch, by the unbiased standard deviation.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's, added to the denominator.
    """

    epochs: int = 4
    minibatches: int = 4
    clip: float = 0.2
    clip_value: bool = True
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    max_norm: float | None = 0.5
    normalise_advantage: bool = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, minibatches=self.minibatches)
        if not self.clip > 0:
            raise ValueError(f"clip must be > 0, got {self.clip}")
        check_optimiser(self.max_norm, self.beta1, self.beta2, self.eps)


@eager
@torch.no_grad()
def ppo_update_(
    parameters: Parameters,
    arena: Arena,
    batch: Batch,
    key: Tensor,
    iteration: int | Tensor,
    lr: Tensor,
    config: PPOConfig,
    *,
    density: float = 1.0,
) -> Stats:
    """All epochs and minibatches of one PPO iteration, each ticket on its own, in place.

    The loss is that of CleanRL's ``ppo.py`` and ``ppo_continuous_action.py`` (Huang et al. 2022):
    policy loss - entropy_coef * entropy + value_coef * value loss. Epoch e of iteration i visits
    the samples in the order ``permutation(key, S, stream=MINIBATCH, step=i * epochs + e)``, cut
    into equal consecutive minibatches. A ticket's result depends on its own rows alone.

    Args:
        parameters: of P tickets; weight, m, v and step are updated, the mask is not.
        arena: with a critic.
        batch: S samples of each ticket.
        key: ``[P]`` int64.
        iteration: number of this update, from 0; on a GPU also a 0-dim int64 tensor, so that a
            captured CUDA graph counts on.
        lr: ``[P]`` float32 learning rates.
        config: see `PPOConfig`.
        density: nominal density of the level: chooses each layer's format, never its meaning.

    Returns:
        Statistics of the last epoch.

    Raises:
        ValueError: an arena without a critic, a shape, a device, S not divisible into minibatches,
            minibatches of one sample whose advantages should be normalised, a number out of range,
            or a tensor that is written and not contiguous or shares memory with another.
        TypeError: a dtype, the CPU kernel takes float32 only; or `iteration` no integer.
    """
    _check_arena(arena)
    update = Update(parameters, arena, key, iteration, lr, config, density)
    update = update.check(
        "ppo_update_",
        batch._asdict(),
        double=("reference", "triton"),
        counter="iteration",
        limit=1 << 48,
    )
    weight = update.parameters.weight
    _check_batch(weight, arena, batch, config)
    batch = Batch(*(tensor.detach() for tensor in batch))
    # Triton's kernels take float32 only.
    module = reference
    if weight.dtype == torch.float32:
        module = implementation(__name__, weight.device, arena.actor)
    statistics = module.ppo_update_(update, batch)
    mark_written(*update.written())
    return Stats(*statistics.unbind())


def plan(arena: Arena, device: torch.device, *, density: float = 1.0) -> Plan:
    """What `ppo_update_` does on ``device``, and why."""
    return plan_update("ppo_update_", arena, arena.nets, device, density)


def _check_arena(arena: Arena) -> None:
    if arena.critic is None or arena.critic.sizes[-1] != 1:
        raise ValueError(f"arena must have a critic with one output, got critic={arena.critic}")
    if arena.critic.sizes[0] != arena.actor.sizes[0]:
        raise ValueError(
            f"actor and critic must read the same observation, got {arena.actor.sizes[0]} and "
            f"{arena.critic.sizes[0]} features"
        )


def _check_batch(weight: Tensor, arena: Arena, batch: Batch, config: PPOConfig) -> None:
    tickets = len(weight)
    check_tensor("logp", batch.logp, (tickets, "S"), weight.dtype, like=weight)
    samples, actions = batch.logp.shape[1], arena.actor.sizes[-1]
    shape = (tickets, samples, arena.actor.sizes[0])
    check_tensor("obs", batch.obs, shape, weight.dtype, like=weight)
    for name in ("value", "advantage", "target"):
        check_tensor(name, getattr(batch, name), (tickets, samples), weight.dtype, like=weight)
    if arena.log_std is None:
        check_tensor("action", batch.action, (tickets, samples), torch.int64, like=weight)
        # On a GPU the check would wait for it: an action that is none makes its ticket NaN.
        if batch.action.device.type == "cpu" and batch.action.numel():
            low, high = (int(bound) for bound in batch.action.aminmax())
            if not 0 <= low <= high < actions:
                raise ValueError(f"action must be in [0, {actions}), got {low}..{high}")
    else:
        shape = (tickets, samples, actions)
        check_tensor("action", batch.action, shape, weight.dtype, like=weight)
    if samples == 0 or samples % config.minibatches:
        raise ValueError(
            f"minibatches must divide the samples, got {config.minibatches} and {samples} samples"
        )
    if config.normalise_advantage and samples == config.minibatches:
        raise ValueError("normalise_advantage needs minibatches of two samples or more, got 1")
