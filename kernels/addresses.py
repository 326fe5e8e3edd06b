"""Tensors by address: one array over all memory, indexed in elements.

A whole network has a dozen tensors, and each array argument costs Numba's caller half a
microsecond. So kernels take addresses as integers, and make arrays of a `pointer` to each, or read
and write everything through the arrays `floats`, `integers`, `shorts` and `bytes_`, which begin at
address ``base`` = 0: a tensor is the index of its first element, ``address // itemsize``.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.core.extending import intrinsic

from .compiling import njit


@intrinsic
def pointer(typingctx, address):
    """An integer as an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def _element(context, builder, signature, arguments):
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.gep(data, [arguments[1]])


@intrinsic
def get(typingctx, array, index):
    """``array[index]``, without asking whether the index is negative."""

    def generate(context, builder, signature, arguments):
        return builder.load(_element(context, builder, signature, arguments))

    return array.dtype(array, types.int64), generate


@intrinsic
def put(typingctx, array, index, value):
    """``array[index] = value``, likewise."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _element(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@njit
def floats(base):
    """All memory as float32."""
    return carray(pointer(base), (1,), np.float32)


@njit
def integers(base):
    """All memory as int64."""
    return carray(pointer(base), (1,), np.int64)


@njit
def shorts(base):
    """All memory as int32."""
    return carray(pointer(base), (1,), np.int32)


@njit
def bytes_(base):
    """All memory as bytes."""
    return carray(pointer(base), (1,), np.uint8)


def by_address(function, arguments: int):
    """The machine code for so many integers.

    Numba's own dispatch on the types of the arguments takes as long as the work.
    """
    signature = (types.int64,) * arguments
    function.compile(signature)
    return function.get_overload(signature)


def find_machine_code(function, signature) -> int:
    """Where the machine code begins that Numba compiled for a signature, of its own convention."""
    function.compile(signature)
    compiled = function.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
