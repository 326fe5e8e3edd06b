"""The training step in Triton: a minibatch's gradient by a head, clipping, Adam.

Where registers hold the networks that is three launches: the gradient (`fused_gpu`), the sum of its
stretches with its norm, Adam. For others each network has launches of its own, forward and back,
with the loss between (`loss_gpu`). Nothing between the launches waits for the device, so that a
CUDA graph can hold them. Gradients off the mask are computed and never read: Adam knows the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arena import Arena, Net
from ..examples import Example, meta
from ..jit import jit_kernel
from ..mlp import gpu as mlp
from ..update.gpu import adam_
from . import Update, fused_gpu
from .head_gpu import GPUHead, Minibatch
from .loss_gpu import Outputs, loss_and_gradient


class Learner:
    """Some updates of every ticket by one loss, and what they measure.

    Attributes:
        fused: whether a minibatch's gradient is one launch: a fixed function of the networks'
            shapes.
        stretch: samples of all stretches of a minibatch but the last.
        sums: ``[updates, P, stretches, statistics]`` float32, of all samples.
        norms: ``[updates, P]``, of the gradients before clipping.
    """

    def __init__(
        self,
        update: Update[Any],
        nets: tuple[Net, ...],
        batch: int,
        updates: int,
        *,
        head: str | None,
        statistics: int,
    ) -> None:
        """Room for what ``updates`` of ``batch`` samples measure.

        Args:
            update: parameters, learning rates, numbers of Adam.
            nets: those that take part, the actor first.
            batch: samples of a minibatch.
            updates: how many.
            head: its name, or None if the loss is none in Triton.
            statistics: how many the loss measures.
        """
        self._update, self._nets, self._batch = update, nets, batch
        weight = update.parameters.weight
        self.fused, splits, self.stretch = False, 1, batch
        if head is not None and fused_gpu.fits(nets):
            self.fused = True
            splits, self.stretch = fused_gpu.cut_minibatch(nets, head, weight.device, batch)
        self.sums = weight.new_empty(updates, len(weight), splits, statistics)
        self.norms = weight.new_empty(updates, len(weight))

    def take_(
        self,
        number: int,
        head: GPUHead,
        obs: Tensor,
        minibatch: Minibatch,
        gather: Callable[[], Tensor],
        frozen: tuple[int, ...] = (),
    ) -> None:
        """Update ``number``, by a head.

        Args:
            number: whose statistics are written.
            head: of the loss.
            obs: ``[..., I]`` float32, of which the samples are rows.
            minibatch: the samples.
            gather: makes ``[P, B, I]`` of them, for networks with launches of their own.
            frozen: see `update.gpu.adam_`.
        """
        if not self.fused:
            loss = partial(loss_and_gradient, head, minibatch, self.sums[number])
            self.take_apart_(number, gather(), loss, frozen)
            return
        weight, arena, sums = self._update.parameters.weight, self._update.arena, self.sums[number]
        grad = fused_gpu.gradient(
            weight, arena, self._nets, obs, head, minibatch, sums, self.stretch
        )
        self._step_(number, grad, frozen)

    def take_apart_(
        self,
        number: int,
        obs: Tensor,
        loss: Callable[[Outputs], None],
        frozen: tuple[int, ...] = (),
    ) -> None:
        """Update ``number``, with launches for each network and any loss between.

        Args:
            number: whose statistics the loss writes.
            obs: ``[P, B, I]`` float32.
            loss: writes the gradients by the outputs.
            frozen: see `update.gpu.adam_`.
        """
        weight, arena = self._update.parameters.weight, self._update.arena
        self._step_(number, _gradient(weight, arena, self._nets, obs, loss), frozen)

    def _step_(self, number: int, grad: Tensor, frozen: tuple[int, ...]) -> None:
        weight, mask, m, v, step = self._update.parameters
        config = self._update.config
        adam_(
            weight,
            grad,
            m,
            v,
            step,
            self._update.lr,
            mask,
            math.inf if config.max_norm is None else config.max_norm,
            config.beta1,
            config.beta2,
            config.eps,
            frozen=frozen,
            norm=self.norms[number],
        )

    def statistics(self) -> Tensor:
        """Means ``[statistics + 1, P]`` over samples and updates, the last that of the norms."""
        return _average(self.sums, self.norms, self._batch)


def describe(nets: tuple[Net, ...]) -> str:
    """What a minibatch is by a head, and why, in words."""
    width = max(size for net in nets for size in net.sizes)
    if fused_gpu.fits(nets):
        return (
            "three launches a minibatch: the gradient of all networks with activations, loss and "
            f"sums in registers, its norm, Adam; width {width}"
        )
    return (
        "loss and its gradient in one pass between the networks' passes; see `mlp.plan`; "
        f"registers do not hold all networks' gradients; width {width}"
    )


def _gradient(
    weight: Tensor,
    arena: Arena,
    nets: tuple[Net, ...],
    obs: Tensor,
    loss: Callable[[Outputs], None],
) -> Tensor:
    """Of one minibatch's loss, for every parameter ``[P, size of a row]``."""
    passes = [_forward(obs, weight, net) for net in nets]
    values = tuple(value for value, _ in passes)
    log_std = d_log_std = None
    if arena.log_std is not None:
        log_std = _log_std(weight, arena)
        d_log_std = log_std.new_empty(log_std.shape)
    outputs = Outputs(values, log_std, tuple(map(torch.empty_like, values)), d_log_std)
    loss(outputs)
    # Each network writes its own part: to add rows up would be passes over all of them.
    grad = weight.new_zeros(weight.shape)
    for net, (_, kept), d_value in zip(nets, passes, outputs.d_values, strict=True):
        mlp.backward(d_value, obs, weight, net, hidden=kept, into=grad)
    if d_log_std is not None:
        _log_std(grad, arena).copy_(d_log_std)
    return grad


def _forward(obs: Tensor, weight: Tensor, net: Net) -> tuple[Tensor, Tensor | None]:
    """The output, and the activations if the backward pass does not recompute them."""
    keep = mlp.choose(net, "ieee").backward != "fused"
    return mlp.forward(obs, weight, net, keep=keep)


def _log_std(rows: Tensor, arena: Arena) -> Tensor:
    begin = arena.log_std or 0
    return rows[:, begin : begin + arena.actor.sizes[-1]]


@jit_kernel(fp_fusion=True)
def _statistics_kernel(
    sums,  # [updates, P, stretches, STATISTICS]
    norms,  # [updates, P]
    means,  # [STATISTICS + 1, P], written
    updates,
    stretches,
    count,
    STATISTICS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Means over updates of what each summed over ``count`` samples, and of the norms.

    In order, one program a ticket; a sum over the last axis but one may not depend on P.
    """
    ticket, tickets = tl.program_id(0), tl.num_programs(0)
    entry = tl.arange(0, PADDED)
    total = tl.zeros([PADDED], tl.float32)
    norm = 0.0
    for update in range(updates):
        place = update * tickets + ticket
        for stretch in range(stretches):
            here = sums + (place * stretches + stretch) * STATISTICS
            total += tl.load(here + entry, mask=entry < STATISTICS, other=0.0)
        norm += tl.load(norms + place)
    mean = tl.where(entry < STATISTICS, total / count, norm) / updates
    tl.store(means + entry * tickets + ticket, mean, mask=entry <= STATISTICS)


def _average(sums: Tensor, norms: Tensor, count: int) -> Tensor:
    updates, tickets, stretches, statistics = sums.shape
    means = sums.new_empty(statistics + 1, tickets)
    if tickets:
        with torch.cuda.device_of(sums):
            _statistics_kernel[(tickets,)](
                sums,
                norms,
                means,
                updates,
                stretches,
                count,
                STATISTICS=statistics,
                PADDED=triton.next_power_of_2(statistics + 1),
                num_warps=1,
            )
    return means


EXAMPLES = [
    Example(f"of_{count}", partial(lambda n: _average(meta(4, 2, 3, n), meta(4, 2), 9), count))
    for count in (1, 2, 5)
]
