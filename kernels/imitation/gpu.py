"""Cloning in Triton: minibatches in one launch, then per update the network, the loss, Adam.

Six or seven launches an update, one more where actions are continuous, and nothing between them
that waits for the device, so that a CUDA graph can hold the call; with `first_update` and `lr` as
tensors on the device it moves on at every replay. Gradients off the mask are computed and never
read: Adam knows the mask, and that the critic stays as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena, Parameters
from ..mlp import gpu as mlp
from ..update import gpu as update_gpu
from . import loss_gpu, minibatch_gpu
from .reference import critic_spans

if TYPE_CHECKING:
    from . import CloneConfig

__all__ = ["EXAMPLES", "clone_update_"]

EXAMPLES = [*minibatch_gpu.EXAMPLES, *loss_gpu.EXAMPLES]

MOST_SAMPLES = 8192
"""Of a ticket, drawn at once: the observations of many updates, but not of any number of them."""


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
    density: float,
) -> Tensor:
    """Mean loss ``[P]``; see the op. All tensors are contiguous."""
    losses = obs.new_zeros(len(key))
    if not isinstance(first_update, Tensor):
        # Filled on the device: a copy from the host would wait for it.
        first_update = torch.full((), first_update, dtype=torch.int64, device=key.device)
    frozen = tuple(bound for span in critic_spans(arena) for bound in span)
    most = max(1, MOST_SAMPLES // config.batch)
    for begin in range(0, config.updates, most):
        updates = min(most, config.updates - begin)
        rows, minibatches = minibatch_gpu.draw(
            obs, dataset, key, first_update, begin, updates, config.batch
        )
        for update in range(updates):
            grad = _gradient(
                parameters.weight,
                arena,
                minibatches[:, update],
                rows[:, update],
                target,
                1.0 / config.updates,
                losses,
            )
            update_gpu.adam_(
                parameters.weight,
                grad,
                parameters.m,
                parameters.v,
                parameters.step,
                lr,
                parameters.mask,
                None,
                None,
                math.inf if config.max_norm is None else config.max_norm,
                config.beta1,
                config.beta2,
                config.eps,
                frozen=frozen,
            )
    return losses


def _gradient(
    weight: Tensor,
    arena: Arena,
    obs: Tensor,
    rows: Tensor,
    target: Tensor,
    share: float,
    losses: Tensor,
) -> Tensor:
    """Of one minibatch's loss, for every parameter ``[P, size of a row]``."""
    net = arena.actor
    # Weights are zero off the mask already.
    keep = mlp.choose(net, "ieee").backward != "fused"
    output, kept = mlp.forward(obs, weight, net, keep=keep)
    d_output = torch.empty_like(output)
    log_std = d_log_std = None
    if arena.log_std is not None:
        log_std = _log_std(weight, arena)
        d_log_std = log_std.new_empty(log_std.shape)
    loss_gpu.loss_and_gradient(output, log_std, rows, target, share, (d_output, d_log_std), losses)
    _, grad = mlp.backward(d_output, obs, weight, net, hidden=kept)
    if d_log_std is not None:
        _log_std(grad, arena).copy_(d_log_std)
    return grad


def _log_std(rows: Tensor, arena: Arena) -> Tensor:
    begin = arena.log_std or 0
    return rows[:, begin : begin + arena.actor.sizes[-1]]
