"""DQN's head of the training step in Numba: the loss of the value of the action taken.

The transitions of many updates are gathered at once, and the target networks run over them in one
call; only which action a double DQN would take next has to wait for its update.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..mlp import mlp
from ..mlp.cpu import FIRST, forward, gather
from ..mlp.layout import OUT, PANEL, Y, lay_out
from ..threads import share
from ..training.cpu import Head, bind, train
from ..vector import LANES
from .reference import bootstrap, draws

# Columns of the sample, rows of the head: what the value should be, the action taken; and for a
# double DQN the discount, then the target network's value of each action.
_TARGET, _ACTION, _DISCOUNT, _VALUES = range(4)
_LOSS, _VALUE, _NORM, _STATISTICS = range(4)

_ZERO = np.float32(0.0)
# Threshold and factor of each: the squared error is twice Huber's loss without a threshold.
_LOSSES = {
    "huber": (np.float32(1.0), np.float32(1.0)),
    "squared": (np.float32(np.inf), np.float32(2.0)),
}


class TargetConfig(NamedTuple):
    """What the head takes of `DQNConfig`."""

    double: bool
    threshold: np.float32
    factor: np.float32


@njit(cache=True)
def _draw(order, words, key, number, samples, measured):
    """One after the other: they were gathered in the order of the draws."""
    for i in range(order.shape[1]):
        order[0, i] = number * order.shape[1] + i


@njit(cache=True)
def _bootstrap(layout, packed, obs, sample, index, config):
    """For a double DQN, add what follows by the action that the network at hand would take."""
    if not config.double:
        return
    space, last = packed.space, layout.layers[-1]
    values, actions = last[Y], last[OUT]
    # The observations that follow come after all others.
    following = index + np.int32(sample.shape[0])
    for first in range(0, index.size, PANEL):
        rows = following[first : first + PANEL]
        columns = rows.size
        width = (columns + LANES - 1) // LANES * LANES
        gather(space, layout.x, obs, rows, columns, width)
        forward(layout, packed, FIRST, layout.actor_layers, width)
        for c in range(columns):
            best = 0
            for a in range(1, actions):
                if space[values + a * PANEL + c] > space[values + best * PANEL + c]:
                    best = a
            here = sample[index[first + c]]
            if here[_DISCOUNT] != _ZERO:
                here[_TARGET] += here[_DISCOUNT] * here[_VALUES + best]


@njit(cache=True)
def _loss(layout, packed, columns, width, size, prepared, config, measured):
    space, delta, head = packed.space, layout.delta, layout.head
    last = layout.layers[-1]
    values, actions = last[Y], last[OUT]
    scale = np.float32(config.factor / size)
    for a in range(actions):
        space[delta + a * PANEL : delta + a * PANEL + width] = _ZERO
    loss, value = 0.0, 0.0
    for c in range(columns):
        action = int(space[head + _ACTION * PANEL + c]) * PANEL + c
        error = space[values + action] - space[head + _TARGET * PANEL + c]
        # A NaN is beyond neither threshold, so that it reaches the gradient.
        clipped = config.threshold if error > config.threshold else error
        clipped = -config.threshold if error < -config.threshold else clipped
        space[delta + action] = clipped * scale
        loss += clipped * (error - 0.5 * clipped)
        value += space[values + action]
    measured[_LOSS] += config.factor * loss / size
    measured[_VALUE] += value / size


# There is no critic.
_update_ticket = bind(Head(0, _draw, _bootstrap, _loss, _loss))


@njit(cache=True, nogil=True)
def _update(threads, tickets, arguments):
    share(_update_ticket, threads, tickets, arguments)


def dqn_update_(update, target, replay, stored) -> Tensor:
    """Statistics ``[3, P]``; see the op."""
    parameters, arena, key, _, _, config, density = update
    sums = np.zeros((len(key), _STATISTICS))
    for updates, batch in draws(update, replay, stored):
        values = mlp(batch.next_obs, target, arena.actor, parameters.mask, density=density)
        obs, action = batch.obs, batch.action.to(torch.float32)
        if config.double:
            obs = torch.cat([obs, batch.next_obs], 1)
            columns = torch.stack([batch.reward, action, batch.discount], -1)
            sample = torch.cat([columns, values], -1)
        else:
            wanted = bootstrap(batch, values, values)
            sample = torch.stack([wanted, action], -1)
        sums += train(
            _update,
            lay_out((arena.actor,), arena.prunable, density, None, sample.shape[-1]),
            update,
            torch.arange(len(key), device="cpu"),
            obs,
            sample,
            TargetConfig(bool(config.double), *_LOSSES[config.loss]),
            first=0,
            draws=updates,
            drawn=config.batch,
            size=config.batch,
            statistics=_STATISTICS,
        )
    return torch.from_numpy(np.ascontiguousarray(sums.T / config.updates, np.float32))
