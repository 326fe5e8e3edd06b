"""SIMD registers as Numba values: loads, stores, fused multiply-add, tanh, exp and GEMM tiles.

Numba alone cannot hold a block of accumulators in registers. Here a small custom type maps to
LLVM's ``<LANES x float>``: kernels state what lives in a register, and LLVM lowers it to AVX-512,
AVX2 or NEON: one source, no compiler on the user's machine. `LANES` is the width of the host.

All arrays are one-dimensional, contiguous float32 and indexed in elements, without bounds checks.
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

__all__ = [
    "LANES",
    "MASK_BYTES",
    "aligned_empty",
    "exp",
    "fma",
    "load",
    "load_bits",
    "load_bits_tail",
    "load_kept",
    "log",
    "make_block_tile",
    "make_row_tile",
    "make_sparse_tile",
    "make_tile",
    "maximum",
    "minimum",
    "splat",
    "store",
    "sum_each",
    "sum_lanes",
    "tanh",
    "transpose",
    "where_positive",
]


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
_INDEX = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT_VECTOR = ir.VectorType(_INT, LANES)


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
        super().__init__(dmm, fe_type, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, float(value))] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_INT_VECTOR, [ir.Constant(_INT, value)] * LANES)


def _broadcast(builder, scalar):
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _integers(0))


def _call(builder, name: str, result, arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


def _llvm_fma(builder, a, b, c):
    return _call(builder, f"llvm.fma.v{LANES}f32", _VECTOR, [a, b, c])


def _data(context, builder, array_type, array):
    return context.make_array(array_type)(context, builder, array).data


def _load(builder, data, index):
    pointer = builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder, value, data, index):
    pointer = builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())
    builder.store(value, pointer, align=4)


@intrinsic
def load(typingctx, array, index):
    """`LANES` consecutive elements of ``array`` from ``index``."""

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        return _load(builder, data, arguments[1])

    return vector(array, types.int64), generate


@intrinsic
def load_kept(typingctx, array, mask, index):
    """`load`, with zero in the lanes whose byte of ``mask`` is zero, whatever lies there."""

    def generate(context, builder, signature, arguments):
        array, mask, index = arguments
        data = _data(context, builder, signature.args[0], array)
        bytes_at = builder.gep(_data(context, builder, signature.args[1], mask), [index])
        byte = ir.VectorType(ir.IntType(8), LANES)
        kept = builder.load(builder.bitcast(bytes_at, byte.as_pointer()), align=1)
        is_kept = builder.icmp_unsigned("!=", kept, ir.Constant(byte, None))
        return builder.select(is_kept, _load(builder, data, index), ir.Constant(_VECTOR, None))

    return vector(array, mask, types.int64), generate


@intrinsic
def store(typingctx, array, index, value):
    """Write a register to `LANES` consecutive elements of ``array`` from ``index``."""

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        _store(builder, arguments[2], data, arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def splat(typingctx, scalar):
    """A register with ``scalar`` in every lane."""

    def generate(context, builder, signature, arguments):
        return _broadcast(builder, arguments[0])

    return vector(types.float32), generate


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""

    def generate(context, builder, signature, arguments):
        return _llvm_fma(builder, *arguments)

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
    return builder.shuffle_vector(a, b, ir.Constant(_INT_VECTOR, [_INT(lane) for lane in lanes]))


@intrinsic
def sum_each(typingctx, array, index):
    """Lane l is the lane sum of register l of the `LANES` registers that lie at ``index``.

    A tree of halves as in `sum_lanes`, two registers to one, so that `LANES` sums cost three
    instructions each.
    """

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        registers = [
            _load(builder, data, builder.add(arguments[1], _INDEX(r * LANES))) for r in range(LANES)
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
        x_data = _data(context, builder, signature.args[0], arguments[0])
        y_data = _data(context, builder, signature.args[3], arguments[3])
        x0, xs = arguments[1:3]
        y0, ys = arguments[4:6]
        rows = [
            _load(builder, x_data, builder.add(x0, builder.mul(xs, _INDEX(r))))
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
            _store(builder, row, y_data, builder.add(y0, builder.mul(ys, _INDEX(r))))
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
        return None


for _symbol in _ARITHMETIC:
    _overload_arithmetic(_symbol)


def _clamp(builder, value, bound, comparison: str):
    # A comparison with NaN is false, so NaN passes through.
    beyond = builder.fcmp_ordered(comparison, value, bound)
    return builder.select(beyond, bound, value)


@intrinsic
def maximum(typingctx, a, b):
    """Lane-wise maximum; a NaN in ``a`` stays NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return _clamp(builder, a, b, "<")

    return vector(vector, vector), generate


@intrinsic
def minimum(typingctx, a, b):
    """Lane-wise minimum; a NaN in ``a`` stays NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return _clamp(builder, a, b, ">")

    return vector(vector, vector), generate


@intrinsic
def where_positive(typingctx, x, a, b):
    """``a`` in the lanes where ``x > 0``, ``b`` in the others; a NaN in ``x`` chooses ``a``."""

    def generate(context, builder, signature, arguments):
        x, a, b = arguments
        return builder.select(builder.fcmp_ordered("<=", x, _constant(0.0)), b, a)

    return vector(vector, vector, vector), generate


def _make_load_bits(careful: bool):
    @intrinsic
    def load_bits(typingctx, array, index, bits, word):
        def generate(context, builder, signature, arguments):
            data = _data(context, builder, signature.args[0], arguments[0])
            words = _data(context, builder, signature.args[2], arguments[2])
            at = builder.gep(words, [builder.mul(arguments[3], _INDEX(MASK_BYTES))])
            stored = ir.IntType(8 * MASK_BYTES)
            lanes = builder.load(builder.bitcast(at, stored.as_pointer()), align=1)
            if stored.width != LANES:
                lanes = builder.trunc(lanes, ir.IntType(LANES))
            kept = builder.bitcast(lanes, ir.VectorType(ir.IntType(1), LANES))
            if not careful:
                value = _load(builder, data, arguments[1])
                return builder.select(kept, value, _constant(0.0))
            pointer = builder.bitcast(builder.gep(data, [arguments[1]]), _VECTOR.as_pointer())
            name = f"llvm.masked.load.v{LANES}f32.p0"
            return _call(builder, name, _VECTOR, [pointer, _INT(4), kept, _constant(0.0)])

        return vector(array, types.int64, bits, types.int64), generate

    return load_bits


load_bits = _make_load_bits(False)
"""``load_bits(array, index, bits, word)``: `load`, with zero in lanes whose bit is not set.

``bits`` is memory as bytes, and ``word`` counts in words of `MASK_BYTES`, the lowest bit first.
"""
load_bits_tail = _make_load_bits(True)
"""`load_bits` that never touches the memory of lanes whose bit is not set."""


def _horner(builder, coefficients, x):
    value = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = _llvm_fma(builder, value, x, _constant(coefficient))
    return value


# Rational minimax fit of tanh(x)/x in x^2 on |x| <= 9.02, where float32 tanh reaches 1.
_TANH_P = (0.99999997905, 0.13379706392, 3.4940207906e-3, 2.0583256021e-5, 1.3318768327e-8)
_TANH_Q = (1.0, 0.46713021644, 0.025871020913, 3.2830703365e-4, 7.7618930930e-7)


@intrinsic
def tanh(typingctx, a):
    """Hyperbolic tangent; relative error below 4e-7 (3 ulp), result within [-1, 1]."""

    def generate(context, builder, signature, arguments):
        x = _clamp(builder, arguments[0], _constant(9.02), ">")
        x = _clamp(builder, x, _constant(-9.02), "<")
        square = builder.fmul(x, x)
        numerator = builder.fmul(x, _horner(builder, _TANH_P, square))
        value = builder.fdiv(numerator, _horner(builder, _TANH_Q, square))
        value = _clamp(builder, value, _constant(1.0), ">")
        return _clamp(builder, value, _constant(-1.0), "<")

    return vector(vector), generate


# Minimax fit of exp(r) on |r| <= log(2)/2.
_EXP = (1.0, 1.0, 0.49999993452, 0.16666520690, 0.041668387365, 0.0083687098318, 0.0013814613093)


@intrinsic
def exp(typingctx, a):
    """Exponential; relative error below 3e-7, clamped to [2^-126, 2^127] in magnitude."""

    def generate(context, builder, signature, arguments):
        x = _clamp(builder, arguments[0], _constant(88.02), ">")
        x = _clamp(builder, x, _constant(-87.33), "<")
        scaled = builder.fmul(x, _constant(1.4426950408889634))
        whole = _call(builder, f"llvm.rint.v{LANES}f32", _VECTOR, [scaled])
        # log(2) in two parts, so that the reduced argument keeps its low bits.
        rest = _llvm_fma(builder, whole, _constant(-0.693359375), x)
        rest = _llvm_fma(builder, whole, _constant(2.12194440e-4), rest)
        value = _horner(builder, _EXP, rest)
        exponent = builder.add(builder.fptosi(whole, _INT_VECTOR), _integers(127))
        power = builder.bitcast(builder.shl(exponent, _integers(23)), _VECTOR)
        return builder.fmul(value, power)

    return vector(vector), generate


# Cephes logf: log(1 + r) = r - r^2/2 + r^3 * polynomial(r) on sqrt(1/2) <= 1 + r < sqrt(2).
_LOG = (
    3.3333331174e-1,
    -2.4999993993e-1,
    2.0000714765e-1,
    -1.6668057665e-1,
    1.4249322787e-1,
    -1.2420140846e-1,
    1.1676998740e-1,
    -1.1514610310e-1,
    7.0376836292e-2,
)


@intrinsic
def log(typingctx, a):
    """Natural logarithm of positive normal numbers; relative error below 3e-7."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _INT_VECTOR)
        # Shifts the mantissa's range from [1, 2) to [sqrt(1/2), sqrt(2)).
        bits = builder.add(bits, _integers(0x3F800000 - 0x3F3504F3))
        whole = builder.sub(builder.lshr(bits, _integers(23)), _integers(127))
        bits = builder.and_(bits, _integers(0x007FFFFF))
        mantissa = builder.bitcast(builder.add(bits, _integers(0x3F3504F3)), _VECTOR)
        whole = builder.sitofp(whole, _VECTOR)
        rest = builder.fsub(mantissa, _constant(1.0))
        square = builder.fmul(rest, rest)
        value = builder.fmul(builder.fmul(rest, square), _horner(builder, _LOG, rest))
        value = _llvm_fma(builder, whole, _constant(-2.12194440e-4), value)
        value = _llvm_fma(builder, square, _constant(-0.5), value)
        value = builder.fadd(rest, value)
        return _llvm_fma(builder, whole, _constant(0.693359375), value)

    return vector(vector), generate


def make_tile(rows: int, columns: int, accumulate: bool = False):
    """A GEMM tile of ``rows x (columns * LANES)`` accumulators held in registers.

    The returned function, callable in Numba code, computes for every row r and lane position j

        y[y0 + r*ys + j] = start + sum_d a[a0 + r*ar + d*ad] * x[x0 + d*xd + j],   d < depth

    where ``start`` is ``bias[b0 + r]``, or with ``accumulate`` the old value of y. With activations
    stored as ``[features][batch]`` this one loop is the forward pass (a = W), the input gradient
    (a = W transposed, by strides) and, with x stored as ``[batch][features]``, the weight gradient.
    Per step of d: rows broadcasts and columns loads for rows * columns fused multiply-adds.
    """

    @intrinsic
    def tile(typingctx, a, a0, ar, ad, x, x0, xd, y, y0, ys, depth, bias, b0):
        def generate(context, builder, signature, arguments):
            types_ = signature.args
            a_data = _data(context, builder, types_[0], arguments[0])
            x_data = _data(context, builder, types_[4], arguments[4])
            y_data = _data(context, builder, types_[7], arguments[7])
            bias_data = _data(context, builder, types_[11], arguments[11])
            a0, ar, ad = arguments[1:4]
            x0, xd = arguments[5:7]
            y0, ys, depth = arguments[8:11]
            b0 = arguments[12]
            row_a = [builder.add(a0, builder.mul(ar, _INDEX(r))) for r in range(rows)]
            row_y = [builder.add(y0, builder.mul(ys, _INDEX(r))) for r in range(rows)]
            accumulators = {}
            for r in range(rows):
                if not accumulate:
                    index = builder.add(b0, _INDEX(r))
                    start = _broadcast(builder, builder.load(builder.gep(bias_data, [index])))
                for c in range(columns):
                    if accumulate:
                        start = _load(builder, y_data, builder.add(row_y[r], _INDEX(c * LANES)))
                    slot = cgutils.alloca_once(builder, _VECTOR)
                    builder.store(start, slot)
                    accumulators[r, c] = slot
            with cgutils.for_range(builder, depth) as loop:
                x_row = builder.add(x0, builder.mul(loop.index, xd))
                xs = [
                    _load(builder, x_data, builder.add(x_row, _INDEX(c * LANES)))
                    for c in range(columns)
                ]
                offset = builder.mul(loop.index, ad)
                for r in range(rows):
                    index = builder.add(row_a[r], offset)
                    value = _broadcast(builder, builder.load(builder.gep(a_data, [index])))
                    for c in range(columns):
                        slot = accumulators[r, c]
                        builder.store(_llvm_fma(builder, value, xs[c], builder.load(slot)), slot)
            for (r, c), slot in accumulators.items():
                index = builder.add(row_y[r], _INDEX(c * LANES))
                _store(builder, builder.load(slot), y_data, index)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, x, i, i, y, i, i, i, bias, i), generate

    return tile


def make_sparse_tile(columns: int, accumulate: bool = False):
    """One sparse row times ``columns * LANES`` packed columns, accumulators held in registers.

    The returned function computes, over the nonzeros j of one row in ``[begin, end)``,

        y[y0 + l] = start + sum_j values[j] * x[x0 + index[j]*xd + l]

    with ``start`` the scalar given, or with ``accumulate`` the old value of y. Per nonzero: one
    broadcast and ``columns`` loads for ``columns`` fused multiply-adds.
    """

    @intrinsic
    def sparse_tile(typingctx, values, index, begin, end, x, x0, xd, y, y0, start):
        def generate(context, builder, signature, arguments):
            types_ = signature.args
            value_data = _data(context, builder, types_[0], arguments[0])
            index_data = _data(context, builder, types_[1], arguments[1])
            x_data = _data(context, builder, types_[4], arguments[4])
            y_data = _data(context, builder, types_[7], arguments[7])
            begin, end = arguments[2:4]
            x0, xd = arguments[5:7]
            y0, start = arguments[8:10]
            slots = []
            for c in range(columns):
                slot = cgutils.alloca_once(builder, _VECTOR)
                if accumulate:
                    first = _load(builder, y_data, builder.add(y0, _INDEX(c * LANES)))
                else:
                    first = _broadcast(builder, start)
                builder.store(first, slot)
                slots.append(slot)
            with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
                j = builder.add(begin, loop.index)
                value = _broadcast(builder, builder.load(builder.gep(value_data, [j])))
                column = builder.load(builder.gep(index_data, [j]))
                if column.type != _INDEX:
                    column = builder.zext(column, _INDEX)
                x_row = builder.add(x0, builder.mul(column, xd))
                for c, slot in enumerate(slots):
                    x_value = _load(builder, x_data, builder.add(x_row, _INDEX(c * LANES)))
                    builder.store(_llvm_fma(builder, value, x_value, builder.load(slot)), slot)
            for c, slot in enumerate(slots):
                _store(builder, builder.load(slot), y_data, builder.add(y0, _INDEX(c * LANES)))
            return context.get_dummy_value()

        i = types.int64
        return types.void(values, index, i, i, x, i, i, y, i, types.float32), generate

    return sparse_tile


def make_block_tile(rows: int, columns: int):
    """``rows`` dense rows times the kept rows of ``columns * LANES`` columns, held in registers.

    The returned function computes, over the depths d = index[j], j in ``[begin, end)``,

        y[y0 + r*ys + l] = bias[b0 + l] + sum_j a[a0 + r*ar + index[j]] * x[x0 + index[j]*xd + l]

    for every row r and l < columns * LANES. With activations row-major and weights that are zero
    but for full blocks, a block column shares one index: no activation is transposed. Per j: rows
    broadcasts and columns loads for rows * columns fused multiply-adds.
    """

    @intrinsic
    def block_tile(typingctx, a, a0, ar, index, begin, end, x, x0, xd, y, y0, ys, bias, b0):
        def generate(context, builder, signature, arguments):
            types_ = signature.args
            a_data = _data(context, builder, types_[0], arguments[0])
            a0, ar = arguments[1:3]
            index_data = _data(context, builder, types_[3], arguments[3])
            begin, end = arguments[4:6]
            x_data = _data(context, builder, types_[6], arguments[6])
            x0, xd = arguments[7:9]
            y_data = _data(context, builder, types_[9], arguments[9])
            y0, ys = arguments[10:12]
            bias_data = _data(context, builder, types_[12], arguments[12])
            b0 = arguments[13]
            row_a = [builder.add(a0, builder.mul(ar, _INDEX(r))) for r in range(rows)]
            row_y = [builder.add(y0, builder.mul(ys, _INDEX(r))) for r in range(rows)]
            slots = {}
            for c in range(columns):
                start = _load(builder, bias_data, builder.add(b0, _INDEX(c * LANES)))
                for r in range(rows):
                    slots[r, c] = cgutils.alloca_once(builder, _VECTOR)
                    builder.store(start, slots[r, c])
            with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
                j = builder.add(begin, loop.index)
                depth = builder.zext(builder.load(builder.gep(index_data, [j])), _INDEX)
                x_row = builder.add(x0, builder.mul(depth, xd))
                xs = [
                    _load(builder, x_data, builder.add(x_row, _INDEX(c * LANES)))
                    for c in range(columns)
                ]
                for r in range(rows):
                    at = builder.gep(a_data, [builder.add(row_a[r], depth)])
                    value = _broadcast(builder, builder.load(at))
                    for c in range(columns):
                        slot = slots[r, c]
                        builder.store(_llvm_fma(builder, value, xs[c], builder.load(slot)), slot)
            for (r, c), slot in slots.items():
                at = builder.add(row_y[r], _INDEX(c * LANES))
                _store(builder, builder.load(slot), y_data, at)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, index, i, i, x, i, i, y, i, i, bias, i), generate

    return block_tile


def make_row_tile(columns: int, chains: int):
    """One row of nonzeros times ``columns * LANES`` columns of a panel, held in registers.

    The returned function computes ``y[c] = start + sum_j value[j] * x[index[j] * ld + c]``. So that
    the latency of multiply-adds is hidden, nonzeros take turns on ``chains`` sums.
    """

    @intrinsic
    def row_tile(typingctx, m, value0, index, index0, count, x0, ld, y0, start):
        def generate(context, builder, signature, arguments):
            data = _data(context, builder, signature.args[0], arguments[0])
            index_data = _data(context, builder, signature.args[2], arguments[2])
            value0, index0, count, x0, ld, y0, start = (arguments[i] for i in (1, *range(3, 9)))
            sums = {}
            for chain in range(chains):
                for c in range(columns):
                    sums[chain, c] = cgutils.alloca_once(builder, _VECTOR)
                    first = _broadcast(builder, start) if chain == 0 else ir.Constant(_VECTOR, None)
                    builder.store(first, sums[chain, c])

            def step(j, chain):
                at = builder.gep(data, [builder.add(value0, j)])
                value = _broadcast(builder, builder.load(at))
                at = builder.gep(index_data, [builder.add(index0, j)])
                column = builder.zext(builder.load(at), _INDEX)
                row = builder.add(x0, builder.mul(column, ld))
                for c in range(columns):
                    x = _load(builder, data, builder.add(row, _INDEX(c * LANES)))
                    slot = sums[chain, c]
                    builder.store(_llvm_fma(builder, value, x, builder.load(slot)), slot)

            rounds = builder.sdiv(count, _INDEX(chains))
            with cgutils.for_range(builder, rounds) as loop:
                first = builder.mul(loop.index, _INDEX(chains))
                for chain in range(chains):
                    step(builder.add(first, _INDEX(chain)), chain)
            if chains > 1:
                done = builder.mul(rounds, _INDEX(chains))
                with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                    step(builder.add(done, loop.index), 0)
            for c in range(columns):
                total = builder.load(sums[0, c])
                for chain in range(1, chains):
                    total = builder.fadd(total, builder.load(sums[chain, c]))
                _store(builder, total, data, builder.add(y0, _INDEX(c * LANES)))
            return context.get_dummy_value()

        i = types.int64
        return types.void(m, i, index, i, i, i, i, i, types.float32), generate

    return row_tile
