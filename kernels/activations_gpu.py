"""Activations in Triton; see `activations`."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import FORMULAS
from .formulas import compile_formulas


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _fma(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def _maximum(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def _where_positive(x, a, b):
    return tl.where(x <= 0.0, b, a)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent within 4e-7 relative, as in Cephes; saturates, and keeps NaN."""
    size = tl.abs(x)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0, -large, large))


_formulas = compile_formulas(
    FORMULAS,
    triton.jit,
    __name__=__name__,
    exp=_exp,
    fma=_fma,
    maximum=_maximum,
    tl=tl,
    where_positive=_where_positive,
)
_relu, _relu_gradient = _formulas["relu"], _formulas["relu_gradient"]
_tanh_gradient = _formulas["tanh_gradient"]
_elu, _elu_gradient = _formulas["elu"], _formulas["elu_gradient"]
_silu, _silu_gradient = _formulas["silu"], _formulas["silu_gradient"]
_gelu, _gelu_gradient = _formulas["gelu"], _formulas["gelu_gradient"]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Its value at x; NaN stays NaN."""
    if ACTIVATION == "tanh":
        y = _tanh(x)
    elif ACTIVATION == "relu":
        y = _relu(x)
    elif ACTIVATION == "elu":
        y = _elu(x, 1.0)
    elif ACTIVATION == "silu":
        y = _silu(x)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        y = _gelu(x)
    return y


@triton.jit
def deactivate(dy, known, ACTIVATION: tl.constexpr):
    """The gradient by the input; ``known`` as `TorchActivation.by_output` says."""
    if ACTIVATION == "tanh":
        dx = _tanh_gradient(dy, known)
    elif ACTIVATION == "relu":
        dx = _relu_gradient(dy, known)
    elif ACTIVATION == "elu":
        dx = _elu_gradient(dy, known, 1.0)
    elif ACTIVATION == "silu":
        dx = _silu_gradient(dy, known)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        dx = _gelu_gradient(dy, known)
    return dx
