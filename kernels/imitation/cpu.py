"""Cloning's head of the training step in Numba: KL(expert, student), of minibatches of a data set.

The critic is not packed, so nothing of it can change.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..compiling import njit
from ..mlp.layout import OUT, PANEL, Y, lay_out
from ..random import Stream
from ..random.cpu import fill_words
from ..squashed.reference import LOG_STD_RANGE
from ..threads import share
from ..training.cpu import Head, bind, train
from ..vector import (
    LANES,
    fma,
    load,
    maximum,
    minimum,
    splat,
    store,
    sum_lanes,
    where_positive,
)
from ..vector_math import exp, log

_ZERO, _HALF, _ONE = (np.float32(number) for number in (0.0, 0.5, 1.0))
_LOWEST, _HIGHEST = (np.float32(bound) for bound in LOG_STD_RANGE)
_STREAM = int(Stream.MINIBATCH)
# Rows of the head: the loss, then those of the sample, the target.
_SCRATCH = 1
_LOSS, _TARGET = 0, PANEL
# Below the logarithm of the smallest normal float32: an action the expert never takes.
_NEVER = np.float32(-87.0)


class CloneHead(NamedTuple):
    """What the loss takes of the student."""

    squashed: bool


@njit(cache=True)
def _draw(order, words, key, number, samples, measured):
    """With replacement, from the whole data set."""
    fill_words(words[0], key, _STREAM, number)
    for i in range(order.shape[1]):
        order[0, i] = (np.int64(words[0, i]) * samples) >> 32


@njit(cache=True)
def _prepare(layout, packed, obs, sample, index, config):
    return None


@njit(cache=True)
def _mask_tail(space, row, columns, width):
    """Zero a row's tail; returns the sum of what comes before it."""
    total = 0.0
    for c in range(row, row + columns):
        total += space[c]
    space[row + columns : row + width] = _ZERO
    return total


@njit(cache=True)
def _categorical_loss(layout, packed, columns, width, scale):
    """Sum over the panel of sum_a p_a (log p_a - log q_a); the target's rows are log p."""
    space, delta, target = packed.space, layout.delta, layout.head + _TARGET
    last = layout.layers[-1]
    logits, actions = last[Y], last[OUT]
    losses = layout.head + _LOSS
    for c in range(0, width, LANES):
        top = load(space, logits + c)
        for a in range(1, actions):
            top = maximum(top, load(space, logits + a * PANEL + c))
        total, mass = splat(_ZERO), splat(_ZERO)
        for a in range(actions):
            total = total + exp(load(space, logits + a * PANEL + c) - top)
            mass = mass + exp(maximum(load(space, target + a * PANEL + c), splat(_NEVER)))
        shift = top + log(total)
        loss = splat(_ZERO)
        for a in range(actions):
            expert = maximum(load(space, target + a * PANEL + c), splat(_NEVER))
            student = load(space, logits + a * PANEL + c) - shift
            probability = exp(expert)
            loss = fma(probability, expert - student, loss)
            # Unless the expert's probabilities sum to one, their sum weighs the student's.
            gradient = fma(exp(student), mass, splat(_ZERO) - probability)
            store(space, delta + a * PANEL + c, gradient * splat(scale))
        store(space, losses + c, loss)
    for a in range(actions):
        space[delta + a * PANEL + columns : delta + a * PANEL + width] = _ZERO
    return _mask_tail(space, losses, columns, width)


@njit(cache=True)
def _gaussian_loss(layout, packed, columns, width, scale):
    """Sum over the panel of the KL between diagonal Gaussians; the target's rows are the expert's
    means, then its log standard deviations."""
    space, delta, target = packed.space, layout.delta, layout.head + _TARGET
    last = layout.layers[-1]
    mean, actions = last[Y], last[OUT]
    begin = packed.begin[2 * layout.layers.shape[0]]
    losses = layout.head + _LOSS
    space[losses : losses + width] = _ZERO
    for a in range(actions):
        log_std = packed.weight[begin + a]
        precision = splat(np.float32(math.exp(-2.0 * log_std)))
        excess = splat(_ZERO)
        for c in range(0, width, LANES):
            spread = load(space, target + (actions + a) * PANEL + c)
            error = load(space, mean + a * PANEL + c) - load(space, target + a * PANEL + c)
            square = fma(error, error, exp(spread + spread)) * precision
            loss = splat(log_std - np.float32(0.5)) - spread
            loss = fma(splat(np.float32(0.5)), square, loss)
            store(space, losses + c, load(space, losses + c) + loss)
            store(space, delta + a * PANEL + c, error * precision * splat(scale))
            store(space, target + a * PANEL + c, splat(np.float32(1.0)) - square)
        space[delta + a * PANEL + columns : delta + a * PANEL + width] = _ZERO
        _mask_tail(space, target + a * PANEL, columns, width)
        for c in range(0, width, LANES):
            excess = excess + load(space, target + a * PANEL + c)
        packed.grad[begin + a] += sum_lanes(excess) * scale
    return _mask_tail(space, losses, columns, width)


@njit(cache=True)
def _squashed_loss(layout, packed, columns, width, scale):
    """As `_gaussian_loss`, of log standard deviations that are outputs too and have their range."""
    space, delta, target = packed.space, layout.delta, layout.head + _TARGET
    last = layout.layers[-1]
    mean, actions = last[Y], last[OUT] // 2
    log_std = mean + actions * PANEL
    losses = layout.head + _LOSS
    space[losses : losses + width] = _ZERO
    for a in range(actions):
        for c in range(a * PANEL, a * PANEL + width, LANES):
            given = load(space, log_std + c)
            student = minimum(maximum(given, splat(_LOWEST)), splat(_HIGHEST))
            precision = exp(splat(_ZERO) - student - student)
            spread = load(space, target + actions * PANEL + c)
            error = load(space, mean + c) - load(space, target + c)
            square = fma(error, error, exp(spread + spread)) * precision
            loss = fma(splat(_HALF), square, student - spread - splat(_HALF))
            place = losses + c - a * PANEL
            store(space, place, load(space, place) + loss)
            store(space, delta + c, error * precision * splat(scale))
            moved = (splat(_ONE) - square) * splat(scale)
            # Beyond the range nothing moves it.
            inside = where_positive(splat(_HIGHEST) - given, moved, splat(_ZERO))
            inside = where_positive(given - splat(_LOWEST), inside, splat(_ZERO))
            store(space, delta + actions * PANEL + c, inside)
    for row in range(2 * actions):
        space[delta + row * PANEL + columns : delta + row * PANEL + width] = _ZERO
    return _mask_tail(space, losses, columns, width)


@njit(cache=True)
def _loss(layout, packed, columns, width, size, prepared, config, measured):
    scale = np.float32(1.0 / size)
    if config.squashed:
        loss = _squashed_loss(layout, packed, columns, width, scale)
    elif layout.actions:
        loss = _gaussian_loss(layout, packed, columns, width, scale)
    else:
        loss = _categorical_loss(layout, packed, columns, width, scale)
    measured[0] += loss / size


# There is no critic.
_update_ticket = bind(Head(_SCRATCH, _draw, _prepare, _loss, _loss))


@njit(cache=True, nogil=True)
def _update(threads, tickets, arguments):
    share(_update_ticket, threads, tickets, arguments)


def clone_update_(update, obs, target, dataset) -> tuple[torch.Tensor, ...]:
    """Mean loss ``[P]`` and gradient norm; see the op. All tensors are contiguous."""
    _, arena, _, first, _, config, density = update
    rows = _SCRATCH + target.shape[-1]
    measured = train(
        _update,
        lay_out((arena.actor,), arena.prunable, density, arena.log_std, rows),
        update,
        dataset,
        obs,
        target,
        CloneHead(arena.squashed),
        first=first,
        draws=config.updates,
        drawn=config.batch,
        size=config.batch,
        statistics=2,
    )
    means = (measured / config.updates).astype(np.float32)
    return tuple(torch.from_numpy(mean) for mean in np.ascontiguousarray(means.T))
