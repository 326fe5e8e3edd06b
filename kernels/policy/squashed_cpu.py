"""The squashed Gaussian's kernels: a vector of an action's numbers at a time; see `squashed`.

All take addresses, as `addresses` says. What is left of the last vector goes through scratch, so
that every number is computed alike.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import types

from ..addresses import floats, get, put
from ..compiling import njit
from ..vector import LANES, fma, load, splat, store
from ..vector_math import exp, log, tanh

_NORMALISER = np.float32(0.5 * math.log(2 * math.pi))
_ZERO = np.float32(0.0)
# Vectors of scratch beside one element (two, backward) for every number.
FORWARD_SCRATCH, BACKWARD_SCRATCH = 5 * LANES, 8 * LANES


@njit(cache=True)
def _sample(m, mean, log_std, noise, action, term, epsilon):
    """One vector of actions, and of what they add to the log-probability."""
    spread, n = load(m, log_std), load(m, noise)
    a = tanh(fma(exp(spread), n, load(m, mean)))
    store(m, action, a)
    gauss = fma(n * n, splat(np.float32(-0.5)), splat(-_NORMALISER) - spread)
    # In this order: beside a one, epsilon would lose most of its digits.
    room = fma(splat(_ZERO) - a, a, splat(np.float32(1.0))) + splat(epsilon)
    # The logarithm makes a number of a NaN.
    store(m, term, fma(a, splat(_ZERO), gauss - log(room)))


@njit(cache=True)
def _differentiate(m, action, log_std, noise, daction, dterm, dmean, dlog_std, epsilon):
    """One vector of both gradients; ``dterm`` is the log-probability's, for every number of it."""
    a, dt, one = load(m, action), load(m, dterm), splat(np.float32(1.0))
    slope = fma(splat(_ZERO) - a, a, one)
    twice = (a + a) / (slope + splat(epsilon))
    through = slope * fma(dt, twice, load(m, daction))
    store(m, dmean, through)
    store(m, dlog_std, through * exp(load(m, log_std)) * load(m, noise) - dt)


@njit(cache=True)
def _copy(m, source, target, count):
    for i in range(count):
        put(m, target + i, get(m, source + i) if source else _ZERO)


@njit(cache=True)
def _forward(base, mean_at, log_std_at, noise_at, action_at, log_prob_at, scratch_at, batch, size,
             epsilon):  # fmt: skip
    m = floats(base)
    mean, log_std, noise, action = mean_at // 4, log_std_at // 4, noise_at // 4, action_at // 4
    last, term = scratch_at // 4, scratch_at // 4 + 4 * LANES
    count = batch * size
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        _sample(m, mean + i, log_std + i, noise + i, action + i, term + i, epsilon)
    if whole < count:
        rest = count - whole
        _copy(m, mean + whole, last, rest)
        _copy(m, log_std + whole, last + LANES, rest)
        _copy(m, noise + whole, last + 2 * LANES, rest)
        at = last + 3 * LANES
        _sample(m, last, last + LANES, last + 2 * LANES, at, term + whole, epsilon)
        _copy(m, at, action + whole, rest)
    for row in range(batch):
        total = _ZERO
        for i in range(row * size, (row + 1) * size):
            total += get(m, term + i)
        put(m, log_prob_at // 4 + row, total)


@njit(cache=True)
def _backward(base, action_at, log_std_at, noise_at, daction_at, dlog_prob_at, dmean_at,
              dlog_std_at, scratch_at, batch, size, epsilon):  # fmt: skip
    m = floats(base)
    action, log_std, noise = action_at // 4, log_std_at // 4, noise_at // 4
    dmean, dlog_std = dmean_at // 4, dlog_std_at // 4
    count = batch * size
    whole = count // LANES * LANES
    last, dterm = scratch_at // 4, scratch_at // 4 + 6 * LANES
    daction = dterm + count + LANES
    for row in range(batch):
        for i in range(row * size, (row + 1) * size):
            put(m, dterm + i, get(m, dlog_prob_at // 4 + row) if dlog_prob_at else _ZERO)
    _copy(m, daction_at // 4, daction, count)
    for i in range(0, whole, LANES):
        _differentiate(
            m, action + i, log_std + i, noise + i, daction + i, dterm + i, dmean + i,
            dlog_std + i, epsilon,
        )  # fmt: skip
    if whole < count:
        rest = count - whole
        _copy(m, action + whole, last, rest)
        _copy(m, log_std + whole, last + LANES, rest)
        _copy(m, noise + whole, last + 2 * LANES, rest)
        dm, ds = last + 3 * LANES, last + 4 * LANES
        _differentiate(
            m, last, last + LANES, last + 2 * LANES, daction + whole, dterm + whole, dm, ds,
            epsilon,
        )  # fmt: skip
        _copy(m, dm, dmean + whole, rest)
        _copy(m, ds, dlog_std + whole, rest)


@cache
def kernels() -> tuple[Any, Any]:
    """Both, compiled for their one signature, which saves Numba's dispatch."""
    found = []
    for kernel, integers in ((_forward, 9), (_backward, 11)):
        signature = (types.int64,) * integers + (types.float32,)
        kernel.compile(signature)
        found.append(kernel.get_overload(signature))
    return found[0], found[1]
