"""Cloning in Triton: the minibatches of many updates drawn at once, then `training.gpu`'s updates.

A CUDA graph can hold the call; with `first_update` and `lr` as tensors on the device it moves on at
every replay. Adam knows that the critic stays as it is.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena
from ..examples import Example, meta
from ..squashed.reference import distribution
from ..training import Update, fused_gpu
from ..training.gpu import Learner
from ..training.head_gpu import Minibatch
from ..training.loss_gpu import Outputs, loss_and_gradient
from ..transitions import draw, runs
from .head_gpu import head
from .reference import critic_spans, gaussian_divergence

if TYPE_CHECKING:
    from . import CloneConfig


def clone_update_(
    update: Update[CloneConfig], obs: Tensor, target: Tensor, dataset: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss ``[P]`` and gradient norm; see the op. All tensors are contiguous."""
    _, arena, key, first, _, config, _ = update
    size = config.batch
    frozen = tuple(bound for span in critic_spans(arena) for bound in span)
    clone = None if arena.squashed else head(target, continuous=arena.log_std is not None)
    name = None if clone is None else clone.name
    learner = Learner(update, (arena.actor,), size, config.updates, head=name, statistics=1)
    for begin, updates in runs(config.updates, size) if len(key) else ():
        drawn = _Drawn(obs, dataset, draw(obs.shape[1], key, first + begin, updates, size))
        for number in range(updates):
            span = slice(number * size, (number + 1) * size)
            if clone is None:
                sums = learner.sums[begin + number]
                loss = partial(_squashed_loss, drawn.rows[:, span], target, sums)
                learner.take_apart_(begin + number, drawn.part(span), loss, frozen)
            else:
                minibatch, part = (
                    Minibatch(drawn.rows, span.start, size, 0),
                    partial(drawn.part, span),
                )
                learner.take_(begin + number, clone, obs, minibatch, part, frozen)
    losses, norms = learner.statistics()
    return losses, norms


class _Drawn:
    """The minibatches of several updates, one after another.

    Attributes:
        rows: ``[P, U * B]`` int64, of ``obs.flatten(0, 1)``. A ticket whose dataset is none of the
            D gets -1, and NaN observations: that is seen, where a check would wait for the device.
    """

    def __init__(self, obs: Tensor, dataset: Tensor, index: Tensor) -> None:
        datasets, samples, _ = obs.shape
        known = ((dataset >= 0) & (dataset < datasets))[:, None]
        self.rows = torch.where(known, dataset[:, None] * samples + index, -1)
        self._every = obs.flatten(0, 1)

    def part(self, span: slice) -> Tensor:
        """Observations ``[P, B, I]`` of one of them."""
        return self._obs[:, span]

    @cached_property
    def _obs(self) -> Tensor:
        """Of all, gathered at once; where launches read by `rows`, none are."""
        there = self._every[self.rows.clamp(min=0)]
        return torch.where(self.rows[..., None] < 0, torch.nan, there)


def _squashed_loss(rows: Tensor, target: Tensor, sums: Tensor, outputs: Outputs) -> None:
    """In torch, by autograd of the outputs alone."""
    (output,), (d_output,) = outputs.values, outputs.d_values
    wanted = target.flatten(0, 1)[rows.clamp(min=0)]
    wanted = torch.where(rows[..., None] < 0, torch.nan, wanted)
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        loss = gaussian_divergence(*distribution(leaf), wanted)
        (gradient,) = torch.autograd.grad(loss.mean(1).sum(), leaf)
    sums.copy_(loss.detach().sum(1)[:, None, None])
    d_output.copy_(gradient)


def _gradient_example(sizes: tuple[int, ...], activation: str, kind: str) -> None:
    continuous = kind == "continuous"
    arena = Arena.build(sizes, activation=activation, continuous=continuous)
    clone = head(meta(3, 50, sizes[-1] * (1 + continuous)), continuous=continuous)
    minibatch = Minibatch(meta(2, 36, dtype=torch.int64), 12, 12, 0)
    weight, obs = meta(2, arena.size), meta(3, 50, sizes[0])
    fused_gpu.gradient(weight, arena, arena.nets, obs, clone, minibatch, meta(2, 1, 1), 32)


def _loss_example(actions: int, count: int, *, continuous: bool) -> None:
    clone = head(meta(3, 50, actions * (1 + continuous)), continuous=continuous)
    log_std = meta(2, actions + 1)[:, 1:] if continuous else None
    values = (meta(2, count, actions),)
    minibatch = Minibatch(meta(2, 3 * count + 1, dtype=torch.int64), count, count, 0)
    loss_and_gradient(clone, minibatch, meta(2, 1), Outputs(values, log_std, values, log_std))


EXAMPLES = [
    *(
        Example(name, partial(_loss_example, actions, count, continuous="continuous" in name))
        for name, actions, count in (
            ("discrete", 2, 128),
            ("discrete_long", 2, 1024),
            ("discrete_wide", 18, 1024),
            ("continuous", 6, 128),
            ("continuous_wide", 17, 1024),
        )
    ),
    *fused_gpu.examples(_gradient_example, ("discrete", "continuous")),
]
