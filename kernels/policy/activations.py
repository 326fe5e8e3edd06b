"""Activations between layers and their derivatives, on panels of registers.

The derivative is read off the output where it can be (`FROM_OUTPUT`); the others leave it in a
panel of its own during the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..compiling import njit
from ..vector import (
    LANES,
    exp,
    fma,
    load,
    maximum,
    splat,
    store,
    tanh,
    where_positive,
)

__all__ = ["NONE", "Activation", "activate", "deactivate", "find_activation"]

NONE, TANH, RELU, SIGMOID, ELU, LEAKY, SILU, GELU, GELU_TANH = range(9)


class Activation(NamedTuple):
    """One activation as kernels know it.

    Attributes:
        code: which.
        slope: what ELU and leaky ReLU have as a parameter.
        keeps: whether its derivative needs a panel of its own.
        module: torch's own, for who goes layer by layer.
    """

    code: int
    slope: float
    keeps: bool
    module: nn.Module


def _plain(code: int, keeps: bool, module: nn.Module) -> Callable[[nn.Module], Activation]:
    known = Activation(code, 0.0, keeps, module)
    return lambda _: known


def _leaky(module: Any) -> Activation:
    slope = float(module.negative_slope)
    return Activation(LEAKY, slope, not slope > 0, nn.LeakyReLU(slope))


def _elu(module: Any) -> Activation:
    alpha = float(module.alpha)
    return Activation(ELU, alpha, not alpha > 0, nn.ELU(alpha))


def _gelu(module: Any) -> Activation:
    code = GELU_TANH if module.approximate == "tanh" else GELU
    return Activation(code, 0.0, True, nn.GELU(module.approximate))


_KNOWN: dict[type[nn.Module], Callable[[nn.Module], Activation]] = {
    nn.Tanh: _plain(TANH, False, nn.Tanh()),
    nn.ReLU: _plain(RELU, False, nn.ReLU()),
    nn.Sigmoid: _plain(SIGMOID, False, nn.Sigmoid()),
    nn.ELU: _elu,
    nn.LeakyReLU: _leaky,
    nn.SiLU: _plain(SILU, True, nn.SiLU()),
    nn.GELU: _gelu,
}


def find_activation(module: nn.Module) -> Activation | None:
    """The activation that a module of torch is, or None where kernels do not know it."""
    build = _KNOWN.get(type(module))
    return None if build is None else build(module)


_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_ZERO = np.float32(0.0)


@njit
def _sigmoid(x):
    return splat(_ONE) / (splat(_ONE) + exp(splat(_ZERO) - x))


# exp(x) - 1 of a small x by its series: the difference would cancel.
_SMALL = np.float32(0.35)
_E2, _E3, _E4, _E5 = (np.float32(1 / f) for f in (2, 6, 24, 120))
_E6, _E7 = (np.float32(1 / f) for f in (720, 5040))


@njit
def _expm1(x):
    """``exp(x) - 1`` of ``x <= 0``."""
    series = fma(splat(_E7), x, splat(_E6))
    series = fma(series, x, splat(_E5))
    series = fma(series, x, splat(_E4))
    series = fma(series, x, splat(_E3))
    series = fma(series, x, splat(_E2))
    series = fma(series * x, x, x)
    return where_positive(x + splat(_SMALL), series, exp(x) - splat(_ONE))


# erfc(t) exp(t^2) = polynomial(1 / (1 + 0.3275911 t)), t >= 0; absolute error 1.5e-7
# (Abramowitz and Stegun, 7.1.26).
_P = np.float32(0.3275911)
_A1, _A2, _A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
_A4, _A5 = np.float32(-1.453152027), np.float32(1.061405429)
_ROOT_HALF = np.float32(np.sqrt(0.5))
_DENSITY = np.float32(1 / np.sqrt(2 * np.pi))


@njit
def _normal(x):
    """Distribution function and density of the standard normal distribution."""
    size = maximum(x, splat(_ZERO) - x)
    bell = exp(splat(_ZERO) - splat(_HALF) * x * x)
    t = splat(_ONE) / fma(splat(_P * _ROOT_HALF), size, splat(_ONE))
    tail = fma(splat(_A5), t, splat(_A4))
    tail = fma(tail, t, splat(_A3))
    tail = fma(tail, t, splat(_A2))
    tail = fma(tail, t, splat(_A1))
    tail = splat(_HALF) * tail * t * bell
    return where_positive(x, splat(_ONE) - tail, tail), splat(_DENSITY) * bell


_C1, _C3 = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)


@njit
def _gelu_tanh(x):
    """Value and derivative of GELU by its approximation with tanh."""
    square = x * x
    inner = splat(_C1) * x * fma(splat(_C3), square, splat(_ONE))
    slope = splat(_C1) * fma(splat(np.float32(3) * _C3), square, splat(_ONE))
    t = tanh(inner)
    half = splat(_HALF) * (splat(_ONE) + t)
    derivative = fma(splat(_HALF) * x * slope, splat(_ONE) - t * t, half)
    return x * half, derivative


@njit
def _value(code, slope, x):
    """The value for activations whose derivative is not kept, and of one register."""
    if code == TANH:
        return tanh(x)
    if code == RELU:
        return maximum(x, splat(_ZERO))
    if code == SIGMOID:
        return _sigmoid(x)
    if code == ELU:
        return where_positive(x, x, splat(slope) * _expm1(x))
    return where_positive(x, x, splat(slope) * x)


@njit
def _pair(code, slope, x):
    """Value and derivative."""
    if code == SILU:
        s = _sigmoid(x)
        return x * s, s * fma(x, splat(_ONE) - s, splat(_ONE))
    if code == GELU:
        share, density = _normal(x)
        return x * share, fma(x, density, share)
    if code == GELU_TANH:
        return _gelu_tanh(x)
    if code == ELU:
        power = _expm1(x)
        value = where_positive(x, x, splat(slope) * power)
        return value, where_positive(x, splat(_ONE), splat(slope) * (power + splat(_ONE)))
    return where_positive(x, x, splat(slope) * x), where_positive(x, splat(_ONE), splat(slope))


@njit(cache=True)
def activate(m, at, kept, size, code, slope):
    """Replace ``size`` elements at index ``at`` by their activation.

    Args:
        m: memory.
        at: index of the panel, a multiple of registers.
        kept: index of the panel that takes the derivative, or 0 where nobody wants it.
        size: elements.
        code: which activation.
        slope: its parameter.
    """
    if code == TANH:
        for i in range(at, at + size, LANES):
            store(m, i, tanh(load(m, i)))
    elif code == RELU:
        for i in range(at, at + size, LANES):
            store(m, i, maximum(load(m, i), splat(_ZERO)))
    elif kept != 0 or code >= SILU:
        for i in range(0, size, LANES):
            value, derivative = _pair(code, slope, load(m, at + i))
            store(m, at + i, value)
            if kept != 0:
                store(m, kept + i, derivative)
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
        slope: its parameter.
    """
    if kept != 0:
        for i in range(0, size, LANES):
            store(m, delta + i, load(m, delta + i) * load(m, kept + i))
    elif code == TANH:
        for i in range(0, size, LANES):
            value, gradient = load(m, y + i), load(m, delta + i)
            store(m, delta + i, fma(splat(_ZERO) - gradient * value, value, gradient))
    elif code == RELU:
        for i in range(0, size, LANES):
            zero = splat(_ZERO)
            store(m, delta + i, where_positive(load(m, y + i), load(m, delta + i), zero))
    elif code == SIGMOID:
        for i in range(0, size, LANES):
            value, gradient = load(m, y + i), load(m, delta + i)
            store(m, delta + i, gradient * value * (splat(_ONE) - value))
    elif code == ELU:
        for i in range(0, size, LANES):
            value, gradient = load(m, y + i), load(m, delta + i)
            below = gradient * (value + splat(slope))
            store(m, delta + i, where_positive(value, gradient, below))
    else:
        for i in range(0, size, LANES):
            value, gradient = load(m, y + i), load(m, delta + i)
            store(m, delta + i, where_positive(value, gradient, splat(slope) * gradient))
