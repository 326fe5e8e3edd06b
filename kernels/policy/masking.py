"""A layer's weights on its mask, for the products, and its gradient off it."""

from __future__ import annotations

import numpy as np

from ..addresses import get, put
from ..compiling import njit
from ..vector import LANES, MASK_BYTES, load_bits, store
from .layout import BITS, DENSE, INP, NONZEROS, OUT, POSITION
from .products import gather_all

_ZERO = np.float32(0.0)


@njit(cache=True)
def gather_weights(m, n, b, i64, layer, weight, values):
    """The weights on the mask, packed; of a dense layer all, with zeros off the mask."""
    if not get(i64, layer + DENSE):
        position, size = get(i64, layer + POSITION), get(i64, layer + NONZEROS)
        gather_all(m, n, weight, position, size, values)
        return
    out, inp, bits = get(i64, layer + OUT), get(i64, layer + INP), get(i64, layer + BITS)
    words = (inp + LANES - 1) // LANES
    whole = inp // LANES
    for r in range(out):
        for w in range(whole):
            i = r * inp + w * LANES
            store(m, values + i, load_bits(m, weight + i, b, bits + r * words + w))
        for i in range(whole * LANES, inp):
            kept = _has(b, bits, r * words + whole, i - whole * LANES)
            put(m, values + r * inp + i, get(m, weight + r * inp + i) if kept else _ZERO)


@njit(cache=True)
def _has(b, bits, word, lane):
    """Whether a lane's bit is set."""
    return (get(b, (bits + word) * MASK_BYTES + lane // 8) >> np.uint8(lane % 8)) & np.uint8(1) != 0


@njit(cache=True)
def keep_masked(m, b, i64, layer, grad, first, end):
    """Zero rows of a dense gradient off the mask."""
    inp, bits = get(i64, layer + INP), get(i64, layer + BITS)
    words = (inp + LANES - 1) // LANES
    whole = inp // LANES
    for r in range(first, end):
        for w in range(whole):
            i = grad + r * inp + w * LANES
            store(m, i, load_bits(m, i, b, bits + r * words + w))
        for i in range(whole * LANES, inp):
            if not _has(b, bits, r * words + whole, i - whole * LANES):
                put(m, grad + r * inp + i, _ZERO)
