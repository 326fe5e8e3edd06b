"""PPO's head of the training step in Numba: its two losses, and minibatches by permutation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..compiling import njit
from ..mlp.layout import OUT, PANEL, Y, lay_out
from ..random import Stream
from ..random.cpu import fill_permutation
from ..threads import share
from ..training.cpu import Head, bind, train
from ..vector import (
    LANES,
    fma,
    load,
    maximum,
    splat,
    store,
    sum_lanes,
)
from ..vector_math import exp, log

# Rows of the head: log-ratio, then ratio, then gradient; entropy; then those of the sample.
_SCRATCH = 2
_RATIO, _ENTROPY, _ADVANTAGE, _LOGP, _VALUE, _TARGET, _ACTION = (PANEL * row for row in range(7))
# Columns of the measured.
_POLICY, _VALUE_LOSS, _ENTROPY_MEAN, _KL, _CLIPPED, _NORM, _STATISTICS = range(7)

_ZERO = np.float32(0.0)
_STREAM = int(Stream.MINIBATCH)
_LOG_SQRT_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class LossConfig(NamedTuple):
    """What the losses take of `PPOConfig`, plain numbers."""

    clip: float
    clip_value: bool
    value_coef: float
    entropy_coef: float
    normalise: bool


@njit(cache=True)
def _permute(order, words, key, number, samples, measured):
    """A pass over all samples; measured are those of the last."""
    measured[:] = 0.0
    fill_permutation(order[0], words[0], order[1], words[1], key, _STREAM, number)


@njit(cache=True)
def _mean_and_scale(layout, packed, obs, sample, index, config):
    """Mean and ``1 / (unbiased std + 1e-8)`` of a minibatch's advantages, or 0 and 1."""
    if not config.normalise:
        return 0.0, 1.0
    mean = 0.0
    for i in index:
        mean += sample[i, 0]
    mean /= index.size
    square = 0.0
    for i in index:
        square += (sample[i, 0] - mean) ** 2
    return mean, 1.0 / (math.sqrt(square / (index.size - 1)) + 1e-8)


@njit(cache=True)
def _surrogate(space, head, columns, width, clip, scale, measured):
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
        # Not max(): a NaN must reach the measured.
        loss += held if held > free else free
        kl += ratio - np.float32(1.0)
        clipped += abs(ratio - np.float32(1.0)) > clip
    measured[_POLICY] += loss
    measured[_KL] += kl
    measured[_CLIPPED] += clipped


@njit(cache=True)
def _categorical_loss(layout, packed, columns, width, config, scale, measured):
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
    _surrogate(space, head, columns, width, config.clip, scale, measured)
    measured[_ENTROPY_MEAN] += entropy_sum
    # d loss / d logit_a = gradient ([a = action] - p_a) + entropy_coef p_a (logp_a + entropy)
    bonus = splat(np.float32(config.entropy_coef) * scale)
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
def _gaussian_loss(layout, packed, columns, width, config, scale, measured):
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
    _surrogate(space, head, columns, width, config.clip, scale, measured)
    space[head + _RATIO + columns : head + _RATIO + width] = _ZERO
    measured[_ENTROPY_MEAN] += entropy * columns
    for a in range(actions):
        inverse = splat(np.float32(math.exp(-log_std[a])))
        total = splat(_ZERO)
        for c in range(0, width, LANES):
            z, gradient = load(space, mean + a * PANEL + c), load(space, head + _RATIO + c)
            store(space, delta + a * PANEL + c, gradient * z * inverse)
            total = total + fma(gradient * z, z, splat(_ZERO) - gradient)
        grad[a] += sum_lanes(total) - np.float32(config.entropy_coef) * scale * columns


@njit(cache=True)
def _policy_loss(layout, packed, columns, width, size, prepared, config, measured):
    space, head = packed.space, layout.head
    mean, inverse = prepared
    for c in range(head + _ADVANTAGE, head + _ADVANTAGE + columns):
        space[c] = (space[c] - mean) * inverse
    scale = np.float32(1.0 / size)
    if layout.actions:
        _gaussian_loss(layout, packed, columns, width, config, scale, measured)
    else:
        _categorical_loss(layout, packed, columns, width, config, scale, measured)


@njit(cache=True)
def _value_loss(layout, packed, columns, width, size, prepared, config, measured):
    space, delta, head = packed.space, layout.delta, layout.head
    value = layout.layers[-1, Y]
    clip = np.float32(config.clip)
    scale = np.float32(config.value_coef) * np.float32(1.0 / size)
    loss = 0.0
    for c in range(columns):
        new, old, target = space[value + c], space[head + _VALUE + c], space[head + _TARGET + c]
        error = new - target
        gradient, square = error, error * error
        if config.clip_value:
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
    measured[_VALUE_LOSS] += 0.5 * loss


_update_ticket = bind(Head(_SCRATCH, _permute, _mean_and_scale, _policy_loss, _value_loss))


@njit(cache=True, nogil=True)
def _update(threads, tickets, arguments):
    share(_update_ticket, threads, tickets, arguments)


def ppo_update_(update, batch) -> torch.Tensor:
    """Statistics ``[6, P]``; see the op."""
    _, arena, _, iteration, _, config, density = update
    # An action's number is exact in float32, and one action layout means one compilation.
    width = 1 if arena.log_std is None else arena.actor.sizes[-1]
    action = batch.action.to(torch.float32).reshape(*batch.logp.shape, width)
    numbers = (batch.advantage, batch.logp, batch.value, batch.target)
    sample = torch.cat([torch.stack(numbers, -1), action], -1)
    tickets, samples, columns = sample.shape
    measured = train(
        _update,
        lay_out(arena.nets, arena.prunable, density, arena.log_std, _SCRATCH + columns),
        update,
        torch.arange(tickets, device="cpu"),
        batch.obs,
        sample,
        LossConfig(
            float(config.clip),
            bool(config.clip_value),
            float(config.value_coef),
            float(config.entropy_coef),
            bool(config.normalise_advantage),
        ),
        first=iteration * config.epochs,
        draws=config.epochs,
        drawn=samples,
        size=samples // config.minibatches,
        statistics=_STATISTICS,
    )
    measured[:, :_NORM] /= samples
    measured[:, _NORM] /= config.minibatches
    return torch.from_numpy(np.ascontiguousarray(measured.T, np.float32))
