"""The three products of a layer over panels: dense, compressed rows, and their weight gradient.

Operands are offsets into the thread's float scratch ``space``; see `layout`. Each function walks
any size in tiles of registers; tails run on narrower tiles.
"""

from __future__ import annotations

from ..compiling import njit
from ..tiles_cpu import make_sparse_tile, make_tile
from ..vector import LANES, fma, load, store, sum_each, sum_lanes
from .layout import PANEL

# Accumulators, one row of inputs and a broadcast must fit the registers: 32, but 16 on AVX2.
_WIDE = 2 if LANES == 8 else 4


def _make_product(accumulate):
    """``y[r, c] = bias[r] + sum_d a[r, d] x[d, c]``, or ``+=`` and no bias; see `make_tile`.

    ``a`` is any array, by strides; LANES divides ``width``.
    """
    tile_6, tile_4, tile_1 = (make_tile(rows, _WIDE, accumulate) for rows in (6, 4, 1))
    narrow_6, narrow_1 = (make_tile(rows, 1, accumulate) for rows in (6, 1))

    @njit
    def product(a, a0, ar, ad, space, x0, xd, y0, ys, rows, depth, width, bias, b0):
        wide = width // (_WIDE * LANES) * (_WIDE * LANES)
        # Columns outermost: x's are in L1 then for every tile of rows but the first.
        for c in range(0, wide, _WIDE * LANES):
            x, r = x0 + c, 0
            while r + 6 <= rows:
                i, y = a0 + r * ar, y0 + r * ys + c
                tile_6(a, i, ar, ad, space, x, xd, space, y, ys, depth, bias, b0 + r)
                r += 6
            while r + 4 <= rows:
                i, y = a0 + r * ar, y0 + r * ys + c
                tile_4(a, i, ar, ad, space, x, xd, space, y, ys, depth, bias, b0 + r)
                r += 4
            while r < rows:
                i, y = a0 + r * ar, y0 + r * ys + c
                tile_1(a, i, ar, ad, space, x, xd, space, y, ys, depth, bias, b0 + r)
                r += 1
        for c in range(wide, width, LANES):
            x, r = x0 + c, 0
            while r + 6 <= rows:
                i, y = a0 + r * ar, y0 + r * ys + c
                narrow_6(a, i, ar, ad, space, x, xd, space, y, ys, depth, bias, b0 + r)
                r += 6
            while r < rows:
                i, y = a0 + r * ar, y0 + r * ys + c
                narrow_1(a, i, ar, ad, space, x, xd, space, y, ys, depth, bias, b0 + r)
                r += 1

    return product


product = _make_product(accumulate=False)
add_product = _make_product(accumulate=True)

_sparse_tile_8 = make_sparse_tile(8)
_sparse_tile_1 = make_sparse_tile(1)


@njit(cache=True)
def sparse_product(values, index, begin, rows, count, space, x0, y0, width, bias, b0):
    """``y[r] = bias[r] + sum_j values[j] x[index[j]]`` for the first ``count`` of the listed rows.

    The nonzeros j of the k-th listed row are ``begin[k] ... begin[k + 1]``.
    """
    for k in range(count):
        j, y, start = begin[k], y0 + rows[k] * PANEL, bias[b0 + rows[k]]
        size = begin[k + 1] - j
        if width == PANEL:
            _sparse_tile_8(values, j, index, j, size, space, x0, PANEL, space, y, start)
        else:
            for c in range(0, width, LANES):
                x = x0 + c
                _sparse_tile_1(values, j, index, j, size, space, x, PANEL, space, y + c, start)


@njit(cache=True)
def _flush(grad, j, space, partial):
    """Add the lane sums of the registers in ``partial`` to the `LANES` gradients that end at j."""
    first = j + 1 - LANES
    store(grad, first, load(grad, first) + sum_each(space, partial))


@njit(cache=True)
def sparse_gradient(grad, column, begin, rows, count, space, delta, x, width, partial):
    """``grad[j] += delta[row] . x[column]`` over the nonzeros, `LANES` to a reduction.

    Rows and nonzeros are listed as for `sparse_product`.
    """
    slot = 0
    for r in range(count):
        d0 = delta + rows[r] * PANEL
        if width == PANEL:
            # The row's panel in eight registers; two chains hide the multiply-adds' latency.
            a, b = load(space, d0), load(space, d0 + LANES)
            c, d = load(space, d0 + 2 * LANES), load(space, d0 + 3 * LANES)
            e, f = load(space, d0 + 4 * LANES), load(space, d0 + 5 * LANES)
            g, h = load(space, d0 + 6 * LANES), load(space, d0 + 7 * LANES)
            for j in range(begin[r], begin[r + 1]):
                k = x + column[j] * PANEL
                even = fma(c, load(space, k + 2 * LANES), a * load(space, k))
                odd = fma(d, load(space, k + 3 * LANES), b * load(space, k + LANES))
                even = fma(e, load(space, k + 4 * LANES), even)
                odd = fma(f, load(space, k + 5 * LANES), odd)
                even = fma(g, load(space, k + 6 * LANES), even)
                odd = fma(h, load(space, k + 7 * LANES), odd)
                store(space, partial + slot * LANES, even + odd)
                slot += 1
                if slot == LANES:
                    _flush(grad, j, space, partial)
                    slot = 0
        else:
            for j in range(begin[r], begin[r + 1]):
                k = x + column[j] * PANEL
                total = load(space, d0) * load(space, k)
                for i in range(LANES, width, LANES):
                    total = fma(load(space, d0 + i), load(space, k + i), total)
                store(space, partial + slot * LANES, total)
                slot += 1
                if slot == LANES:
                    _flush(grad, j, space, partial)
                    slot = 0
    for s in range(slot):
        grad[begin[count] - slot + s] += sum_lanes(load(space, partial + s * LANES))
