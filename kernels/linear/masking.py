"""What a mask leaves of the memory behind it: compare, look and zero, by address and in one pass.

Nobody need announce a write: whoever reads a weight through its mask, or has looked, is right
whatever was written. So these cost little: SIMD over bytes and bits, called by address, since an
array or a tensor made for the call would cost more than the work. The GIL is kept for the same
reason, and what a caller holds it for cannot be written by another thread of this interpreter.

All addresses are of contiguous memory: masks one byte an entry, where any but 0 keeps; values four
bytes, of any type.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.extending import intrinsic

from ..addresses import by_address, find_machine_code, pointer
from ..compiling import njit

# Numba widens small integers to 64 bits, and then no register holds many of them.


@intrinsic
def _or_differing(typingctx, a, b, seen):
    """``seen | a ^ b`` of bytes."""

    def generate(context, builder, signature, arguments):
        a, b, seen = arguments
        return builder.or_(seen, builder.xor(a, b))

    one = types.uint8
    return one(one, one, one), generate


def _is_pruned(builder, kept):
    return builder.icmp_unsigned("==", kept, ir.Constant(kept.type, 0))


@intrinsic
def _or_none(typingctx, kept, seen):
    """``seen``, or 1 where the byte is 0."""

    def generate(context, builder, signature, arguments):
        kept, seen = arguments
        return builder.or_(seen, builder.zext(_is_pruned(builder, kept), kept.type))

    one = types.uint8
    return one(one, one), generate


@intrinsic
def _or_pruned(typingctx, value, kept, seen):
    """``seen | value`` without the value's sign where it is pruned: -0 is zero too."""

    def generate(context, builder, signature, arguments):
        value, kept, seen = arguments
        size = builder.shl(value, ir.Constant(value.type, 1))
        pruned = builder.sext(_is_pruned(builder, kept), value.type)
        return builder.or_(seen, builder.and_(size, pruned))

    one = types.int32
    return one(one, types.uint8, one), generate


@intrinsic
def _keep_one(typingctx, value, kept):
    """The value, or zero where it is pruned."""

    def generate(context, builder, signature, arguments):
        value, kept = arguments
        return builder.select(_is_pruned(builder, kept), ir.Constant(value.type, 0), value)

    return types.int32(types.int32, types.uint8), generate


@njit(cache=True, error_model="numpy")
def bytes_differ(a_at, b_at, count):
    """Whether ``count`` bytes are not the same."""
    a = carray(pointer(a_at), (count,), np.uint8)
    b = carray(pointer(b_at), (count,), np.uint8)
    seen = np.uint8(0)
    for i in range(count):
        seen = _or_differing(a[i], b[i], seen)
    return seen != 0


@njit(cache=True, error_model="numpy")
def _equal(a_at, b_at, count):
    return not bytes_differ(a_at, b_at, count)


@njit(cache=True, error_model="numpy")
def _all_equal(table_at, rows):
    """`is_equal` for every ``[address, address, bytes]``."""
    table = carray(pointer(table_at), (rows, 3), np.int64)
    different = False
    for row in range(rows):
        different |= bytes_differ(table[row, 0], table[row, 1], table[row, 2])
    return not different


@njit(cache=True, error_model="numpy")
def _zero_off(value_at, mask_at, count):
    """Whether every value off the mask is zero."""
    value = carray(pointer(value_at), (count,), np.int32)
    mask = carray(pointer(mask_at), (count,), np.uint8)
    seen = np.int32(0)
    for i in range(count):
        seen = _or_pruned(value[i], mask[i], seen)
    return seen == 0


@intrinsic
def _or(typingctx, a, b):
    def generate(context, builder, signature, arguments):
        return builder.or_(*arguments)

    return types.int32(types.int32, types.int32), generate


@njit(cache=True, error_model="numpy")
def _three_zero_off(a_at, b_at, c_at, mask_at, count):
    """`_zero_off` of three tensors with one mask, whose bytes are the larger part of the work."""
    a = carray(pointer(a_at), (count,), np.int32)
    b = carray(pointer(b_at), (count,), np.int32)
    c = carray(pointer(c_at), (count,), np.int32)
    mask = carray(pointer(mask_at), (count,), np.uint8)
    seen = np.int32(0)
    for i in range(count):
        seen = _or_pruned(_or(_or(a[i], b[i]), c[i]), mask[i], seen)
    return seen == 0


@njit(cache=True, error_model="numpy")
def _keep(value_at, mask_at, result_at, count):
    """``result``, memory of its own, is the value on the mask and zero off it."""
    value = carray(pointer(value_at), (count,), np.int32)
    mask = carray(pointer(mask_at), (count,), np.uint8)
    result = carray(pointer(result_at), (count,), np.int32)
    for i in range(count):
        result[i] = _keep_one(value[i], mask[i])


# Apart from `_keep`, whose loop runs one by one where its two arrays are the same.
@njit(cache=True, error_model="numpy")
def _keep_in_place(value_at, mask_at, count):
    """Zero the value off the mask."""
    value = carray(pointer(value_at), (count,), np.int32)
    mask = carray(pointer(mask_at), (count,), np.uint8)
    for i in range(count):
        value[i] = _keep_one(value[i], mask[i])


@njit(cache=True, error_model="numpy")
def _is_full(mask_at, count):
    """Whether nothing is pruned."""
    mask = carray(pointer(mask_at), (count,), np.uint8)
    seen = np.uint8(0)
    for i in range(count):
        seen = _or_none(mask[i], seen)
    return seen == 0


@njit(cache=True, error_model="numpy")
def _keep_all(table_at, rows):
    """`keep_in_place` for each ``[value address, mask address, count]`` that needs it."""
    table = carray(pointer(table_at), (rows, 3), np.int64)
    full, begin = False, 0
    while begin < rows:
        mask_at, count = table[begin, 1], table[begin, 2]
        # A weight and its state follow each other.
        if begin == 0 or mask_at != table[begin - 1, 1]:
            full = _is_full(mask_at, count)
        end = begin + 1
        while end < min(begin + 3, rows) and table[end, 1] == mask_at:
            end += 1
        if not full and not _three_zero_off(
            table[begin, 0], table[(begin + end) // 2, 0], table[end - 1, 0], mask_at, count
        ):
            for row in range(begin, end):
                if not _zero_off(table[row, 0], mask_at, count):
                    _keep_in_place(table[row, 0], mask_at, count)
        begin = end


is_equal = by_address(_equal, 3)
are_equal = by_address(_all_equal, 2)
is_zero_off = by_address(_zero_off, 3)
keep = by_address(_keep, 4)
keep_in_place = by_address(_keep_in_place, 3)
keeps_all = by_address(_is_full, 2)
keep_all = by_address(_keep_all, 2)


def keep_all_address() -> int:
    """Where the machine code of `keep_all` begins."""
    return find_machine_code(_keep_all, (types.int64,) * 2)
