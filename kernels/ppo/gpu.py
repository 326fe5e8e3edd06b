"""PPO's update in Triton: three launches a minibatch for narrow networks, a dozen for others.

See `training.gpu`. A CUDA graph can hold the whole iteration; with ``iteration`` and `lr` as
tensors on the device it moves on at every replay.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena
from ..examples import Example, meta
from ..random import Stream, permutation
from ..training import Update, fused_gpu
from ..training.gpu import Learner
from ..training.head_gpu import Minibatch
from ..training.loss_gpu import Outputs, loss_and_gradient
from .head_gpu import head

if TYPE_CHECKING:
    from . import Batch, PPOConfig


def ppo_update_(update: Update[PPOConfig], batch: Batch) -> Tensor:
    """Statistics ``[6, P]``; see `reference.ppo_update_`."""
    _, arena, key, iteration, _, config, _ = update
    tickets, samples = batch.logp.shape
    size = samples // config.minibatches
    fields = type(batch)(*(field.contiguous() for field in batch))
    loss = head(fields, config, continuous=arena.log_std is not None)
    # Of the last epoch's minibatches: each epoch writes over what the one before it left.
    learner = Learner(
        update, arena.nets, size, config.minibatches, head=loss.name, statistics=loss.statistics
    )
    for epoch in range(config.epochs if tickets else 0):
        step = iteration * config.epochs + epoch
        order = permutation(key, samples, stream=Stream.MINIBATCH, step=step)
        for number in range(config.minibatches):
            minibatch = Minibatch(order, number * size, size, samples)
            learner.take_(number, loss, fields.obs, minibatch, partial(_gather, fields, minibatch))
    return learner.statistics()


def _gather(batch: Batch, minibatch: Minibatch) -> Tensor:
    """The observations ``[P, B, I]`` of a minibatch."""
    index, first, count, _ = minibatch
    rows = index[:, first : first + count, None].expand(-1, -1, batch.obs.shape[2])
    return batch.obs.gather(1, rows)


def _meta_batch(samples: int, inputs: int, actions: int, *, continuous: bool) -> Batch:
    from . import Batch

    action = meta(2, samples, actions) if continuous else meta(2, samples, dtype=torch.int64)
    return Batch(meta(2, samples, inputs), action, *(meta(2, samples) for _ in range(4)))


def _gradient_example(sizes: tuple[int, ...], activation: str, kind: str) -> None:
    continuous = kind == "continuous"
    from . import PPOConfig

    arena = Arena.build(sizes, (*sizes[:-1], 1), activation=activation, continuous=continuous)
    batch = _meta_batch(37, sizes[0], sizes[-1], continuous=continuous)
    loss = head(batch, PPOConfig(clip_value=True), continuous=continuous)
    minibatch = Minibatch(meta(2, 37, dtype=torch.int64), 12, 12, 37)
    sums = meta(3, 2, 1, loss.statistics)[1]
    weight = meta(2, arena.size)
    fused_gpu.gradient(weight, arena, arena.nets, batch.obs, loss, minibatch, sums, 32)


def _loss_example(actions: int, count: int, *, continuous: bool) -> None:
    from . import PPOConfig

    samples = 3 * count + 1
    batch = _meta_batch(samples, 4, actions, continuous=continuous)
    loss = head(batch, PPOConfig(clip_value=True), continuous=continuous)
    log_std = meta(2, actions + 1)[:, 1:] if continuous else None
    values = meta(2, count, actions), meta(2, count, 1)
    minibatch = Minibatch(meta(2, samples, dtype=torch.int64), count, count, samples)
    outputs = Outputs(values, log_std, values, log_std)
    loss_and_gradient(loss, minibatch, meta(2, loss.statistics), outputs)


EXAMPLES = [
    *(
        Example(name, partial(_loss_example, actions, count, continuous=name == "continuous"))
        for name, actions, count in (
            ("discrete", 2, 128),
            ("discrete_long", 2, 1024),
            ("discrete_wide", 18, 1024),
            ("continuous", 6, 128),
        )
    ),
    *fused_gpu.examples(_gradient_example, ("discrete", "continuous")),
]
