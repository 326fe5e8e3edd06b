"""Behavioural cloning of a population: consecutive updates of KL(expert || student), in place."""

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

__all__ = ["CloneConfig", "CloneStats", "clone_update_", "plan"]


class CloneStats(NamedTuple):
    """Means over the updates of a call, each ``[P]``.

    Attributes:
        loss: before each update.
        grad_norm: norm of the ticket's gradient before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class CloneConfig:
    """Hyper-parameters of a run of cloning updates.

    Attributes:
        updates: Adam steps per call.
        batch: samples per step, drawn with replacement.
        max_norm: largest gradient norm of a ticket, or None.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's, added to the denominator.
    """

    updates: int
    batch: int
    max_norm: float | None = 0.5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_counts(updates=self.updates, batch=self.batch)
        check_optimiser(self.max_norm, self.beta1, self.beta2, self.eps)


@eager
@torch.no_grad()
def clone_update_(
    parameters: Parameters,
    arena: Arena,
    obs: Tensor,
    target: Tensor,
    dataset: Tensor,
    key: Tensor,
    first_update: int | Tensor,
    lr: Tensor,
    config: CloneConfig,
    *,
    density: float = 1.0,
) -> CloneStats:
    """Consecutive cloning updates of every ticket on its own dataset, in place.

    Update u, counted over the whole training, takes the samples
    ``integers(key, batch, n, stream=MINIBATCH, step=u)`` of the ticket's dataset; the loss is the
    mean KL divergence from the expert's distribution to the student's, of squashed policies that of
    their Gaussians before squashing, which is the same. A critic in the arena is no part of this:
    its weights and moments stay as they are, whatever its moments hold.

    Args:
        parameters: of P tickets; weight, m, v and step are updated, the mask is not.
        arena: discrete, continuous with `log_std`, or squashed.
        obs: ``[D, n, I]`` float32, the observations of D datasets, normalised.
        target: the expert's log-probabilities ``[D, n, A]``, or for continuous actions its means
            and log standard deviations ``[D, n, 2A]``. Log-probabilities below -87 count as -87.
        dataset: ``[P]`` int64, which dataset each ticket learns from. On a GPU values are not
            looked at, since that would wait for them: a ticket without a dataset becomes NaN.
        key: ``[P]`` int64.
        first_update: number of the first update of this call; on a GPU also a 0-dim int64 tensor,
            so that a captured CUDA graph counts on.
        lr: ``[P]`` float32 learning rates.
        config: see `CloneConfig`.
        density: nominal density of the level: chooses each layer's format, never its meaning.

    Returns:
        Each ticket's loss and norm of its gradient, means over the updates of this call.

    Raises:
        ValueError: a shape, a device, an empty dataset, a number out of range, or a tensor that is
            written and not contiguous or shares memory with another.
        TypeError: a dtype, the kernels take float32 only; or `first_update` no integer.
    """
    update = Update(parameters, arena, key, first_update, lr, config, density)
    data = {"obs": obs, "target": target, "dataset": dataset}
    update = update.check("clone_update_", data)
    weight = update.parameters.weight
    _check_data(weight, arena, obs, target, dataset)
    _check_dataset(dataset, obs.shape[0])
    stats = implementation(__name__, weight.device, arena.actor).clone_update_(
        update, obs.detach().contiguous(), target.detach().contiguous(), dataset.contiguous()
    )
    mark_written(*update.written())
    return CloneStats(*stats)


def plan(arena: Arena, device: torch.device, *, density: float = 1.0) -> Plan:
    """What `clone_update_` does on ``device``, and why."""
    reason = "loss and its gradient in torch between the network's passes; see `mlp.plan`"
    on_gpu = reason if arena.squashed else None
    return plan_update("clone_update_", arena, (arena.actor,), device, density, on_gpu)


def _check_data(weight: Tensor, arena: Arena, obs: Tensor, target: Tensor, dataset: Tensor) -> None:
    check_tensor("obs", obs, ("D", "n", arena.actor.sizes[0]), weight.dtype, like=weight)
    datasets, samples, _ = obs.shape
    if not 1 <= samples <= 2**31:
        raise ValueError(f"obs must have between 1 and 2**31 samples, got {samples}")
    numbers = arena.actions * (2 if arena.continuous else 1)
    check_tensor("target", target, (datasets, samples, numbers), weight.dtype, like=weight)
    check_tensor("dataset", dataset, (len(weight),), torch.int64, like=weight)


def _check_dataset(dataset: Tensor, datasets: int) -> None:
    """On a GPU the check would wait for it."""
    if dataset.device.type != "cpu" or not len(dataset):
        return
    low, high = (int(bound) for bound in dataset.aminmax())
    if not 0 <= low <= high < datasets:
        raise ValueError(f"dataset must be in [0, {datasets}), got {low}..{high}")
