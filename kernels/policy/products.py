"""Products of one layer over one panel: by compressed rows, and dense.

A panel is ``[features][ld]``: ``ld`` batch rows, a multiple of `LANES`, with the features
outermost, so that one weight meets whole registers. All operands are indices into memory; see
`addresses`.
"""

from __future__ import annotations

import numpy as np

from ..addresses import get, put
from ..compiling import njit
from ..tiles_cpu import (
    make_dots,
    make_gated_sparse_tile,
    make_gated_tile,
    make_sparse_tile,
    make_tile,
)
from ..vector import LANES, fma, gather, load, splat, store, sum_each, sum_lanes, transpose

_ZERO = np.float32(0.0)


_COLUMNS, _CHAINS = (8, 4, 2, 1), (1, 2, 2, 4)
_tile_8, _tile_4, _tile_2, _tile_1 = map(make_sparse_tile, _COLUMNS, _CHAINS)
_relu_8, _relu_4, _relu_2, _relu_1 = (
    make_sparse_tile(columns, chains, relu=True)
    for columns, chains in zip(_COLUMNS, _CHAINS, strict=True)
)
_gated_8, _gated_4, _gated_2, _gated_1 = map(make_gated_sparse_tile, _COLUMNS, _CHAINS)

# Accumulators, a row of inputs and a broadcast must fit the registers: 32, but 16 on AVX2.
_WIDE = 2 if LANES == 8 else 4
_NARROW = 6
"""Outputs of a narrow layer that are taken together."""

NARROW_PARTIAL = _NARROW * LANES
"""Registers of scratch that `narrow_gradient` wants."""


def _make_sparse_product(tile_8, tile_4, tile_2, tile_1, gated):
    @njit
    def product(m, n, i64, values, begin, rows, index, count, x, y, ld, other):
        c = 0
        start = _ZERO
        while c < ld:
            left = (ld - c) // LANES
            for k in range(count):
                j = get(i64, begin + k)
                size = get(i64, begin + k + 1) - j
                r = np.int64(get(n, rows + k))
                at = y + r * ld + c
                v, i, p = values + j, index + j, x + c
                if gated:
                    last = other + r * ld + c
                else:
                    if other != 0:
                        start = get(m, other + r)
                    last = start
                if left >= 8:
                    tile_8(m, v, n, i, size, m, p, ld, m, at, last)
                elif left >= 4:
                    tile_4(m, v, n, i, size, m, p, ld, m, at, last)
                elif left >= 2:
                    tile_2(m, v, n, i, size, m, p, ld, m, at, last)
                else:
                    tile_1(m, v, n, i, size, m, p, ld, m, at, last)
            c += (8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1) * LANES

    return product


_product = _make_sparse_product(_tile_8, _tile_4, _tile_2, _tile_1, False)
_relu_product = _make_sparse_product(_relu_8, _relu_4, _relu_2, _relu_1, False)
_gated_product = _make_sparse_product(_gated_8, _gated_4, _gated_2, _gated_1, True)


@njit(cache=True)
def sparse_product(m, n, i64, values, begin, rows, index, count, x, y, ld, bias, relu):
    """``y[r] = bias[r] + sum_j values[j] x[index[j]]`` over the nonzeros j of each row r.

    Args:
        m: memory as float32.
        n: memory as int32.
        i64: memory as int64.
        values: of the nonzeros, by rows as they are listed.
        begin: ``[count + 1]`` int64, of each listed row.
        rows: ``[count]`` int32: rows, listed by how many nonzeros they have: loops of equal length
            follow each other, which the processor predicts.
        index: ``[nonzeros]`` int32, rows of x.
        count: rows.
        x: the panel.
        y: the panel to write.
        ld: its columns.
        bias: ``[rows]``, or 0.
        relu: whether ReLU follows, before anything is written.
    """
    if relu:
        _relu_product(m, n, i64, values, begin, rows, index, count, x, y, ld, bias)
    else:
        _product(m, n, i64, values, begin, rows, index, count, x, y, ld, bias)


@njit(cache=True)
def gated_product(m, n, i64, values, begin, rows, index, count, x, y, ld, gate):
    """`sparse_product` without a bias, and zero where the panel ``gate`` is not positive."""
    _gated_product(m, n, i64, values, begin, rows, index, count, x, y, ld, gate)


_add_wide, _add_slim, _add_wide_1, _add_slim_1 = (
    make_tile(rows, columns, accumulate=True) for rows in (_NARROW, 1) for columns in (_WIDE, 1)
)


@njit(cache=True)
def narrow_product(m, values, out, inp, x, y, ld):
    """``y[r] += sum_f values[r, f] x[f]`` of a layer with few outputs, dense."""
    c = 0
    while c < ld:
        wide = ld - c >= _WIDE * LANES
        r = 0
        while r < out:
            at, w = y + r * ld + c, values + r * inp
            if r + _NARROW <= out:
                if wide:
                    _add_wide(m, w, inp, 1, m, x + c, ld, m, at, ld, inp, m, 0)
                else:
                    _add_slim(m, w, inp, 1, m, x + c, ld, m, at, ld, inp, m, 0)
                r += _NARROW
            else:
                if wide:
                    _add_wide_1(m, w, inp, 1, m, x + c, ld, m, at, ld, inp, m, 0)
                else:
                    _add_slim_1(m, w, inp, 1, m, x + c, ld, m, at, ld, inp, m, 0)
                r += 1
        c += (_WIDE if wide else 1) * LANES


def _make_input_gradient(gated):
    wide, slim, wide_1, slim_1 = (
        make_gated_tile(rows, columns, gated) for rows in (_NARROW, 1) for columns in (_WIDE, 1)
    )

    @njit
    def product(m, values, out, inp, delta, y, ld, gate):
        c = 0
        while c < ld:
            whole = ld - c >= _WIDE * LANES
            f = 0
            while f < inp:
                at, w, g = y + f * ld + c, values + f, gate + f * ld + c
                if f + _NARROW <= inp:
                    if whole:
                        wide(m, w, 1, inp, m, delta + c, ld, at, ld, g, out)
                    else:
                        slim(m, w, 1, inp, m, delta + c, ld, at, ld, g, out)
                    f += _NARROW
                else:
                    if whole:
                        wide_1(m, w, 1, inp, m, delta + c, ld, at, ld, g, out)
                    else:
                        slim_1(m, w, 1, inp, m, delta + c, ld, at, ld, g, out)
                    f += 1
            c += (_WIDE if whole else 1) * LANES

    return product


_input_gradient, _gated_input_gradient = map(_make_input_gradient, (False, True))


@njit(cache=True)
def narrow_input_gradient(m, values, out, inp, delta, y, ld, gate):
    """``y[f] = sum_r values[r, f] delta[r]``, zero where the panel ``gate`` is not positive.

    Args:
        m: memory.
        values: ``[out, inp]``.
        out: few.
        inp: features of y.
        delta: panel of the gradient by the output.
        y: the panel to write.
        ld: columns of both.
        gate: panel of ReLU's output before the layer, or 0.
    """
    if gate != 0:
        _gated_input_gradient(m, values, out, inp, delta, y, ld, gate)
    else:
        _input_gradient(m, values, out, inp, delta, y, ld, gate)


_dots_wide, _dots_slim, _dots_wide_1, _dots_slim_1 = (
    make_dots(rows, columns) for rows in (_NARROW, 1) for columns in (_WIDE, 1)
)


@njit(cache=True)
def narrow_gradient(m, grad, out, inp, x, delta, ld, partial):
    """``grad[r, f] += delta[r] . x[f]`` of a layer with few outputs, dense.

    Args:
        m, out, inp, x, delta, ld: as for `narrow_input_gradient`.
        grad: ``[out, inp]``.
        partial: scratch, `NARROW_PARTIAL` registers.
    """
    c = 0
    while c < ld:
        wide = ld - c >= _WIDE * LANES
        r = 0
        while r < out:
            d, rows = delta + r * ld + c, _NARROW if r + _NARROW <= out else 1
            for f in range(0, inp, LANES):
                count, at = min(LANES, inp - f), x + f * ld + c
                if rows > 1:
                    if wide:
                        _dots_wide(m, d, ld, at, ld, count, partial)
                    else:
                        _dots_slim(m, d, ld, at, ld, count, partial)
                elif wide:
                    _dots_wide_1(m, d, ld, at, ld, count, partial)
                else:
                    _dots_slim_1(m, d, ld, at, ld, count, partial)
                for k in range(rows):
                    g, p = grad + (r + k) * inp + f, partial + k * LANES * LANES
                    if count == LANES:
                        _flush(m, g, p)
                    else:
                        for i in range(count):
                            put(m, g + i, get(m, g + i) + sum_lanes(load(m, p + i * LANES)))
            r += rows
        c += (_WIDE if wide else 1) * LANES


@njit(cache=True)
def _flush(m, grad, partial):
    """Add the lane sums of the registers in ``partial`` to `LANES` gradients."""
    store(m, grad, load(m, grad) + sum_each(m, partial))


@njit(cache=True)
def sparse_gradient(m, n, i64, grad, begin, rows, index, count, x, delta, ld, partial):
    """``grad[j] += delta[row] . x[index[j]]`` over the nonzeros, `LANES` to a reduction.

    Args:
        m, n, i64, begin, rows, index, count, x, ld: as for `sparse_product`.
        grad: of the nonzeros, by rows as they are listed.
        delta: panel of the gradient by the output.
        partial: scratch, `LANES` registers.
    """
    c = 0
    while c < ld:
        left = (ld - c) // LANES
        slot, j = 0, 0
        for k in range(count):
            end = get(i64, begin + k + 1)
            d0 = delta + np.int64(get(n, rows + k)) * ld + c
            if left >= 8:
                d_0, d_1 = load(m, d0), load(m, d0 + LANES)
                d_2, d_3 = load(m, d0 + 2 * LANES), load(m, d0 + 3 * LANES)
                d_4, d_5 = load(m, d0 + 4 * LANES), load(m, d0 + 5 * LANES)
                d_6, d_7 = load(m, d0 + 6 * LANES), load(m, d0 + 7 * LANES)
                while j < end:
                    i = x + np.int64(get(n, index + j)) * ld + c
                    even = fma(d_2, load(m, i + 2 * LANES), d_0 * load(m, i))
                    odd = fma(d_3, load(m, i + 3 * LANES), d_1 * load(m, i + LANES))
                    even = fma(d_4, load(m, i + 4 * LANES), even)
                    odd = fma(d_5, load(m, i + 5 * LANES), odd)
                    even = fma(d_6, load(m, i + 6 * LANES), even)
                    odd = fma(d_7, load(m, i + 7 * LANES), odd)
                    store(m, partial + slot * LANES, even + odd)
                    slot += 1
                    j += 1
                    if slot == LANES:
                        _flush(m, grad + j - LANES, partial)
                        slot = 0
            elif left >= 4:
                d_0, d_1 = load(m, d0), load(m, d0 + LANES)
                d_2, d_3 = load(m, d0 + 2 * LANES), load(m, d0 + 3 * LANES)
                while j < end:
                    i = x + np.int64(get(n, index + j)) * ld + c
                    even = fma(d_2, load(m, i + 2 * LANES), d_0 * load(m, i))
                    odd = fma(d_3, load(m, i + 3 * LANES), d_1 * load(m, i + LANES))
                    store(m, partial + slot * LANES, even + odd)
                    slot += 1
                    j += 1
                    if slot == LANES:
                        _flush(m, grad + j - LANES, partial)
                        slot = 0
            elif left >= 2:
                d_0, d_1 = load(m, d0), load(m, d0 + LANES)
                while j < end:
                    i = x + np.int64(get(n, index + j)) * ld + c
                    total = fma(d_1, load(m, i + LANES), d_0 * load(m, i))
                    store(m, partial + slot * LANES, total)
                    slot += 1
                    j += 1
                    if slot == LANES:
                        _flush(m, grad + j - LANES, partial)
                        slot = 0
            else:
                d_0 = load(m, d0)
                while j < end:
                    i = x + np.int64(get(n, index + j)) * ld + c
                    store(m, partial + slot * LANES, d_0 * load(m, i))
                    slot += 1
                    j += 1
                    if slot == LANES:
                        _flush(m, grad + j - LANES, partial)
                        slot = 0
        for s in range(slot):
            at = grad + j - slot + s
            put(m, at, get(m, at) + sum_lanes(load(m, partial + s * LANES)))
        c += (8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1) * LANES


@njit(cache=True)
def sum_rows(m, grad, delta, rows, ld):
    """``grad[r] += sum_c delta[r, c]``."""
    for r in range(rows):
        at = delta + r * ld
        total = load(m, at)
        for c in range(LANES, ld, LANES):
            total = total + load(m, at + c)
        put(m, grad + r, get(m, grad + r) + sum_lanes(total))


@njit(cache=True)
def to_panel(m, x, width, count, panel, ld, pad):
    """``panel[f][b] = x[b*width + f]`` for ``count`` rows, and zero for the rest of ``ld``.

    Args:
        m: memory.
        x: ``[count][width]``.
        width: features.
        count: rows, more than ``ld - LANES``.
        panel: ``[width][ld]``.
        ld: columns.
        pad: scratch, ``[LANES][width]``.
    """
    blocks = width // LANES * LANES
    for b in range(0, ld, LANES):
        row = x + b * width
        if b + LANES > count:
            rest = (count - b) * width
            for i in range(rest):
                put(m, pad + i, get(m, row + i))
            for i in range(rest, LANES * width):
                put(m, pad + i, _ZERO)
            row = pad
        for f in range(0, blocks, LANES):
            transpose(m, row + f, width, m, panel + f * ld + b, ld)
        for f in range(blocks, width):
            for i in range(LANES):
                put(m, panel + f * ld + b + i, get(m, row + i * width + f))


@njit(cache=True)
def from_panel(m, panel, ld, y, width, count, pad):
    """``y[b*width + f] = panel[f][b]`` for ``count`` rows; arguments as for `to_panel`."""
    blocks = width // LANES * LANES
    for b in range(0, ld, LANES):
        whole = b + LANES <= count
        row = y + b * width if whole else pad
        for f in range(0, blocks, LANES):
            transpose(m, panel + f * ld + b, ld, m, row + f, width)
        for f in range(blocks, width):
            for i in range(LANES):
                put(m, row + i * width + f, get(m, panel + f * ld + b + i))
        if not whole:
            for i in range((count - b) * width):
                put(m, y + b * width + i, get(m, pad + i))


@njit(cache=True)
def clear_columns(m, panel, rows, first, ld):
    """Zero the columns from ``first`` on: a bias that is not finite must not reach a gradient."""
    for r in range(rows):
        for c in range(first, ld):
            put(m, panel + r * ld + c, _ZERO)


@njit(cache=True)
def gather_all(m, n, source, index, size, at):
    """``m[at + j] = m[source + n[index + j]]`` for ``size`` elements."""
    whole = size // LANES * LANES
    for j in range(0, whole, LANES):
        store(m, at + j, gather(m, source, n, index + j))
    for j in range(whole, size):
        put(m, at + j, get(m, source + np.int64(get(n, index + j))))


@njit(cache=True)
def fill(m, at, size, value):
    """Write ``value`` to ``size`` elements."""
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        store(m, at + i, splat(value))
    for i in range(whole, size):
        put(m, at + i, value)
