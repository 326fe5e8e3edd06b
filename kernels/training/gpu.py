"""The training step in Triton where a network takes a launch of its own: forward, head, backward.

Nothing between the launches waits for the device. Gradients off the mask are computed and never
read: Adam knows the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arena import Arena, Net
from ..mlp import gpu as mlp
from ..update.gpu import adam_
from . import Update


class Outputs(NamedTuple):
    """What a head's loss reads, and where it writes the gradients by it.

    Attributes:
        values: ``[P, B, outputs]`` of each network, contiguous.
        log_std: ``[P, A]``, a view of the arena's rows, or None if actions are discrete.
        d_values: shaped like ``values``.
        d_log_std: shaped like ``log_std``, contiguous.
    """

    values: tuple[Tensor, ...]
    log_std: Tensor | None
    d_values: tuple[Tensor, ...]
    d_log_std: Tensor | None


def gradient(
    weight: Tensor,
    arena: Arena,
    nets: Sequence[Net],
    obs: Tensor,
    loss: Callable[[Outputs], None],
) -> Tensor:
    """Of one minibatch's loss, for every parameter ``[P, size of a row]``.

    Args:
        weight: ``[P, size]`` float32, zero off the mask.
        arena: its layout.
        nets: those that take part.
        obs: ``[P, B, I]`` float32.
        loss: the head: writes the gradients by the outputs.
    """
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


def adam_step_(update: Update[Any], grad: Tensor, **options: Any) -> Tensor:
    """Clip by each ticket's norm ``[P]``, which is returned, and step; see `update.gpu.adam_`."""
    weight, mask, m, v, step = update.parameters
    config = update.config
    return adam_(
        weight,
        grad,
        m,
        v,
        step,
        update.lr,
        mask,
        math.inf if config.max_norm is None else config.max_norm,
        config.beta1,
        config.beta2,
        config.eps,
        **options,
    )


def _forward(obs: Tensor, weight: Tensor, net: Net) -> tuple[Tensor, Tensor | None]:
    """The output, and the activations if the backward pass does not recompute them."""
    keep = mlp.choose(net, "ieee").backward != "fused"
    return mlp.forward(obs, weight, net, keep=keep)


def _log_std(rows: Tensor, arena: Arena) -> Tensor:
    begin = arena.log_std or 0
    return rows[:, begin : begin + arena.actor.sizes[-1]]
