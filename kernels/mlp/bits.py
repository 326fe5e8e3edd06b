"""64 entries of a mask at once, as the bits of a word: empty stretches cost one comparison."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from ..compiling import njit

WORD = 64
"""Entries of a mask per word."""

_BYTES = ir.VectorType(ir.IntType(8), WORD)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@intrinsic
def _nonzero(typingctx, array, index):
    """Bit i tells whether ``array[index + i]`` is not zero: one-byte entries, no bounds checks."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), _BYTES.as_pointer())
        entries = builder.load(place, align=1)
        kept = builder.icmp_unsigned("!=", entries, ir.Constant(_BYTES, [0] * WORD))
        return builder.bitcast(kept, ir.IntType(WORD))

    return types.uint64(array, types.int64), generate


@intrinsic
def trailing_zeros(typingctx, word):
    """Place of the lowest bit of a uint64 that is not zero."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@njit(cache=True)
def mask_word(mask_row, begin, length):
    """Entries ``[begin, begin + length)`` of a bool row as bits, ``1 <= length <= WORD``.

    What begins beyond the row's end is not pruned: all ones.
    """
    if begin >= mask_row.shape[0]:
        word = _ALL
    elif begin + WORD <= mask_row.shape[0]:
        word = _nonzero(mask_row, begin)
    else:
        word = np.uint64(0)
        for i in range(length):
            word |= np.uint64(mask_row[begin + i]) << np.uint64(i)
    return word & (_ALL >> np.uint64(WORD - length))
