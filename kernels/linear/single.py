"""One row through one layer, as in acting: dot products over the registers that hold a nonzero.

At 256 x 256 torch's own call takes 5 us, half of it overhead, so everything here serves the
overhead: tensors pass by address, nothing is launched, copied or packed. A row of the weight is
read in registers of `LANES` entries. Where most of them hold a nonzero, all are read, since a loop
of known length costs less than a list to follow; else the list of those that do. Bound by the
weight's cache lines, 64 bytes to a register on AVX-512, which come from L2.

The weight is read where it lies, for it may have been written through ``weight.data`` unseen.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.core.extending import intrinsic
from torch import Tensor

from sparse_tickets.kernels.linear.patterns import Pattern
from sparse_tickets.kernels.vector import LANES, fma, load, splat, sum_lanes

__all__ = ["SingleRow"]

# A listed register costs its address too, and the end of each row's list is a branch mispredicted.
_LISTED = 0.6
"""Share of registers with a nonzero below which they are listed."""


@intrinsic
def _pointer(typingctx, address):
    """An integer as an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(cache=True, nogil=True)
def _find_registers(begin, column, out, inp):
    """The registers to read of every row, and where the nonzeros start that no register covers.

    Returns:
        ``(first [out + 1], start [registers], rest [out, 2])``: row r reads the registers that
        begin at the columns ``start[first[r]:first[r + 1]]``, and one by one the nonzeros from
        ``rest[r, 0]`` to ``rest[r, 1]``.
    """
    covered = inp // LANES * LANES
    first = np.zeros(out + 1, np.int64)
    start = np.empty(column.size + 1, np.int64)
    rest = np.empty((out, 2), np.int64)
    count = 0
    for r in range(out):
        j, end = begin[r], begin[r + 1]
        last = -1
        while j < end and column[j] < covered:
            at = column[j] // LANES * LANES
            if at != last:
                start[count] = at
                count += 1
                last = at
            j += 1
        rest[r] = j, end
        first[r + 1] = count
    return first, start[:count].copy(), rest


@njit(cache=True, nogil=True)
def _whole_row(weight, w0, x, covered):
    """Four chains of multiply-adds over all whole registers of a row."""
    zero = splat(np.float32(0.0))
    a, b, c, d = zero, zero, zero, zero
    i = 0
    while i + 4 * LANES <= covered:
        a = fma(load(weight, w0 + i), load(x, i), a)
        b = fma(load(weight, w0 + i + LANES), load(x, i + LANES), b)
        c = fma(load(weight, w0 + i + 2 * LANES), load(x, i + 2 * LANES), c)
        d = fma(load(weight, w0 + i + 3 * LANES), load(x, i + 3 * LANES), d)
        i += 4 * LANES
    while i < covered:
        a = fma(load(weight, w0 + i), load(x, i), a)
        i += LANES
    return (a + b) + (c + d)


@njit(cache=True, nogil=True)
def _listed_row(weight, w0, x, start, low, high):
    """Two chains over the listed registers of a row."""
    a, b = splat(np.float32(0.0)), splat(np.float32(0.0))
    k = low
    while k < high - 1:
        c, d = start[k], start[k + 1]
        a = fma(load(weight, w0 + c), load(x, c), a)
        b = fma(load(weight, w0 + d), load(x, d), b)
        k += 2
    if k < high:
        a = fma(load(weight, w0 + start[k]), load(x, start[k]), a)
    return a + b


_FORM = 7


@njit(cache=True, nogil=True, error_model="numpy")
def _multiply(x_at, weight_at, bias_at, y_at, form_at):
    """``y = x wᵀ + bias``; no bias where its address is 0. ``form_at``: see `SingleRow`."""
    form = carray(_pointer(form_at), (_FORM,), np.int64)
    inp, out, listed = form[0], form[1], form[2]
    x = carray(_pointer(x_at), (inp,), np.float32)
    weight = carray(_pointer(weight_at), (out * inp,), np.float32)
    bias = carray(_pointer(bias_at), (out,), np.float32)
    y = carray(_pointer(y_at), (out,), np.float32)
    first = carray(_pointer(form[3]), (out + 1,), np.int64)
    start = carray(_pointer(form[4]), (out * inp,), np.int64)
    rest = carray(_pointer(form[5]), (out, 2), np.int64)
    column = carray(_pointer(form[6]), (out * inp,), np.int32)
    covered = inp // LANES * LANES
    for r in range(out):
        w0 = r * inp
        if listed:
            total = sum_lanes(_listed_row(weight, w0, x, start, first[r], first[r + 1]))
        else:
            total = sum_lanes(_whole_row(weight, w0, x, covered))
        for j in range(rest[r, 0], rest[r, 1]):
            total += weight[w0 + column[j]] * x[column[j]]
        y[r] = total + (bias[r] if bias_at else np.float32(0.0))


class SingleRow:
    """A layer's mask ``[O, I]`` made ready for one row at a time.

    Args:
        pattern: of a population of one ticket.
    """

    __slots__ = ("_form", "_form_at", "_memory", "_shape")

    def __init__(self, pattern: Pattern) -> None:
        rows, out, inp = pattern.rows, pattern.out, pattern.inp
        first, start, rest = _find_registers(rows.begin, rows.column, out, inp)
        listed = start.size < _LISTED * out * (inp // LANES)
        self._shape = (1, out)
        # Held, because addresses alone would not keep it.
        self._memory = (first, start, rest, rows.column)
        addresses = [array.ctypes.data for array in self._memory]
        self._form = np.array([inp, out, listed, *addresses], np.int64)
        self._form_at = self._form.ctypes.data

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x wᵀ + bias`` of one row.

        The caller warrants: all are contiguous float32 CPU tensors without a gradient to record,
        `x` ``[1, I]``, `weight` ``[O, I]`` and zero off the mask, `bias` ``[O]``.

        Returns:
            ``[1, O]``.
        """
        y = x.new_empty(self._shape)
        bias_at = 0 if bias is None else bias.data_ptr()
        _multiply(x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr(), self._form_at)
        return y
