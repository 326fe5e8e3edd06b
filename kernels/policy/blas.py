"""The dense product that torch itself calls, for use inside a kernel: `sgemm`.

Torch's library exports the BLAS it was built with (MKL on x86), which runs on torch's own threads.
Where there is none, kernels use tiles of their own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

_INT, _FLOAT, _BYTE = ir.IntType(32), ir.FloatType(), ir.IntType(8)


@cache
def find_sgemm() -> int:
    """Address of Fortran's ``sgemm_`` with 32-bit integers, or 0."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            return ctypes.cast(library.sgemm_, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


@intrinsic
def sgemm(typingctx, function, ta, tb, m, n, k, a, a0, lda, b0, ldb, beta, c0, ldc):
    """``C = op(A) op(B) + beta C``, column by column as in Fortran; see BLAS.

    Args:
        function: address of ``sgemm_``.
        ta: whether A is transposed.
        tb: whether B is.
        m: rows of C.
        n: columns of C.
        k: depth.
        a: the memory of all three, float32.
        a0: index of A.
        lda: distance of its columns.
        b0: index of B.
        ldb: distance of its columns.
        beta: what C counts for, float32.
        c0: index of C.
        ldc: distance of its columns.
    """

    def generate(context, builder, signature, arguments):
        function, ta, tb, m, n, k, memory, a0, lda, b0, ldb, beta, c0, ldc = arguments
        data = context.make_array(signature.args[6])(context, builder, memory).data

        def at(value):
            slot = cgutils.alloca_once(builder, value.type)
            builder.store(value, slot)
            return slot

        def letter(transposed):
            taken = builder.icmp_signed("!=", transposed, ir.Constant(transposed.type, 0))
            return at(builder.select(taken, _BYTE(ord("T")), _BYTE(ord("N"))))

        def integer(value):
            return at(builder.trunc(value, _INT))

        def element(index):
            return builder.gep(data, [index])

        values = [
            letter(ta),
            letter(tb),
            integer(m),
            integer(n),
            integer(k),
            at(ir.Constant(_FLOAT, 1.0)),
            element(a0),
            integer(lda),
            element(b0),
            integer(ldb),
            at(beta),
            element(c0),
            integer(ldc),
        ]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(function, kind.as_pointer()), values)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i, i, a, i, i, i, i, types.float32, i, i), generate
