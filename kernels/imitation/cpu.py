"""Behavioural cloning of a population in Numba: a ticket per thread, all updates in one call.

Per update: draw the minibatch, actor forward, KL loss, actor backward, clipping and Adam on the
packed parameters. The critic is not packed, so nothing of it can change.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..compiling import njit
from ..mlp.cpu import (
    FIRST,
    backward,
    clear_gradient,
    collect_gradient,
    forward,
    gather,
)
from ..mlp.layout import OUT, PANEL, Y, lay_out, prepare
from ..mlp.packing import (
    open_scratch,
    pack,
    read_row,
    turn,
    turn_values,
    write_row,
)
from ..random import Stream
from ..random.cpu import fill_words
from ..threads import share
from ..update.cpu import adam_row
from ..vector import (
    LANES,
    exp,
    fma,
    load,
    log,
    maximum,
    splat,
    store,
    sum_lanes,
)

__all__ = ["clone_update_"]

_ZERO = np.float32(0.0)
_STREAM = int(Stream.MINIBATCH)
# Below the logarithm of the smallest normal float32: an action the expert never takes.
_NEVER = np.float32(-87.0)


class CloneConstants(NamedTuple):
    """`CloneConfig` with plain numbers, as Numba takes it; no clipping is an infinite norm."""

    updates: int
    batch: int
    max_norm: float
    beta1: float
    beta2: float
    eps: float


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
    """Sum over the panel of sum_a p_a (log p_a - log q_a); the head's rows are log p, then loss."""
    space, delta, head = packed.space, layout.delta, layout.head
    last = layout.layers[-1]
    logits, actions = last[Y], last[OUT]
    losses = head + actions * PANEL
    for c in range(0, width, LANES):
        top = load(space, logits + c)
        for a in range(1, actions):
            top = maximum(top, load(space, logits + a * PANEL + c))
        total, mass = splat(_ZERO), splat(_ZERO)
        for a in range(actions):
            total = total + exp(load(space, logits + a * PANEL + c) - top)
            mass = mass + exp(maximum(load(space, head + a * PANEL + c), splat(_NEVER)))
        shift = top + log(total)
        loss = splat(_ZERO)
        for a in range(actions):
            expert = maximum(load(space, head + a * PANEL + c), splat(_NEVER))
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
    """Sum over the panel of the KL between diagonal Gaussians; the head's rows are the means of
    the expert, its log standard deviations, then the loss."""
    space, delta, head = packed.space, layout.delta, layout.head
    last = layout.layers[-1]
    mean, actions = last[Y], last[OUT]
    begin = packed.begin[2 * layout.layers.shape[0]]
    losses = head + 2 * actions * PANEL
    space[losses : losses + width] = _ZERO
    for a in range(actions):
        log_std = packed.weight[begin + a]
        precision = splat(np.float32(math.exp(-2.0 * log_std)))
        excess = splat(_ZERO)
        for c in range(0, width, LANES):
            spread = load(space, head + (actions + a) * PANEL + c)
            error = load(space, mean + a * PANEL + c) - load(space, head + a * PANEL + c)
            square = fma(error, error, exp(spread + spread)) * precision
            loss = splat(log_std - np.float32(0.5)) - spread
            loss = fma(splat(np.float32(0.5)), square, loss)
            store(space, losses + c, load(space, losses + c) + loss)
            store(space, delta + a * PANEL + c, error * precision * splat(scale))
            store(space, head + a * PANEL + c, splat(np.float32(1.0)) - square)
        space[delta + a * PANEL + columns : delta + a * PANEL + width] = _ZERO
        _mask_tail(space, head + a * PANEL, columns, width)
        for c in range(0, width, LANES):
            excess = excess + load(space, head + a * PANEL + c)
        packed.grad[begin + a] += sum_lanes(excess) * scale
    return _mask_tail(space, losses, columns, width)


@njit(cache=True)
def _minibatch(layout, packed, index, obs, target):
    """Gradient of one minibatch, panel by panel; returns its mean loss."""
    depth = layout.layers.shape[0]
    scale = np.float32(1.0 / index.size)
    loss = 0.0
    for first in range(0, index.size, PANEL):
        rows = index[first : first + PANEL]
        columns = rows.size
        width = (columns + LANES - 1) // LANES * LANES
        gather(packed.space, layout.x, obs, rows, columns, width)
        gather(packed.space, layout.head, target, rows, columns, width)
        forward(layout, packed, FIRST, depth, width)
        if layout.actions:
            loss += _gaussian_loss(layout, packed, columns, width, scale)
        else:
            loss += _categorical_loss(layout, packed, columns, width, scale)
        backward(layout, packed, FIRST, depth, columns, width, False)
    return loss / index.size


@njit(cache=True)
def _update_ticket(
    thread,
    ticket,
    layout,
    floats,
    integers,
    parameters,
    data,
    dataset,
    key,
    first_update,
    lr,
    constants,
    losses,
):
    weights, masks, ms, vs, steps = parameters
    packed = open_scratch(layout, floats[thread], integers[thread])
    index = np.empty(constants.batch, np.int64)
    mask = masks[ticket]
    obs, target = data[0][dataset[ticket]], data[1][dataset[ticket]]
    count = pack(layout, packed, mask, True)
    turn(layout, packed, False)
    read_row(layout, packed, mask, weights[ticket], packed.weight)
    read_row(layout, packed, mask, ms[ticket], packed.m)
    read_row(layout, packed, mask, vs[ticket], packed.v)
    loss = 0.0
    for update in range(first_update, first_update + constants.updates):
        fill_words(index, key[ticket], _STREAM, update)
        for i in range(index.size):
            index[i] = (index[i] * obs.shape[0]) >> 32
        clear_gradient(layout, packed, count)
        turn_values(layout, packed, False)
        loss += _minibatch(layout, packed, index, obs, target)
        collect_gradient(layout, packed, mask)
        steps[ticket] += 1
        adam_row(
            packed.weight[:count],
            packed.grad[:count],
            packed.m[:count],
            packed.v[:count],
            mask[:0],
            lr[ticket],
            steps[ticket],
            constants.max_norm,
            constants.beta1,
            constants.beta2,
            constants.eps,
        )
    losses[ticket] = loss / constants.updates
    write_row(layout, packed, mask, packed.weight, weights[ticket])
    write_row(layout, packed, mask, packed.m, ms[ticket])
    write_row(layout, packed, mask, packed.v, vs[ticket])


@njit(cache=True, nogil=True)
def _update(threads, tickets, arguments):
    share(_update_ticket, threads, tickets, arguments)


def clone_update_(
    parameters, arena, obs, target, dataset, key, first_update, lr, config, density
) -> torch.Tensor:
    """Mean loss ``[P]``; see the op. All tensors are contiguous."""
    rows = target.shape[-1] + 1
    layout = lay_out((arena.actor,), arena.prunable, density, arena.log_std, rows)
    constants = CloneConstants(
        config.updates,
        config.batch,
        math.inf if config.max_norm is None else float(config.max_norm),
        float(config.beta1),
        float(config.beta2),
        float(config.eps),
    )
    losses = np.zeros(len(key), np.float32)
    threads, floats, integers = prepare(layout, len(key), config.updates * config.batch)
    arguments = (
        layout,
        floats,
        integers,
        tuple(tensor.numpy() for tensor in parameters),
        (obs.numpy(), target.numpy()),
        dataset.numpy(),
        key.numpy(),
        first_update,
        lr.double().numpy(),
        constants,
        losses,
    )
    _update(threads, len(key), arguments)
    return torch.from_numpy(losses)
