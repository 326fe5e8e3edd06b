"""One row through one layer, as in acting: dot products over what the mask leaves of each row.

At 256 x 256 torch's own call takes 5 us, half of it overhead, so everything here serves the
overhead: tensors pass by address, nothing is launched, copied or packed. A mask has three forms:

- ``whole``: every register of `LANES` weights, one row after the other. Bound by the cache lines
  of the weight, which come from L2 the faster the more regularly they are asked for.
- ``registers``: those that hold a nonzero, for masks with structure.
- ``singles``: nonzeros one by one. Where a register holds few of them, a horizontal sum per row
  costs more than it saves.

The last two take rows by fours, sorted by how much they keep: four chains of multiply-adds overlap,
and one loop serves four rows, which at 99% sparsity halves the time.

Weight and mask are read where they lie, for they may have been written unseen: whole registers of
the weight through the mask, and before that the mask is compared with the one that was prepared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import carray, types
from numba.core.extending import intrinsic
from torch import Tensor

from ..addresses import by_address, get, pointer, put
from ..compiling import njit
from ..vector import LANES, fma, load, load_kept, splat, sum_lanes
from .masking import bytes_differ
from .patterns import Pattern

__all__ = ["SingleRow"]

_FOUR = 4

# Relative times, measured at 256 x 256 on AVX-512: of a register read in order, of a listed one, of
# a nonzero, and of a row that is not read whole.
_WHOLE, _LISTED, _SINGLE, _ROW = 2, 3, 2, 4


@intrinsic
def _fma_one(typingctx, a, b, c):
    """``a * b + c`` of scalars, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    one = types.float32
    return one(one, one, one), generate


@njit(cache=True)
def _find_registers(begin, column, out, inp):
    """The registers that hold a nonzero, and the nonzeros that no register covers.

    Returns:
        ``(begin, column)`` of either, as in `patterns.Compressed`; a register is where it begins.
    """
    covered = inp // LANES * LANES
    first = np.zeros(out + 1, np.int64)
    rest = np.zeros(out + 1, np.int64)
    start = np.empty(column.size, np.int32)
    single = np.empty(column.size, np.int32)
    for r in range(out):
        count, left, last = first[r], rest[r], -1
        for j in range(begin[r], begin[r + 1]):
            at = column[j] // LANES * LANES
            if column[j] >= covered:
                single[left] = column[j]
                left += 1
            elif at != last:
                start[count] = at
                count += 1
                last = at
        first[r + 1], rest[r + 1] = count, left
    return first, start[: first[out]].copy(), rest, single[: rest[out]].copy()


@njit(cache=True)
def _by_fours(begin, column, lowest, step):
    """Rows in groups of four with equally many entries each, sorted by how many.

    A row with fewer than its neighbours is filled up with entries that hold no nonzero, and a
    group with fewer than four rows with its last one.

    Args:
        begin: ``[out + 1]`` int64.
        column: ``[entries]`` int32, ascending within a row.
        lowest: the first column that may be an entry.
        step: columns per entry.

    Returns:
        ``(count [groups], row [groups * 4], column [sum of count * 4])``, all int64 but the last;
        a group's columns lie by entry, then row.
    """
    out = begin.size - 1
    order = np.argsort(begin[1:] - begin[:-1], kind="mergesort")
    groups = (out + _FOUR - 1) // _FOUR
    count = np.empty(groups, np.int64)
    row = np.empty(groups * _FOUR, np.int64)
    for g in range(groups):
        for i in range(_FOUR):
            row[g * _FOUR + i] = order[min(g * _FOUR + i, out - 1)]
        last = row[g * _FOUR + _FOUR - 1]
        count[g] = begin[last + 1] - begin[last]
    filled = np.empty(count.sum() * _FOUR, np.int32)
    at = 0
    for g in range(groups):
        for i in range(_FOUR):
            r = row[g * _FOUR + i]
            own = begin[r + 1] - begin[r]
            for k in range(own):
                filled[at + k * _FOUR + i] = column[begin[r] + k]
            empty, j = lowest, begin[r]
            for k in range(own, count[g]):
                while j < begin[r + 1] and column[j] == empty:
                    empty += step
                    j += 1
                filled[at + k * _FOUR + i] = empty
                empty += step
        at += count[g] * _FOUR
    return count, row, filled


def _make_multiply_fours(
    zero: Callable, read_kept: Callable, read: Callable, add: Callable, total: Callable
):
    """Multiply rows arranged by `_by_fours`, of registers or of single nonzeros."""

    @njit
    def multiply_fours(x, weight, mask, inp, start, y, groups, count, row, column):
        j = 0
        for g in range(groups):
            r, s = get(row, _FOUR * g), get(row, _FOUR * g + 1)
            t, u = get(row, _FOUR * g + 2), get(row, _FOUR * g + 3)
            a, b, c, d = zero(), zero(), zero(), zero()
            end = j + _FOUR * get(count, g)
            while j < end:
                i, k = np.int64(get(column, j)), np.int64(get(column, j + 1))
                m, n = np.int64(get(column, j + 2)), np.int64(get(column, j + 3))
                a = add(read_kept(weight, mask, r * inp + i), read(x, i), a)
                b = add(read_kept(weight, mask, s * inp + k), read(x, k), b)
                c = add(read_kept(weight, mask, t * inp + m), read(x, m), c)
                d = add(read_kept(weight, mask, u * inp + n), read(x, n), d)
                j += _FOUR
            # All are read before any is written: a group may hold a row more than once.
            e, f, v, w = get(start, r), get(start, s), get(start, t), get(start, u)
            put(y, r, e + total(a))
            put(y, s, f + total(b))
            put(y, t, v + total(c))
            put(y, u, w + total(d))

    return multiply_fours


@njit
def _no_register():
    return splat(np.float32(0.0))


@njit
def _no_single():
    return np.float32(0.0)


@njit
def _same(value):
    return value


@njit
def _get_kept(weight, mask, index):
    """A listed weight: a nonzero, or what fills a row up."""
    return get(weight, index) if get(mask, index) else np.float32(0.0)


_multiply_registers = _make_multiply_fours(_no_register, load_kept, load, fma, sum_lanes)
_multiply_singles = _make_multiply_fours(_no_single, _get_kept, get, _fma_one, _same)


@njit
def _multiply_whole(x, weight, mask, inp, out, start, y):
    """All whole registers, in four chains of multiply-adds per row."""
    by_four, covered = inp // (4 * LANES) * (4 * LANES), inp // LANES * LANES
    for r in range(out):
        a, b, c, d = _no_register(), _no_register(), _no_register(), _no_register()
        w0, i = r * inp, 0
        while i < by_four:
            a = fma(load_kept(weight, mask, w0 + i), load(x, i), a)
            b = fma(load_kept(weight, mask, w0 + i + LANES), load(x, i + LANES), b)
            c = fma(load_kept(weight, mask, w0 + i + 2 * LANES), load(x, i + 2 * LANES), c)
            d = fma(load_kept(weight, mask, w0 + i + 3 * LANES), load(x, i + 3 * LANES), d)
            i += 4 * LANES
        while i < covered:
            a = fma(load_kept(weight, mask, w0 + i), load(x, i), a)
            i += LANES
        put(y, r, get(start, r) + sum_lanes((a + b) + (c + d)))


@njit
def _three(form, at, groups):
    """The arrays of `_by_fours` behind the addresses from ``form[at]``."""
    count = carray(pointer(form[at]), (groups,), np.int64)
    row = carray(pointer(form[at + 1]), (groups * _FOUR,), np.int64)
    return count, row, carray(pointer(form[at + 2]), (1,), np.int32)


_FORM = 12


# The GIL is kept: giving it back costs a tenth of a product, and getting it again another thread's
# time slice.
@njit(cache=True, error_model="numpy")
def _multiply(x_at, weight_at, mask_at, bias_at, y_at, form_at):
    """``y = x wᵀ + bias``, unless the mask is another. ``form_at``: see `SingleRow`."""
    form = carray(pointer(form_at), (_FORM,), np.int64)
    inp, out, whole = form[0], form[1], form[2]
    if bytes_differ(mask_at, form[11], out * inp):
        return False
    x = carray(pointer(x_at), (inp,), np.float32)
    weight = carray(pointer(weight_at), (out * inp,), np.float32)
    mask = carray(pointer(form[11]), (out * inp,), np.uint8)
    start = carray(pointer(bias_at), (out,), np.float32)
    y = carray(pointer(y_at), (out,), np.float32)
    if whole:
        _multiply_whole(x, weight, mask, inp, out, start, y)
        start = y
    if form[3]:
        _multiply_registers(x, weight, mask, inp, start, y, form[3], *_three(form, 4, form[3]))
        start = y
    if form[7]:
        _multiply_singles(x, weight, mask, inp, start, y, form[7], *_three(form, 8, form[7]))
    return True


class SingleRow:
    """A layer's mask ``[O, I]`` made ready for one row at a time.

    Args:
        pattern: of a population of one ticket.

    Attributes:
        multiply: compiled ``multiply(x, weight, mask, bias, y, form)``, addresses of contiguous
            float32, but for the mask and the last. False, and nothing written, if the mask is not
            the one that was prepared.
        form: the last argument; valid as long as this object lives.
        no_bias: address of zeros, for a layer without a bias.
    """

    __slots__ = ("_memory", "_shape", "form", "multiply", "no_bias")

    def __init__(self, pattern: Pattern) -> None:
        rows, out, inp = pattern.rows, pattern.out, pattern.inp
        first, start, rest, single = _find_registers(rows.begin, rows.column, out, inp)
        times = {
            "whole": _WHOLE * out * (inp // LANES),
            "registers": _LISTED * start.size + _ROW * out,
            "singles": _SINGLE * rows.column.size + _ROW * out,
        }
        name = min(times, key=times.__getitem__)
        nothing = (np.zeros(0, np.int64),) * 3
        registers, singles = nothing, nothing
        if name == "registers":
            registers = _by_fours(first, start, 0, LANES)
        if name == "singles":
            singles = _by_fours(rows.begin, rows.column, 0, 1)
        elif single.size:
            singles = _by_fours(rest, single, inp // LANES * LANES, 1)
        zeros = np.zeros(out, np.float32)
        memory = (*registers, *singles, zeros)
        at = [array.ctypes.data for array in memory]
        form = np.array(
            [
                *(inp, out, name == "whole", registers[0].size, *at[:3], singles[0].size, *at[3:6]),
                pattern.snapshot.data_ptr(),
            ],
            np.int64,
        )
        # Held, because addresses alone would not keep it.
        self._memory = (*memory, pattern.snapshot, form)
        self._shape = (1, out)
        self.form, self.no_bias = form.ctypes.data, at[6]
        self.multiply = by_address(_multiply, 6)

    def __call__(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """``x wᵀ + bias`` of one row; None if the mask is not the one that was prepared.

        The caller warrants: all are contiguous CPU tensors without a gradient to record, float32
        but for the mask; `x` ``[1, I]``, `weight` ``[O, I]``, `mask` likewise, `bias` ``[O]``.

        Returns:
            ``[1, O]``.
        """
        y = x.new_empty(self._shape)
        bias_at = self.no_bias if bias is None else bias.data_ptr()
        addresses = x.data_ptr(), weight.data_ptr(), mask.data_ptr(), bias_at, y.data_ptr()
        return y if self.multiply(*addresses, self.form) else None
