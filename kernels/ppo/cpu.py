"""One PPO iteration of a population in Numba: a ticket per thread, from gather to Adam in cache.

Per minibatch and panel of samples: actor forward, policy loss, actor backward; critic forward,
value loss, critic backward; then clipping and Adam on the packed parameters. The losses below
write the gradient of the network's output and add to the statistics; `_update` is the algorithm.
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
from ..random.cpu import fill_permutation
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

__all__ = ["STATISTICS", "head_rows", "ppo_update_"]

# Rows of the head: the gathered scalars, log-ratio then ratio then gradient, entropy, actions.
_ADVANTAGE, _LOGP, _VALUE, _TARGET, _RATIO, _ENTROPY, _ACTION = (PANEL * row for row in range(7))
# Columns of the statistics.
_POLICY, _VALUE_LOSS, _ENTROPY_MEAN, _KL, _CLIPPED, _NORM, STATISTICS = range(7)

_ZERO = np.float32(0.0)
_STREAM = int(Stream.MINIBATCH)
_LOG_SQRT_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class PPOConstants(NamedTuple):
    """`PPOConfig` with plain numbers, as Numba takes it; no clipping is an infinite norm."""

    epochs: int
    minibatches: int
    clip: float
    clip_value: bool
    value_coef: float
    entropy_coef: float
    max_norm: float
    normalise: bool
    beta1: float
    beta2: float
    eps: float


def head_rows(actions: int) -> int:
    """Rows of scratch the losses need for ``actions`` numbers per action."""
    return _ACTION // PANEL + actions


@njit(cache=True)
def _mean_and_scale(scalars, index, normalise):
    """Mean and ``1 / (unbiased std + 1e-8)`` of a minibatch's advantages, or 0 and 1."""
    if not normalise:
        return 0.0, 1.0
    mean = 0.0
    for i in index:
        mean += scalars[i, 0]
    mean /= index.size
    square = 0.0
    for i in index:
        square += (scalars[i, 0] - mean) ** 2
    return mean, 1.0 / (math.sqrt(square / (index.size - 1)) + 1e-8)


@njit(cache=True)
def _surrogate(space, head, columns, width, clip, scale, statistics):
    """Clipped policy loss: RATIO goes from log-ratio to the gradient of the log-probability."""
    low, high = np.float32(1.0 - clip), np.float32(1.0 + clip)
    kl = 0.0
    for c in range(head + _RATIO, head + _RATIO + columns):
        kl -= space[c]
    for c in range(head + _RATIO, head + _RATIO + width, LANES):
        store(space, c, exp(load(space, c)))
    loss, clipped = 0.0, 0
    for c in range(columns):
        ratio, advantage = space[head + _RATIO + c], space[head + _ADVANTAGE + c]
        free = -advantage * ratio
        held = -advantage * min(max(ratio, low), high)
        inside = low <= ratio and ratio <= high
        # Where the clipped loss wins, the ratio is outside and its gradient is zero.
        space[head + _RATIO + c] = free * scale if inside or free > held else _ZERO
        # Not max(): a NaN must reach the statistics.
        loss += held if held > free else free
        kl += ratio - np.float32(1.0)
        clipped += abs(ratio - np.float32(1.0)) > clip
    statistics[_POLICY] += loss
    statistics[_KL] += kl
    statistics[_CLIPPED] += clipped


@njit(cache=True)
def _categorical_loss(layout, packed, columns, width, constants, scale, statistics):
    space, delta, head = packed.space, layout.delta, layout.head
    last = layout.layers[layout.actor_layers - 1]
    logits, actions = last[Y], last[OUT]
    for c in range(0, width, LANES):
        top = load(space, logits + c)
        for a in range(1, actions):
            top = maximum(top, load(space, logits + a * PANEL + c))
        total = splat(_ZERO)
        for a in range(actions):
            total = total + exp(load(space, logits + a * PANEL + c) - top)
        shift = top + log(total)
        entropy = splat(_ZERO)
        for a in range(actions):
            logp = load(space, logits + a * PANEL + c) - shift
            probability = exp(logp)
            store(space, logits + a * PANEL + c, logp)
            store(space, delta + a * PANEL + c, probability)
            entropy = entropy - probability * logp
        store(space, head + _ENTROPY + c, entropy)
    entropy_sum = 0.0
    for c in range(columns):
        action = int(space[head + _ACTION + c])
        space[head + _RATIO + c] = space[logits + action * PANEL + c] - space[head + _LOGP + c]
        entropy_sum += space[head + _ENTROPY + c]
    space[head + _RATIO + columns : head + _RATIO + width] = _ZERO
    _surrogate(space, head, columns, width, constants.clip, scale, statistics)
    statistics[_ENTROPY_MEAN] += entropy_sum
    # d loss / d logit_a = gradient ([a = action] - p_a) + entropy_coef p_a (logp_a + entropy)
    bonus = splat(np.float32(constants.entropy_coef) * scale)
    for a in range(actions):
        for c in range(0, width, LANES):
            surplus = load(space, logits + a * PANEL + c) + load(space, head + _ENTROPY + c)
            factor = bonus * surplus - load(space, head + _RATIO + c)
            store(space, delta + a * PANEL + c, load(space, delta + a * PANEL + c) * factor)
        space[delta + a * PANEL + columns : delta + a * PANEL + width] = _ZERO
    for c in range(columns):
        action = int(space[head + _ACTION + c])
        space[delta + action * PANEL + c] += space[head + _RATIO + c]


@njit(cache=True)
def _gaussian_loss(layout, packed, columns, width, constants, scale, statistics):
    space, delta, head = packed.space, layout.delta, layout.head
    last = layout.layers[layout.actor_layers - 1]
    mean, actions = last[Y], last[OUT]
    begin = packed.begin[2 * layout.layers.shape[0]]
    log_std, grad = packed.weight[begin:], packed.grad[begin:]
    entropy, constant = 0.0, 0.0
    for a in range(actions):
        entropy += 0.5 + _LOG_SQRT_TWO_PI + log_std[a]
        constant -= _LOG_SQRT_TWO_PI + log_std[a]
    for c in range(0, width, LANES):
        logp = splat(np.float32(constant))
        for a in range(actions):
            inverse = splat(np.float32(math.exp(-log_std[a])))
            action = load(space, head + _ACTION + a * PANEL + c)
            z = (action - load(space, mean + a * PANEL + c)) * inverse
            store(space, mean + a * PANEL + c, z)
            logp = fma(splat(np.float32(-0.5)) * z, z, logp)
        store(space, head + _RATIO + c, logp - load(space, head + _LOGP + c))
    space[head + _RATIO + columns : head + _RATIO + width] = _ZERO
    _surrogate(space, head, columns, width, constants.clip, scale, statistics)
    space[head + _RATIO + columns : head + _RATIO + width] = _ZERO
    statistics[_ENTROPY_MEAN] += entropy * columns
    for a in range(actions):
        inverse = splat(np.float32(math.exp(-log_std[a])))
        total = splat(_ZERO)
        for c in range(0, width, LANES):
            z, gradient = load(space, mean + a * PANEL + c), load(space, head + _RATIO + c)
            store(space, delta + a * PANEL + c, gradient * z * inverse)
            total = total + fma(gradient * z, z, splat(_ZERO) - gradient)
        grad[a] += sum_lanes(total) - np.float32(constants.entropy_coef) * scale * columns


@njit(cache=True)
def _value_loss(layout, packed, columns, width, constants, scale, statistics):
    space, delta, head = packed.space, layout.delta, layout.head
    value = layout.layers[-1, Y]
    clip = np.float32(constants.clip)
    scale = np.float32(constants.value_coef) * scale
    loss = 0.0
    for c in range(columns):
        new, old, target = space[value + c], space[head + _VALUE + c], space[head + _TARGET + c]
        error = new - target
        gradient, square = error, error * error
        if constants.clip_value:
            moved = new - old
            held_error = old + min(max(moved, -clip), clip) - target
            held_square = held_error * held_error
            held = held_error if -clip <= moved and moved <= clip else _ZERO
            if held_square > square:
                gradient, square = held, held_square
            elif held_square == square:
                # torch.max shares the gradient of a tie.
                gradient = np.float32(0.5) * (error + held)
        space[delta + c] = gradient * scale
        loss += square
    space[delta + columns : delta + width] = _ZERO
    statistics[_VALUE_LOSS] += 0.5 * loss


@njit(cache=True)
def _minibatch(layout, packed, index, batch, constants, statistics):
    """Gradient of one minibatch: add up its panels."""
    obs, action, scalars = batch
    space, head = packed.space, layout.head
    actor, depth = layout.actor_layers, layout.layers.shape[0]
    scale = np.float32(1.0 / index.size)
    mean, inverse = _mean_and_scale(scalars, index, constants.normalise)
    for first in range(0, index.size, PANEL):
        rows = index[first : first + PANEL]
        columns = rows.size
        width = (columns + LANES - 1) // LANES * LANES
        gather(space, layout.x, obs, rows, columns, width)
        gather(space, head, scalars, rows, columns, width)
        gather(space, head + _ACTION, action, rows, columns, width)
        for c in range(head + _ADVANTAGE, head + _ADVANTAGE + columns):
            space[c] = (space[c] - mean) * inverse

        forward(layout, packed, FIRST, actor, width)
        if layout.actions:
            _gaussian_loss(layout, packed, columns, width, constants, scale, statistics)
        else:
            _categorical_loss(layout, packed, columns, width, constants, scale, statistics)
        backward(layout, packed, FIRST, actor, columns, width, False)

        forward(layout, packed, actor, depth, width)
        _value_loss(layout, packed, columns, width, constants, scale, statistics)
        backward(layout, packed, actor, depth, columns, width, False)


@njit(cache=True)
def _update_ticket(
    thread,
    ticket,
    layout,
    floats,
    integers,
    parameters,
    batch,
    key,
    iteration,
    lr,
    constants,
    statistics,
):
    weights, masks, ms, vs, steps = parameters
    obs, action, scalars = batch
    samples = scalars.shape[1]
    size = samples // constants.minibatches
    packed = open_scratch(layout, floats[thread], integers[thread])
    index, words = np.empty((2, samples), np.int32), np.empty((2, samples), np.uint32)
    mask, measured = masks[ticket], statistics[ticket]
    mine = obs[ticket], action[ticket], scalars[ticket]
    count = pack(layout, packed, mask, True)
    turn(layout, packed, False)
    read_row(layout, packed, mask, weights[ticket], packed.weight)
    read_row(layout, packed, mask, ms[ticket], packed.m)
    read_row(layout, packed, mask, vs[ticket], packed.v)
    for epoch in range(constants.epochs):
        measured[:] = 0.0
        draw = iteration * constants.epochs + epoch
        fill_permutation(index[0], words[0], index[1], words[1], key[ticket], _STREAM, draw)
        for begin in range(0, samples, size):
            clear_gradient(layout, packed, count)
            turn_values(layout, packed, False)
            rows = index[0, begin : begin + size]
            _minibatch(layout, packed, rows, mine, constants, measured)
            collect_gradient(layout, packed, mask)
            steps[ticket] += 1
            measured[_NORM] += adam_row(
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
    for column in range(_NORM):
        measured[column] /= samples
    measured[_NORM] /= constants.minibatches
    write_row(layout, packed, mask, packed.weight, weights[ticket])
    write_row(layout, packed, mask, packed.m, ms[ticket])
    write_row(layout, packed, mask, packed.v, vs[ticket])


@njit(cache=True, nogil=True)
def _update(threads, tickets, arguments):
    share(_update_ticket, threads, tickets, arguments)


def ppo_update_(parameters, arena, batch, key, iteration, lr, config, density) -> torch.Tensor:
    """Statistics ``[6, P]``; see the op."""
    width = 1 if arena.log_std is None else arena.actor.sizes[-1]
    layout = lay_out(arena.nets, arena.prunable, density, arena.log_std, head_rows(width))
    constants = PPOConstants(
        config.epochs,
        config.minibatches,
        float(config.clip),
        bool(config.clip_value),
        float(config.value_coef),
        float(config.entropy_coef),
        math.inf if config.max_norm is None else float(config.max_norm),
        bool(config.normalise_advantage),
        float(config.beta1),
        float(config.beta2),
        float(config.eps),
    )
    # An action's number is exact in float32, and one action layout means one compilation.
    action = batch.action.to(torch.float32).reshape(*batch.logp.shape, width)
    scalars = torch.stack([batch.advantage, batch.logp, batch.value, batch.target], -1)
    data = (batch.obs, action, scalars)
    statistics = np.zeros((len(key), STATISTICS))
    passes = config.epochs * scalars.shape[1]
    threads, floats, integers = prepare(layout, len(key), passes)
    arguments = (
        layout,
        floats,
        integers,
        tuple(
            tensor.detach().numpy()
            for tensor in parameters._replace(mask=parameters.mask.contiguous())
        ),
        tuple(tensor.detach().contiguous().numpy() for tensor in data),
        key.contiguous().numpy(),
        iteration,
        lr.double().contiguous().numpy(),
        constants,
        statistics,
    )
    _update(threads, len(key), arguments)
    return torch.from_numpy(np.ascontiguousarray(statistics.T, np.float32))
