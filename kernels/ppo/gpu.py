"""PPO's update in Triton: three launches a minibatch for narrow networks, a dozen for others.

Narrow ones get the gradient in one launch (`fused_gpu`), one adds up its stretches and takes its
norm, one is Adam. For others it is a gather, two networks forward, the loss, both back, and Adam.
Nothing between the launches waits for the device, so that a CUDA graph can hold the whole
iteration; with ``iteration`` and `lr` as tensors on the device it moves on at every replay.
Gradients off the mask are computed and never read: Adam knows the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from ..arena import Arena
from ..examples import Example, meta
from ..jit import jit_kernel
from ..mlp import gpu as mlp
from ..random import Stream, permutation
from ..training import Update
from ..training import gpu as training
from ..training.gpu import Outputs, adam_step_
from . import fused_gpu, loss_gpu

if TYPE_CHECKING:
    from . import Batch, PPOConfig


@jit_kernel(fp_fusion=True)
def _statistics_kernel(sums, norms, statistics, minibatches, stretches, count):
    """``statistics [6, P]`` from sums ``[minibatches, P, stretches, 5]`` and norms ``[., P]``.

    In order, one program a ticket; a sum over the last axis but one may not depend on P.
    """
    ticket, tickets = tl.program_id(0), tl.num_programs(0)
    entry = tl.arange(0, 8)
    total = tl.zeros([8], tl.float32)
    norm = 0.0
    for minibatch in range(minibatches):
        place = minibatch * tickets + ticket
        for stretch in range(stretches):
            here = sums + (place * stretches + stretch) * 5
            total += tl.load(here + entry, mask=entry < 5, other=0.0)
        norm += tl.load(norms + place)
    means = tl.where(entry < 5, total / count, norm) / minibatches
    tl.store(statistics + entry * tickets + ticket, means, mask=entry < 6)


def _example() -> None:
    _statistics(meta(4, 2, 3, loss_gpu.SUMS), meta(4, 2), 9)


EXAMPLES = [*loss_gpu.EXAMPLES, *fused_gpu.EXAMPLES, Example("any", _example)]


def is_fused(arena: Arena) -> bool:
    """Whether a minibatch's gradient is one launch: a fixed function of the networks' shapes."""
    narrow = all(mlp.choose(net, "ieee").backward == "fused" for net in arena.nets)
    return narrow and fused_gpu.fits(arena)


def describe(arena: Arena) -> str:
    """What runs, and why, in words."""
    width = max(size for net in arena.nets for size in net.sizes)
    if is_fused(arena):
        return (
            "three launches a minibatch: the gradient of both networks with activations, loss and "
            f"sums in registers, its norm, Adam; width {width}"
        )
    return (
        "loss and its gradient in one pass between the networks' passes; see `mlp.plan`; "
        f"registers do not hold both networks' gradients; width {width}"
    )


def ppo_update_(update: Update[PPOConfig], batch: Batch) -> Tensor:
    """Statistics ``[6, P]``; see `reference.ppo_update_`."""
    parameters, arena, key, iteration, _, config, _ = update
    tickets, samples = batch.logp.shape
    if tickets == 0:
        return batch.logp.new_empty(loss_gpu.SUMS + 1, 0)
    size = samples // config.minibatches
    fields = type(batch)(*(field.contiguous() for field in batch))
    stretches, stretch = 1, size
    gradient = _gradient
    if is_fused(arena):
        gradient = _fused_gradient
        stretches, stretch = fused_gpu.cut_minibatch(arena, fields, size)
    # Of the last epoch's minibatches: each epoch writes over what the one before it left.
    sums = batch.logp.new_empty(config.minibatches, tickets, stretches, loss_gpu.SUMS)
    norms = batch.logp.new_empty(config.minibatches, tickets)
    for epoch in range(config.epochs):
        step = iteration * config.epochs + epoch
        order = permutation(key, samples, stream=Stream.MINIBATCH, step=step)
        for minibatch in range(config.minibatches):
            first = minibatch * size
            grad = gradient(
                parameters.weight, arena, order, first, fields, config, sums[minibatch], stretch
            )
            adam_step_(update, grad, norm=norms[minibatch])
    return _statistics(sums, norms, size)


def _fused_gradient(
    weight: Tensor,
    arena: Arena,
    order: Tensor,
    first: int,
    batch: Batch,
    config: PPOConfig,
    sums: Tensor,
    stretch: int,
) -> Tensor:
    """Of one minibatch's loss, in stretches ``[P, stretches, size of a row]``."""
    rows = weight.new_empty(*sums.shape[:2], weight.shape[1])
    fused_gpu.gradient(weight, arena, order, first, batch, config, rows, sums, stretch)
    return rows


def _gradient(
    weight: Tensor,
    arena: Arena,
    order: Tensor,
    first: int,
    batch: Batch,
    config: PPOConfig,
    sums: Tensor,
    stretch: int,
) -> Tensor:
    """Of one minibatch's loss, all one stretch, for every parameter ``[P, size of a row]``."""
    index = order[:, first : first + stretch, None].expand(-1, -1, batch.obs.shape[2])
    obs = batch.obs.gather(1, index)

    def head(outputs: Outputs) -> None:
        output, value = outputs.values
        d_output, d_value = outputs.d_values
        loss_gpu.loss_and_gradient(
            output,
            value,
            outputs.log_std,
            order,
            first,
            batch,
            config,
            (d_output, d_value, outputs.d_log_std),
            sums,
        )

    return training.gradient(weight, arena, arena.nets, obs, head)


def _statistics(sums: Tensor, norms: Tensor, count: int) -> Tensor:
    """``[6, P]``, means over the minibatches of what each summed over ``count`` samples."""
    minibatches, tickets, stretches, _ = sums.shape
    statistics = sums.new_empty(loss_gpu.SUMS + 1, tickets)
    with torch.cuda.device_of(sums):
        _statistics_kernel[(tickets,)](
            sums, norms, statistics, minibatches, stretches, count, num_warps=1
        )
    return statistics
