"""Blocked masks on the CPU: full blocks of weights as dense register tiles, rows left in place.

Sixteen neighbouring outputs share the inputs they keep, so 16 columns of the product are one index
list over registers, and no activation is transposed: forward reads x and the transposed blocks, dX
reads dy and the weight as it lies, dW multiplies columns of dy and x as they lie. Per kept weight
and batch row: one multiply-add, 2 FLOPs, at about the rate of a dense product.
"""

from __future__ import annotations

import numpy as np

from ..compiling import njit
from ..threads import count_threads, share
from ..tiles_cpu import make_block_tile, make_tile
from ..vector import LANES, load, splat, store, transpose
from .patterns import Pattern

__all__ = ["backward", "multiply"]

_BLOCK = 16
"""Columns of one tile of the product: larger blocks are several of these."""

_COLUMNS = _BLOCK // LANES
# Accumulators, a broadcast and a row of weights must fit the registers: 32, but 16 below AVX-512.
_ROWS = 16 if LANES == 16 else 6 if LANES == 8 else 3
_GRADIENT_ROWS = 16 if LANES == 16 else 4 if LANES == 8 else 2
# Batch rows per parallel item of a product, and per pass of a weight gradient (cached in L1).
_STRIP = 64
_DEPTH = 256

_tile = make_block_tile(_ROWS, _COLUMNS)
_single_tile = make_block_tile(1, _COLUMNS)
_gradient_tile = make_tile(_GRADIENT_ROWS, _COLUMNS, accumulate=True)


@njit(cache=True)
def _transpose_blocks(weight, p, begin, column, out, inp):
    """``[inp, out]`` of one ticket, defined where its blocks are."""
    result = np.empty(out * inp, np.float32)
    start = p * out * inp
    for r in range(0, out, _BLOCK):
        for j in range(begin[p * out + r], begin[p * out + r + 1], LANES):
            for i in range(0, _BLOCK, LANES):
                source = start + (r + i) * inp + column[j]
                transpose(weight, source, inp, result, column[j] * out + r + i, out)
    return result


@njit(cache=True)
def _product_strip(thread, strip, x, w, w0, begin, column, bias, y, p, batch, inp, out):
    """`_STRIP` rows of ``y[p] = x[p] w + bias[p]``, w ``[inp, out]`` at ``w0``."""
    first = strip * _STRIP
    last = min(first + _STRIP, batch)
    for c in range(0, out, _BLOCK):
        low, high = begin[p * out + c], begin[p * out + c + 1]
        row = first
        while row + _ROWS <= last:
            x0, y0 = (p * batch + row) * inp, (p * batch + row) * out + c
            _tile(x, x0, inp, column, low, high, w, w0 + c, out, y, y0, out, bias, p * out + c)
            row += _ROWS
        while row < last:
            x0, y0 = (p * batch + row) * inp, (p * batch + row) * out + c
            _single_tile(
                x, x0, inp, column, low, high, w, w0 + c, out, y, y0, out, bias, p * out + c
            )
            row += 1


@njit(cache=True, nogil=True)
def _product(threads, x, weight, transposed, begin, column, bias, y, tickets, batch, inp, out):
    strips = (batch + _STRIP - 1) // _STRIP
    for p in tickets:
        w, w0 = weight, p * out * inp
        if not transposed:
            w, w0 = _transpose_blocks(weight, p, begin, column, out, inp), 0
        arguments = (x, w, w0, begin, column, bias, y, p, batch, inp, out)
        share(_product_strip, threads, strips, arguments)


@njit(cache=True)
def _gradient_rows(thread, item, dy, x, begin, column, dw, db, tickets, batch, inp, out):
    """16 rows of ``dw[p] = dy[p]ᵀ x[p]`` on the blocks, and of the sum of dy, in batch order."""
    groups = out // _BLOCK
    p, r = tickets[item // groups], item % groups * _BLOCK
    nothing = np.zeros(1, np.float32)
    for i in range(r, r + _BLOCK, LANES):
        total = splat(np.float32(0.0))
        for b in range(batch):
            total = total + load(dy, (p * batch + b) * out + i)
        store(db, p * out + i, total)
    low, high = begin[p * out + r], begin[p * out + r + 1]
    for first in range(0, batch, _DEPTH):
        depth = min(_DEPTH, batch - first)
        for j in range(low, high, _BLOCK):
            for i in range(0, _BLOCK, _GRADIENT_ROWS):
                dy0 = (p * batch + first) * out + r + i
                x0 = (p * batch + first) * inp + column[j]
                dw0 = (p * out + r + i) * inp + column[j]
                _gradient_tile(dy, dy0, 1, out, x, x0, inp, dw, dw0, inp, depth, nothing, 0)


@njit(cache=True, nogil=True)
def _gradient(threads, dy, x, begin, column, dw, db, tickets, batch, inp, out):
    items = tickets.size * (out // _BLOCK)
    arguments = (dy, x, begin, column, dw, db, tickets, batch, inp, out)
    share(_gradient_rows, threads, items, arguments)


def _count_threads(pattern: Pattern, items: int, batch: int) -> int:
    return count_threads(items, pattern.rows.column.size * _BLOCK * batch)


def multiply(
    x: np.ndarray,
    weight: np.ndarray,
    pattern: Pattern,
    bias: np.ndarray,
    y: np.ndarray,
    tickets: np.ndarray,
    batch: int,
) -> None:
    """``y[p] = x[p] w[p]ᵀ + bias[p]``; see `compressed.multiply`.

    The listed tickets' masks must be made of full blocks.
    """
    form, inp, out = pattern.rows, pattern.inp, pattern.out
    threads = _count_threads(pattern, -(-batch // _STRIP), batch)
    _product(threads, x, weight, False, form.begin, form.column, bias, y, tickets, batch, inp, out)


def backward(
    dy: np.ndarray,
    x: np.ndarray | None,
    weight: np.ndarray | None,
    pattern: Pattern,
    dx: np.ndarray | None,
    dw: np.ndarray | None,
    db: np.ndarray | None,
    tickets: np.ndarray,
    batch: int,
) -> None:
    """The gradients of the listed tickets; see `compressed.backward`."""
    rows, columns, inp, out = pattern.rows, pattern.columns, pattern.inp, pattern.out
    if dx is not None:
        zeros = np.zeros(columns.begin.size - 1, np.float32)
        threads = _count_threads(pattern, -(-batch // _STRIP), batch)
        _product(
            threads, dy, weight, True, columns.begin, columns.column, zeros, dx, tickets, batch,
            out, inp,
        )  # fmt: skip
    if dw is not None:
        threads = _count_threads(pattern, len(tickets) * (out // _BLOCK), batch)
        _gradient(threads, dy, x, rows.begin, rows.column, dw, db, tickets, batch, inp, out)
