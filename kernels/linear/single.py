"""One row through one layer, as in acting: dot products over the registers that hold a nonzero.

At 256 x 256 torch's own call takes about 7 us, half of it overhead, so everything here serves the
overhead: tensors pass by address, nothing is launched, copied or packed. A row of the weight is
read in registers of `LANES` entries, and those without a nonzero are left out: most of them at 99%
sparsity, a fifth at 90%. Bound by the weight's cache lines, 64 bytes to a register on AVX-512.

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


@njit(cache=True, nogil=True, error_model="numpy")
def _multiply(x_at, weight_at, bias_at, y_at, first_at, start_at, rest_at, column_at, inp, out):
    """``y = x wᵀ + bias``; no bias where its address is 0. Two chains of multiply-adds to a row."""
    x = carray(_pointer(x_at), (inp,), np.float32)
    weight = carray(_pointer(weight_at), (out * inp,), np.float32)
    bias = carray(_pointer(bias_at), (out,), np.float32)
    y = carray(_pointer(y_at), (out,), np.float32)
    first = carray(_pointer(first_at), (out + 1,), np.int64)
    start = carray(_pointer(start_at), (out * inp,), np.int64)
    rest = carray(_pointer(rest_at), (out, 2), np.int64)
    column = carray(_pointer(column_at), (out * inp,), np.int32)
    w0, k = 0, 0
    for r in range(out):
        high = first[r + 1]
        a, b = splat(np.float32(0.0)), splat(np.float32(0.0))
        while k < high - 1:
            c, d = start[k], start[k + 1]
            a = fma(load(weight, w0 + c), load(x, c), a)
            b = fma(load(weight, w0 + d), load(x, d), b)
            k += 2
        if k < high:
            c = start[k]
            a = fma(load(weight, w0 + c), load(x, c), a)
            k += 1
        total = sum_lanes(a + b)
        for j in range(rest[r, 0], rest[r, 1]):
            total += weight[w0 + column[j]] * x[column[j]]
        y[r] = total + (bias[r] if bias_at else np.float32(0.0))
        w0 += inp


class SingleRow:
    """A layer's mask ``[O, I]`` made ready for one row at a time.

    Args:
        pattern: of a population of one ticket.
    """

    __slots__ = ("_memory", "_shape", "_tail")

    def __init__(self, pattern: Pattern) -> None:
        rows, out, inp = pattern.rows, pattern.out, pattern.inp
        found = _find_registers(rows.begin, rows.column, out, inp)
        self._shape = (1, out)
        # Held, because addresses alone would not keep it.
        self._memory = (*found, rows.column)
        self._tail = (*(array.ctypes.data for array in self._memory), inp, out)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x wᵀ + bias`` of one row.

        The caller warrants: all are contiguous float32 CPU tensors without a gradient to record,
        `x` ``[1, I]``, `weight` ``[O, I]`` and zero off the mask, `bias` ``[O]``.

        Returns:
            ``[1, O]``.
        """
        y = x.new_empty(self._shape)
        bias_at = 0 if bias is None else bias.data_ptr()
        _multiply(x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr(), *self._tail)
        return y
