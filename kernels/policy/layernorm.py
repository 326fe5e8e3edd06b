"""LayerNorm over the features of panels, a register for every `LANES` rows of the batch.

Per element: 4 FLOPs forward and 8 backward. What is normalised is kept for the backward pass, and
after its last feature the reciprocal standard deviation of every row.
"""

from __future__ import annotations

import numpy as np

from ..addresses import get, put
from ..compiling import njit
from ..vector import LANES, fma, load, splat, store, sum_lanes
from ..vector_math import rsqrt
from .products import sum_rows

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit(cache=True)
def _at(m, tensor, i, absent):
    """An element of a parameter, or what stands for it where the norm has none."""
    return get(m, tensor + i) if tensor else absent


@njit(cache=True)
def normalise(m, y, normed, features, ld, weight, bias, eps):
    """Replace a panel by its LayerNorm.

    Args:
        m: memory.
        y: index of the panel ``[features][ld]``.
        normed: index of what keeps it without weight and bias, ``[features + 1][ld]``.
        features: at least one.
        ld: columns, a multiple of registers.
        weight: index of the weight, or 0 where there is none.
        bias: the same of the bias.
        eps: added to the variance.
    """
    share = splat(_ONE / np.float32(features))
    for c in range(0, ld, LANES):
        mean = splat(_ZERO)
        for r in range(features):
            mean = mean + load(m, y + r * ld + c)
        mean = mean * share
        variance = splat(_ZERO)
        for r in range(features):
            distance = load(m, y + r * ld + c) - mean
            variance = fma(distance, distance, variance)
        deviation = rsqrt(fma(variance, share, splat(eps)))
        store(m, normed + features * ld + c, deviation)
        for r in range(features):
            value = (load(m, y + r * ld + c) - mean) * deviation
            store(m, normed + r * ld + c, value)
            w, b = splat(_at(m, weight, r, _ONE)), splat(_at(m, bias, r, _ZERO))
            store(m, y + r * ld + c, fma(value, w, b))


@njit(cache=True)
def denormalise(m, delta, normed, features, ld, weight, dweight, dbias):
    """Turn the gradient by the output into that by the input, in place; add up the parameters'.

    Args:
        m: memory.
        delta: index of the gradient ``[features][ld]``.
        normed: as `normalise` kept it.
        features: at least one.
        ld: columns.
        weight: as for `normalise`.
        dweight: index of what sums up the weight's gradient, or 0 where nobody wants it.
        dbias: the same of the bias.
    """
    if dbias:
        sum_rows(m, dbias, delta, features, ld)
    if dweight:
        for r in range(features):
            total = splat(_ZERO)
            for c in range(r * ld, (r + 1) * ld, LANES):
                total = fma(load(m, delta + c), load(m, normed + c), total)
            put(m, dweight + r, get(m, dweight + r) + sum_lanes(total))
    share = splat(_ONE / np.float32(features))
    for c in range(0, ld, LANES):
        mean, along = splat(_ZERO), splat(_ZERO)
        for r in range(features):
            d = load(m, delta + r * ld + c) * splat(_at(m, weight, r, _ONE))
            store(m, delta + r * ld + c, d)
            mean = mean + d
            along = fma(d, load(m, normed + r * ld + c), along)
        mean, along = mean * share, along * share
        deviation = load(m, normed + features * ld + c)
        for r in range(features):
            rest = load(m, delta + r * ld + c) - mean - along * load(m, normed + r * ld + c)
            store(m, delta + r * ld + c, rest * deviation)


@njit(cache=True)
def normalise_row(m, y, features, weight, bias, eps):
    """LayerNorm of one row ``[features]``, in place."""
    whole = features // LANES * LANES
    sums = splat(_ZERO)
    for i in range(0, whole, LANES):
        sums = sums + load(m, y + i)
    mean = sum_lanes(sums)
    for i in range(whole, features):
        mean += get(m, y + i)
    mean /= np.float32(features)
    sums = splat(_ZERO)
    for i in range(0, whole, LANES):
        distance = load(m, y + i) - splat(mean)
        sums = fma(distance, distance, sums)
    variance = sum_lanes(sums)
    for i in range(whole, features):
        variance += (get(m, y + i) - mean) * (get(m, y + i) - mean)
    deviation = _ONE / np.sqrt(variance / np.float32(features) + eps)
    for i in range(features):
        value = (get(m, y + i) - mean) * deviation
        put(m, y + i, value * _at(m, weight, i, _ONE) + _at(m, bias, i, _ZERO))
