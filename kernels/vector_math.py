"""Functions of SIMD registers: hyperbolic tangent, exponential, logarithm, reciprocal root."""

from __future__ import annotations

from numba.core.extending import intrinsic

from .vector import INT_VECTOR, LANES, VECTOR, call, clamp, constant, integers, multiply_add, vector


def _horner(builder, coefficients, x):
    value = constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = multiply_add(builder, value, x, constant(coefficient))
    return value


# Rational minimax fit of tanh(x)/x in x^2 on |x| <= 9.02, where float32 tanh reaches 1.
_TANH_P = (0.99999997905, 0.13379706392, 3.4940207906e-3, 2.0583256021e-5, 1.3318768327e-8)
_TANH_Q = (1.0, 0.46713021644, 0.025871020913, 3.2830703365e-4, 7.7618930930e-7)


@intrinsic
def tanh(typingctx, a):
    """Hyperbolic tangent; relative error below 4e-7 (3 ulp), result within [-1, 1]."""

    def generate(context, builder, signature, arguments):
        x = clamp(builder, arguments[0], constant(9.02), ">")
        x = clamp(builder, x, constant(-9.02), "<")
        square = builder.fmul(x, x)
        numerator = builder.fmul(x, _horner(builder, _TANH_P, square))
        value = builder.fdiv(numerator, _horner(builder, _TANH_Q, square))
        value = clamp(builder, value, constant(1.0), ">")
        return clamp(builder, value, constant(-1.0), "<")

    return vector(vector), generate


# Minimax fit of exp(r) on |r| <= log(2)/2.
_EXP = (1.0, 1.0, 0.49999993452, 0.16666520690, 0.041668387365, 0.0083687098318, 0.0013814613093)


@intrinsic
def exp(typingctx, a):
    """Exponential; relative error below 3e-7, clamped to [2^-126, 2^127] in magnitude."""

    def generate(context, builder, signature, arguments):
        x = clamp(builder, arguments[0], constant(88.02), ">")
        x = clamp(builder, x, constant(-87.33), "<")
        scaled = builder.fmul(x, constant(1.4426950408889634))
        whole = call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [scaled])
        # log(2) in two parts, so that the reduced argument keeps its low bits.
        rest = multiply_add(builder, whole, constant(-0.693359375), x)
        rest = multiply_add(builder, whole, constant(2.12194440e-4), rest)
        value = _horner(builder, _EXP, rest)
        exponent = builder.add(builder.fptosi(whole, INT_VECTOR), integers(127))
        power = builder.bitcast(builder.shl(exponent, integers(23)), VECTOR)
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
        bits = builder.bitcast(arguments[0], INT_VECTOR)
        # Shifts the mantissa's range from [1, 2) to [sqrt(1/2), sqrt(2)).
        bits = builder.add(bits, integers(0x3F800000 - 0x3F3504F3))
        whole = builder.sub(builder.lshr(bits, integers(23)), integers(127))
        bits = builder.and_(bits, integers(0x007FFFFF))
        mantissa = builder.bitcast(builder.add(bits, integers(0x3F3504F3)), VECTOR)
        whole = builder.sitofp(whole, VECTOR)
        rest = builder.fsub(mantissa, constant(1.0))
        square = builder.fmul(rest, rest)
        value = builder.fmul(builder.fmul(rest, square), _horner(builder, _LOG, rest))
        value = multiply_add(builder, whole, constant(-2.12194440e-4), value)
        value = multiply_add(builder, square, constant(-0.5), value)
        value = builder.fadd(rest, value)
        return multiply_add(builder, whole, constant(0.693359375), value)

    return vector(vector), generate


@intrinsic
def rsqrt(typingctx, a):
    """Reciprocal square root, of two roundings."""

    def generate(context, builder, signature, arguments):
        root = call(builder, f"llvm.sqrt.v{LANES}f32", VECTOR, [arguments[0]])
        return builder.fdiv(constant(1.0), root)

    return vector(vector), generate
