"""Behavioural cloning as plain torch: KL(expert || student) for every ticket at once, Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena, Net, Parameters
from ..mlp.reference import mlp
from ..random import Stream, integers
from ..update import adam_

if TYPE_CHECKING:
    from . import CloneConfig

__all__ = ["clone_update_", "loss"]


def loss(weight: Tensor, mask: Tensor, arena: Arena, obs: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence ``[P]`` from the expert to the student."""
    output = mlp(obs, weight, arena.actor, mask)
    if arena.log_std is None:
        # An action the expert never takes contributes zero, whatever the student thinks.
        target = target.clamp(min=-87.0)
        return (target.exp() * (target - output.log_softmax(-1))).sum(-1).mean(1)
    mean, log_std = target.chunk(2, dim=-1)
    student = weight[:, arena.log_std : arena.log_std + arena.actor.sizes[-1]][:, None]
    square = (2 * log_std).exp() + (output - mean) ** 2
    return (student - log_std + 0.5 * square * (-2 * student).exp() - 0.5).sum(-1).mean(1)


def clone_update_(
    parameters: Parameters,
    arena: Arena,
    obs: Tensor,
    target: Tensor,
    dataset: Tensor,
    key: Tensor,
    first_update: int,
    lr: Tensor,
    config: CloneConfig,
) -> Tensor:
    losses = []
    samples = obs.shape[1]
    critic = [] if arena.critic is None else _spans(arena.critic)
    for update in range(first_update, first_update + config.updates):
        index = integers(key, config.batch, samples, stream=Stream.MINIBATCH, step=update)
        rows = dataset[:, None]
        with torch.enable_grad():
            weight = parameters.weight.detach().requires_grad_()
            total = loss(weight, parameters.mask, arena, obs[rows, index], target[rows, index])
            (grad,) = torch.autograd.grad(total.sum(), weight)
        state = (parameters.weight, parameters.m, parameters.v)
        before = [tensor.clone() for tensor in state]
        adam_(
            parameters.weight,
            grad,
            parameters.m,
            parameters.v,
            parameters.step,
            lr,
            parameters.mask,
            max_norm=config.max_norm,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
        )
        # Adam would still move the critic by what its moments remember.
        for tensor, old in zip(state, before, strict=True):
            for span in critic:
                tensor[:, span] = old[:, span]
        losses.append(total.detach())
    return torch.stack(losses).mean(0)


def _spans(net: Net) -> list[slice]:
    """Where a network's weights and biases lie in a row."""
    spans = []
    for layer in range(net.depth):
        out, inp = net.shape(layer)
        spans.append(slice(net.weights[layer], net.weights[layer] + out * inp))
        spans.append(slice(net.biases[layer], net.biases[layer] + out))
    return spans
