"""SIMD registers as Numba values: loads, stores, arithmetic; `vector_math` has functions of them.

Numba alone cannot hold a block of accumulators in registers. Here a small custom type maps to
LLVM's ``<LANES x float>``: kernels state what lives in a register, and LLVM lowers it to AVX-512,
AVX2 or NEON: one source, no compiler on the user's machine. `LANES` is the width of the host.

All arrays are one-dimensional, contiguous float32 and indexed in elements, without bounds checks.
What has a ``builder`` among its arguments emits code, for other intrinsics.
"""

from __future__ import annotations

import operator

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, overload, register_model

from .compiling import njit


def _count_lanes() -> int:
    """Of the processor that Numba compiles for: this one, or ``NUMBA_CPU_FEATURES``."""
    named = config.CPU_FEATURES
    if named is None:
        features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    else:
        features = {name[1:] for name in named.split(",") if name.startswith("+")}
    if "avx512f" in features:
        return 16
    return 8 if "avx2" in features else 4


LANES = _count_lanes()
"""float32 lanes of one vector register on this machine: 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE)."""

MASK_BYTES = max(1, LANES // 8)
"""Bytes that hold one bit per lane."""

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
INDEX = ir.IntType(64)
VECTOR = ir.VectorType(_FLOAT, LANES)
INT_VECTOR = ir.VectorType(_INT, LANES)


_LINE = 16
"""float32 elements of a cache line."""


@njit(cache=True)
def aligned_empty(size):
    """``[size]`` uninitialised float32 that begin on a cache line.

    A register that straddles two lines costs two loads: unaligned activations halve the speed of
    sparse products. Numba's own arrays begin anywhere.
    """
    memory = np.empty(size + _LINE, np.float32)
    skip = -(np.int64(memory.ctypes.data) // 4) % _LINE
    return memory[skip : skip + size]


class _Vector(types.Type):
    """The Numba type of one register of float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, VECTOR)


def constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [ir.Constant(_FLOAT, float(value))] * LANES)


def integers(value: int) -> ir.Constant:
    return ir.Constant(INT_VECTOR, [ir.Constant(_INT, value)] * LANES)


def broadcast(builder, scalar):
    """A register of one scalar."""
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), integers(0))


def call(builder, name: str, result, arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


def multiply_add(builder, a, b, c):
    """Of registers, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", VECTOR, [a, b, c])


def data_of(context, builder, array_type, array):
    """Where an array's elements begin."""
    return context.make_array(array_type)(context, builder, array).data


def load_at(builder, data, index):
    """The register of elements from ``index``."""
    pointer = builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())
    return builder.load(pointer, align=4)


def store_at(builder, value, data, index):
    """Write a register to the elements from ``index``."""
    pointer = builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())
    builder.store(value, pointer, align=4)


@intrinsic
def load(typingctx, array, index):
    """`LANES` consecutive elements of ``array`` from ``index``."""

    def generate(context, builder, signature, arguments):
        data = data_of(context, builder, signature.args[0], arguments[0])
        return load_at(builder, data, arguments[1])

    return vector(array, types.int64), generate


@intrinsic
def store(typingctx, array, index, value):
    """Write a register to `LANES` consecutive elements of ``array`` from ``index``."""

    def generate(context, builder, signature, arguments):
        data = data_of(context, builder, signature.args[0], arguments[0])
        store_at(builder, arguments[2], data, arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def splat(typingctx, scalar):
    """A register with ``scalar`` in every lane."""

    def generate(context, builder, signature, arguments):
        return broadcast(builder, arguments[0])

    return vector(types.float32), generate


def _listed(context, builder, signature, arguments):
    """Where an array's element lies, and the `LANES` positions that ``index`` lists from ``at``."""
    array, first, index, at = arguments
    listed = builder.gep(data_of(context, builder, signature.args[2], index), [at])
    positions = builder.load(builder.bitcast(listed, INT_VECTOR.as_pointer()), align=4)
    data = data_of(context, builder, signature.args[0], array)
    return builder.gep(data, [first]), positions


def _lanes(builder, data, positions):
    """Of each lane its number and where its element is."""
    for lane in range(LANES):
        number = ir.Constant(_INT, lane)
        position = builder.zext(builder.extract_element(positions, number), INDEX)
        yield number, builder.gep(data, [position])


_EVERY = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [ir.Constant(ir.IntType(1), 1)] * LANES)
_HAS_GATHERS = LANES == 16
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def gather(typingctx, array, first, index, at):
    """Lane l is ``array[first + index[at + l]]``; of an int32 index that is not negative."""

    def generate(context, builder, signature, arguments):
        data, positions = _listed(context, builder, signature, arguments)
        if _HAS_GATHERS:
            name = "llvm.x86.avx512.mask.gather.dps.512"
            base = builder.bitcast(data, _BYTES)
            return call(builder, name, VECTOR, [constant(0.0), base, positions, _EVERY, _INT(4)])
        value = constant(0.0)
        for lane, element in _lanes(builder, data, positions):
            value = builder.insert_element(value, builder.load(element), lane)
        return value

    return vector(array, types.int64, index, types.int64), generate


@intrinsic
def scatter(typingctx, array, first, index, at, value):
    """``array[first + index[at + l]]`` is lane l; likewise."""

    def generate(context, builder, signature, arguments):
        data, positions = _listed(context, builder, signature, arguments[:4])
        value = arguments[4]
        if _HAS_GATHERS:
            name = "llvm.x86.avx512.mask.scatter.dps.512"
            base = builder.bitcast(data, _BYTES)
            call(builder, name, ir.VoidType(), [base, _EVERY, positions, value, _INT(4)])
        else:
            for lane, element in _lanes(builder, data, positions):
                builder.store(builder.extract_element(value, lane), element)
        return context.get_dummy_value()

    return types.void(array, types.int64, index, types.int64, vector), generate


def as_vector(value):
    """A register as it is, or one of a number."""
    raise NotImplementedError


@overload(as_vector, inline="always")
def _as_vector(value):
    if isinstance(value, _Vector):
        return lambda value: value
    return lambda value: splat(np.float32(value))


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""

    def generate(context, builder, signature, arguments):
        return multiply_add(builder, *arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def sum_lanes(typingctx, a):
    """The sum of all lanes as a tree of halves (a fixed order)."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        width = LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(
                    value,
                    undefined,
                    ir.Constant(
                        ir.VectorType(_INT, width),
                        [ir.Constant(_INT, begin + lane) for lane in range(width)],
                    ),
                )
                for begin in (0, width)
            ]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(_INT, 0))

    return types.float32(vector), generate


def _shuffle(builder, a, b, lanes):
    """Lanes of the concatenation ``a, b``."""
    return builder.shuffle_vector(a, b, ir.Constant(INT_VECTOR, [_INT(lane) for lane in lanes]))


@intrinsic
def sum_each(typingctx, array, index):
    """Lane l is the lane sum of register l of the `LANES` registers that lie at ``index``.

    A tree of halves as in `sum_lanes`, two registers to one, so that `LANES` sums cost three
    instructions each.
    """

    def generate(context, builder, signature, arguments):
        data = data_of(context, builder, signature.args[0], arguments[0])
        registers = [
            load_at(builder, data, builder.add(arguments[1], INDEX(r * LANES)))
            for r in range(LANES)
        ]
        block = LANES
        while len(registers) > 1:
            half = block // 2
            low = [lane for lane in range(2 * LANES) if lane % block < half]
            high = [lane + half for lane in low]
            registers = [
                builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
                for a, b in zip(registers[::2], registers[1::2], strict=True)
            ]
            block = half
        return registers[0]

    return vector(array, types.int64), generate


@intrinsic
def transpose(typingctx, x, x0, xs, y, y0, ys):
    """``y[y0 + c*ys + r] = x[x0 + r*xs + c]`` for r, c < `LANES`, by butterflies of shuffles."""

    def generate(context, builder, signature, arguments):
        x_data = data_of(context, builder, signature.args[0], arguments[0])
        y_data = data_of(context, builder, signature.args[3], arguments[3])
        x0, xs = arguments[1:3]
        y0, ys = arguments[4:6]
        rows = [
            load_at(builder, x_data, builder.add(x0, builder.mul(xs, INDEX(r))))
            for r in range(LANES)
        ]
        width = LANES // 2
        while width:
            even = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
            odd = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & width:
                    a, b = rows[r], rows[r + width]
                    rows[r] = _shuffle(builder, a, b, even)
                    rows[r + width] = _shuffle(builder, a, b, odd)
            width //= 2
        for r, row in enumerate(rows):
            store_at(builder, row, y_data, builder.add(y0, builder.mul(ys, INDEX(r))))
        return context.get_dummy_value()

    i = types.int64
    return types.void(x, i, i, y, i, i), generate


def _binary(instruction: str):
    @intrinsic
    def apply(typingctx, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return vector(vector, vector), generate

    return apply


_ARITHMETIC = {
    operator.add: _binary("fadd"),
    operator.sub: _binary("fsub"),
    operator.mul: _binary("fmul"),
    operator.truediv: _binary("fdiv"),
}


def _overload_arithmetic(symbol) -> None:
    apply = _ARITHMETIC[symbol]

    @overload(symbol, inline="always")
    def _(a, b):
        if isinstance(a, _Vector) and isinstance(b, _Vector):
            return lambda a, b: apply(a, b)
        if isinstance(a, _Vector) or isinstance(b, _Vector):
            return lambda a, b: apply(as_vector(a), as_vector(b))
        return None


for _symbol in _ARITHMETIC:
    _overload_arithmetic(_symbol)


def clamp(builder, value, bound, comparison: str):
    # A comparison with NaN is false, so NaN passes through.
    beyond = builder.fcmp_ordered(comparison, value, bound)
    return builder.select(beyond, bound, value)


@intrinsic
def maximum(typingctx, a, b):
    """Lane-wise maximum; a NaN in ``a`` stays NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return clamp(builder, a, b, "<")

    return vector(vector, vector), generate


@intrinsic
def minimum(typingctx, a, b):
    """Lane-wise minimum; a NaN in ``a`` stays NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return clamp(builder, a, b, ">")

    return vector(vector, vector), generate


@intrinsic
def where_positive(typingctx, x, a, b):
    """``a`` in the lanes where ``x > 0``, ``b`` in the others; a NaN in ``x`` chooses ``a``."""

    def generate(context, builder, signature, arguments):
        x, a, b = arguments
        return builder.select(builder.fcmp_ordered("<=", x, constant(0.0)), b, a)

    return vector(vector, vector, vector), generate


def _make_load_bits(careful: bool):
    @intrinsic
    def load_bits(typingctx, array, index, bits, word):
        def generate(context, builder, signature, arguments):
            data = data_of(context, builder, signature.args[0], arguments[0])
            words = data_of(context, builder, signature.args[2], arguments[2])
            at = builder.gep(words, [builder.mul(arguments[3], INDEX(MASK_BYTES))])
            stored = ir.IntType(8 * MASK_BYTES)
            lanes = builder.load(builder.bitcast(at, stored.as_pointer()), align=1)
            if stored.width != LANES:
                lanes = builder.trunc(lanes, ir.IntType(LANES))
            kept = builder.bitcast(lanes, ir.VectorType(ir.IntType(1), LANES))
            if not careful:
                value = load_at(builder, data, arguments[1])
                return builder.select(kept, value, constant(0.0))
            pointer = builder.bitcast(builder.gep(data, [arguments[1]]), VECTOR.as_pointer())
            name = f"llvm.masked.load.v{LANES}f32.p0"
            return call(builder, name, VECTOR, [pointer, _INT(4), kept, constant(0.0)])

        return vector(array, types.int64, bits, types.int64), generate

    return load_bits


load_bits = _make_load_bits(False)
"""``load_bits(array, index, bits, word)``: `load`, with zero in lanes whose bit is not set.

``bits`` is memory as bytes, and ``word`` counts in words of `MASK_BYTES`, the lowest bit first.
"""
load_bits_tail = _make_load_bits(True)
"""`load_bits` that never touches the memory of lanes whose bit is not set."""
