"""Activations in Numba, on registers of a panel: those of `activations`, and what torch adds.

A derivative is read off the output where it can be; the others leave it in a panel of its own
during the forward pass (``kept``): the same bytes as keeping their input, and one exponential
instead of two.
"""

from __future__ import annotations

import numpy as np

from .activations import FORMULAS
from .compiling import njit
from .formulas import compile_formulas
from .vector import (
    LANES,
    as_vector,
    fma,
    load,
    maximum,
    splat,
    store,
    where_positive,
)
from .vector_math import exp, tanh

NONE, TANH, RELU, SIGMOID, ELU, LEAKY, SILU, GELU, GELU_TANH = range(9)
_CODES = {"tanh": TANH, "relu": RELU, "elu": ELU, "silu": SILU, "gelu": GELU}
_NAN = np.float32(np.nan)


def code_of(name: str) -> int:
    """The number that kernels know an activation by, one that they have."""
    return _CODES[name]


@njit(forceinline=True)
def _fma(a, b, c):
    return fma(as_vector(a), as_vector(b), as_vector(c))


@njit(forceinline=True)
def _maximum(x, low):
    return maximum(x, as_vector(low))


@njit(forceinline=True)
def _where_positive(x, a, b):
    return where_positive(x, as_vector(a), as_vector(b))


_formulas = compile_formulas(
    FORMULAS,
    njit(forceinline=True),
    __name__=__name__,
    exp=exp,
    fma=_fma,
    maximum=_maximum,
    where_positive=_where_positive,
)
_relu, _relu_gradient = _formulas["relu"], _formulas["relu_gradient"]
_tanh_gradient, _sigmoid = _formulas["tanh_gradient"], _formulas["sigmoid"]
_elu, _elu_gradient = _formulas["elu"], _formulas["elu_gradient"]
_silu, _silu_gradient = _formulas["silu"], _formulas["silu_gradient"]
_gelu, _gelu_gradient = _formulas["gelu"], _formulas["gelu_gradient"]


@njit(forceinline=True)
def _tanh_of_gelu(x):
    """Of GELU's approximation with tanh."""
    return tanh(0.7978845608028654 * x * _fma(0.044715 * x, x, 1.0))


@njit(forceinline=True)
def _gelu_tanh_slope(x):
    t = _tanh_of_gelu(x)
    inner = 0.7978845608028654 * _fma(0.134145 * x, x, 1.0)
    return _fma(0.5 * x * inner, 1.0 - t * t, 0.5 * (1.0 + t))


@njit
def _value(code, slope, x):
    if code == SIGMOID:
        return _sigmoid(x)
    if code == ELU:
        return _elu(x, slope)
    if code == LEAKY:
        return _where_positive(x, x, slope * x)
    if code == SILU:
        return _silu(x)
    if code == GELU:
        return _gelu(x)
    if code == GELU_TANH:
        return 0.5 * x * (1.0 + _tanh_of_gelu(x))
    return splat(_NAN)


@njit
def _slope(code, slope, x):
    """The derivative at an input."""
    if code == ELU:
        return _where_positive(x, 1.0, _elu(x, slope) + slope)
    if code == LEAKY:
        return _where_positive(x, 1.0, slope)
    if code == SILU:
        return _silu_gradient(1.0, x)
    if code == GELU:
        return _gelu_gradient(1.0, x)
    if code == GELU_TANH:
        return _gelu_tanh_slope(x)
    return splat(_NAN)


@njit
def _gradient(code, slope, dy, y):
    if code == SIGMOID:
        return dy * y * (1.0 - y)
    if code == ELU:
        return _elu_gradient(dy, y, slope)
    if code == LEAKY:
        return _where_positive(y, dy, slope * dy)
    return splat(_NAN)


@njit(cache=True)
def activate(m, at, kept, size, code, slope):
    """Replace ``size`` elements at index ``at`` by their activation.

    Args:
        m: memory.
        at: index of the panel, a multiple of registers.
        kept: index of the panel that takes the derivative, or 0 where nobody wants it.
        size: elements.
        code: which activation.
        slope: the parameter of ELU and leaky ReLU.
    """
    if code == TANH:
        for i in range(at, at + size, LANES):
            store(m, i, tanh(load(m, i)))
    elif code == RELU:
        for i in range(at, at + size, LANES):
            store(m, i, _relu(load(m, i)))
    elif kept != 0:
        for i in range(0, size, LANES):
            x = load(m, at + i)
            store(m, at + i, _value(code, slope, x))
            store(m, kept + i, _slope(code, slope, x))
    else:
        for i in range(at, at + size, LANES):
            store(m, i, _value(code, slope, load(m, i)))


@njit(cache=True)
def deactivate(m, delta, y, kept, size, code, slope):
    """Multiply the gradient at ``delta`` by the derivative of the activation.

    Args:
        m: memory.
        delta: index of the gradient by the output.
        y: index of the output.
        kept: index of the derivative, or 0 where the output tells it.
        size: elements.
        code: which activation.
        slope: the parameter of ELU and leaky ReLU.
    """
    if kept != 0:
        for i in range(0, size, LANES):
            store(m, delta + i, load(m, delta + i) * load(m, kept + i))
    elif code == TANH:
        for i in range(0, size, LANES):
            store(m, delta + i, _tanh_gradient(load(m, delta + i), load(m, y + i)))
    elif code == RELU:
        for i in range(0, size, LANES):
            store(m, delta + i, _relu_gradient(load(m, delta + i), load(m, y + i)))
    else:
        for i in range(0, size, LANES):
            dy = load(m, delta + i)
            store(m, delta + i, _gradient(code, slope, dy, load(m, y + i)))
