"""A whole network in one call for few rows that need no gradient, one by one.

See `cpu` for what a form and a call are. Per nonzero and row: 2 FLOPs.
"""

from __future__ import annotations

import numpy as np

from ..activations_cpu import activate
from ..addresses import bytes_, floats, get, integers, put, shorts
from ..compiling import njit
from ..vector import LANES, fma, load, load_bits, load_bits_tail, splat, sum_lanes
from .layernorm import normalise_row
from .layout import (
    ACT_FROM,
    AT,
    BEGIN,
    BIAS,
    BITS,
    CALL_BATCH,
    CALL_SCRATCH,
    CALL_X,
    CALL_Y,
    CODE,
    FORM_FIRST,
    FORM_LAYER,
    INDEX,
    INP,
    LAYERS,
    NONZEROS,
    NORM_BIAS,
    NORM_WEIGHT,
    NORMED,
    OUT,
    POSITION,
    ROWS,
    SLOPES,
    WEIGHT,
    WIDEST,
)

_ZERO = np.float32(0.0)


@njit(cache=True)
def act(base, form_at, call_at):
    """Few rows, one by one, without a gradient."""
    m, n, b, i64 = floats(base), shorts(base), bytes_(base), integers(base)
    form, call = form_at // 8, call_at // 8
    layers = get(i64, form + LAYERS)
    scratch = get(i64, call + CALL_SCRATCH) // 4
    widest = get(i64, form + WIDEST)
    inp = get(i64, form + FORM_FIRST + INP)
    out = get(i64, form + FORM_FIRST + (layers - 1) * FORM_LAYER + OUT)
    x, y = get(i64, call + CALL_X) // 4, get(i64, call + CALL_Y) // 4
    for row in range(get(i64, call + CALL_BATCH)):
        read, write = x + row * inp, scratch
        for k in range(layers):
            layer = form + FORM_FIRST + k * FORM_LAYER
            at = call + get(i64, layer + AT)
            weight, bias = get(i64, at + WEIGHT) // 4, get(i64, at + BIAS) // 4
            if ACT_FROM * get(i64, layer + NONZEROS) < get(i64, layer + OUT) * get(
                i64, layer + INP
            ):
                _act_sparse(m, n, i64, layer, weight, bias, read, write)
            else:
                _act_layer(m, b, i64, layer, weight, bias, read, write)
            code, size = get(i64, layer + CODE), get(i64, layer + OUT)
            slopes = get(i64, form + SLOPES)
            if get(i64, layer + NORMED):
                scale, shift = get(i64, at + NORM_WEIGHT) // 4, get(i64, at + NORM_BIAS) // 4
                normalise_row(m, write, size, scale, shift, get(m, slopes + layers + k))
            if code:
                slope = get(m, slopes + k)
                padded = (size + LANES - 1) // LANES * LANES
                activate(m, write, np.int64(0), padded, code, slope)
            read, write = write, (scratch + widest if write == scratch else scratch)
        for i in range(out):
            put(m, y + row * out + i, get(m, read + i))


@njit(cache=True)
def _act_sparse(m, n, i64, layer, weight, bias, x, y):
    """One row through a layer, nonzero by nonzero."""
    begin, rows = get(i64, layer + BEGIN), get(i64, layer + ROWS)
    index, position = get(i64, layer + INDEX), get(i64, layer + POSITION)
    j = get(i64, begin)
    for k in range(get(i64, layer + OUT)):
        end = get(i64, begin + k + 1)
        even, odd = _ZERO, _ZERO
        while j + 1 < end:
            w0 = get(m, weight + np.int64(get(n, position + j)))
            w1 = get(m, weight + np.int64(get(n, position + j + 1)))
            even += w0 * get(m, x + np.int64(get(n, index + j)))
            odd += w1 * get(m, x + np.int64(get(n, index + j + 1)))
            j += 2
        if j < end:
            w0 = get(m, weight + np.int64(get(n, position + j)))
            even += w0 * get(m, x + np.int64(get(n, index + j)))
            j += 1
        r = np.int64(get(n, rows + k))
        put(m, y + r, (get(m, bias + r) if bias else _ZERO) + even + odd)


@njit(cache=True)
def _act_layer(m, b, i64, layer, weight, bias, x, y):
    """One row through a layer, by dot products over whole registers of weights."""
    out, inp, bits = get(i64, layer + OUT), get(i64, layer + INP), get(i64, layer + BITS)
    words, whole = (inp + LANES - 1) // LANES, inp // LANES
    start = _ZERO
    for r in range(out):
        w, word = weight + r * inp, bits + r * words
        even, odd = splat(_ZERO), splat(_ZERO)
        i = 0
        while i + 1 < whole:
            c = i * LANES
            even = fma(load_bits(m, w + c, b, word + i), load(m, x + c), even)
            c += LANES
            odd = fma(load_bits(m, w + c, b, word + i + 1), load(m, x + c), odd)
            i += 2
        if i < whole:
            c = i * LANES
            even = fma(load_bits(m, w + c, b, word + i), load(m, x + c), even)
        if whole < words:
            # The last word of the bits says which lanes lie within a row at all.
            c = whole * LANES
            tail = load_bits_tail(m, x + c, b, bits + out * words)
            odd = fma(load_bits_tail(m, w + c, b, word + whole), tail, odd)
        if bias:
            start = get(m, bias + r)
        put(m, y + r, start + sum_lanes(even + odd))
