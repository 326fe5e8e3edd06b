"""Behavioural cloning as plain torch: KL(expert || student) for every ticket at once, Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arena import Arena
from ..mlp.reference import mlp
from ..random import Stream, integers
from ..squashed.reference import distribution
from ..training import Update
from ..training.reference import step_

if TYPE_CHECKING:
    from . import CloneConfig


def loss(weight: Tensor, mask: Tensor, arena: Arena, obs: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence ``[P]`` from the expert to the student."""
    output = mlp(obs, weight, arena.actor, mask)
    if not arena.continuous:
        # An action the expert never takes contributes zero, whatever the student thinks.
        target = target.clamp(min=-87.0)
        return (target.exp() * (target - output.log_softmax(-1))).sum(-1).mean(1)
    if arena.squashed:
        return gaussian_divergence(*distribution(output), target).mean(1)
    begin = arena.log_std or 0
    log_std = weight[:, begin : begin + arena.actions][:, None]
    return gaussian_divergence(output, log_std, target).mean(1)


def gaussian_divergence(mean: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    """KL ``[P, B]`` from the expert's Gaussians, means and log standard deviations ``target``."""
    wanted, spread = target.chunk(2, dim=-1)
    square = (2 * spread).exp() + (mean - wanted) ** 2
    return (log_std - spread + 0.5 * square * (-2 * log_std).exp() - 0.5).sum(-1)


def measured_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`loss`, and the same as what it measured, ``[1, P]``."""
    total = loss(*arguments)
    return total, total.detach()[None]


def clone_update_(
    update: Update[CloneConfig], obs: Tensor, target: Tensor, dataset: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss ``[P]`` and gradient norm; see the op."""
    (weight, _, m, v, _), arena, key, first, _, config, _ = update
    measured = []
    samples = obs.shape[1]
    rows = dataset[:, None]
    for number in range(config.updates):
        step = first + number
        index = integers(key, config.batch, samples, stream=Stream.MINIBATCH, step=step)
        minibatch = obs[rows, index], target[rows, index]
        before = [tensor.clone() for tensor in (weight, m, v)]
        measured.append(step_(update, measured_loss, (arena, *minibatch)))
        # Adam would still move the critic by what its moments remember.
        for tensor, old in zip((weight, m, v), before, strict=True):
            for begin, end in critic_spans(arena):
                tensor[:, begin:end] = old[:, begin:end]
    loss, norm = torch.stack(measured).mean(0)
    return loss, norm


def critic_spans(arena: Arena) -> list[tuple[int, int]]:
    """``[begin, end)`` of the critics' parameters in a row, in order, neighbours as one."""
    spans = []
    if arena.temperature is not None:
        spans.append((arena.temperature, arena.temperature + 1))
    for net in arena.critics:
        for layer in range(net.depth):
            out, inp = net.shape(layer)
            spans.append((net.weights[layer], net.weights[layer] + out * inp))
            spans.append((net.biases[layer], net.biases[layer] + out))
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined
