"""What stands between a network's layers, by name: one entry each, and its formulas.

A formula is an activation's value ``f(x)``, or ``f_gradient(dy, known)``: the gradient by x, of
that by the output and of the output y, or of x where no y tells the slope
(`TorchActivation.by_output`). As they stand here formulas compute in torch; Numba
(`activations_cpu`) and Triton (`activations_gpu`) compile the same text, and choose by a branch.
What has none is refused by name, and computes NaN or does not compile where nobody asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, exp
from torch.nn import functional


class TorchActivation(NamedTuple):
    """One activation in torch's terms.

    Attributes:
        function: of a layer's products; autograd knows its derivative.
        into: ``into(x, y)`` writes its value at x to y.
        derive: ``derive(dy, known, dx)`` writes the gradient by x to dx. Neither is there of what
            the kernels do not have.
        by_output: whether ``known`` is y; else it is x, which a backward pass must have kept or
            computes again.
    """

    function: Callable[[Tensor], Tensor]
    into: Any = None
    derive: Any = None
    by_output: bool = True


_aten = torch.ops.aten

ACTIVATIONS = {
    "tanh": TorchActivation(
        torch.tanh,
        lambda x, y: torch.tanh(x, out=y),
        lambda dy, y, dx: _aten.tanh_backward.grad_input(dy, y, grad_input=dx),
    ),
    "relu": TorchActivation(
        torch.relu,
        lambda x, y: torch.clamp_min(x, 0, out=y),
        lambda dy, y, dx: _aten.threshold_backward.grad_input(dy, y, 0, grad_input=dx),
    ),
    "elu": TorchActivation(
        functional.elu,
        lambda x, y: _aten.elu.out(x, out=y),
        lambda dy, y, dx: _aten.elu_backward.grad_input(dy, 1, 1, 1, True, y, grad_input=dx),
    ),
    "silu": TorchActivation(
        functional.silu,
        lambda x, y: _aten.silu.out(x, out=y),
        lambda dy, x, dx: _aten.silu_backward.grad_input(dy, x, grad_input=dx),
        by_output=False,
    ),
    "gelu": TorchActivation(
        functional.gelu,
        # On a CPU its own `out` leaves a strided y unwritten.
        lambda x, y: y.copy_(functional.gelu(x)),
        lambda dy, x, dx: _aten.gelu_backward.grad_input(dy, x, grad_input=dx),
        by_output=False,
    ),
}

KNOWN = tuple(ACTIVATIONS)
"""Those that the kernels have."""

LAYERNORM = "layernorm-"
"""Before a name: a sample's units are brought to mean 0 and variance 1 first (Ba et al., 2016)."""


def _after_layernorm(function: Callable[[Tensor], Tensor]) -> TorchActivation:
    # Without factors and offsets of its own: the rows of an arena hold weights and biases alone.
    return TorchActivation(lambda x: function(functional.layer_norm(x, x.shape[-1:])))


ACTIVATIONS |= {LAYERNORM + name: _after_layernorm(ACTIVATIONS[name].function) for name in KNOWN}


def fma(a, b, c):
    return a * b + c


def maximum(x, low):
    return x.clamp(min=low)


def where_positive(x, a, b):
    return torch.where(x <= 0.0, b, a)


def relu(x):
    return maximum(x, 0.0)


def relu_gradient(dy, y):
    return where_positive(y, dy, 0.0)


def tanh_gradient(dy, y):
    return fma(0.0 - dy * y, y, dy)


def expm1(x):
    """``exp(x) - 1`` of ``x <= 0``: of a small one by its series, where the difference cancels."""
    series = fma(1.0 / 5040.0, x, 1.0 / 720.0)
    series = fma(series, x, 1.0 / 120.0)
    series = fma(series, x, 1.0 / 24.0)
    series = fma(series, x, 1.0 / 6.0)
    series = fma(series, x, 0.5)
    series = fma(series * x, x, x)
    return where_positive(x + 0.35, series, exp(x) - 1.0)


def elu(x, alpha):
    return where_positive(x, x, alpha * expm1(x))


def elu_gradient(dy, y, alpha):
    return where_positive(y, dy, dy * (y + alpha))


def sigmoid(x):
    return 1.0 / (1.0 + exp(0.0 - x))


def silu(x):
    return x * sigmoid(x)


def silu_gradient(dy, x):
    share = sigmoid(x)
    return dy * (share * fma(x, 1.0 - share, 1.0))


def normal(x):
    """Distribution function, within 7.5e-8, and density of the standard normal distribution.

    Abramowitz and Stegun, 26.2.17.
    """
    density = 0.3989422804014327 * exp(-0.5 * x * x)
    t = 1.0 / fma(0.2316419, maximum(x, 0.0 - x), 1.0)
    tail = fma(1.330274429, t, -1.821255978)
    tail = fma(tail, t, 1.781477937)
    tail = fma(tail, t, -0.356563782)
    tail = fma(tail, t, 0.319381530) * t * density
    return where_positive(x, 1.0 - tail, tail), density


def gelu(x):
    share, _ = normal(x)
    return x * share


def gelu_gradient(dy, x):
    share, density = normal(x)
    return dy * fma(x, density, share)


FORMULAS = (
    relu,
    relu_gradient,
    tanh_gradient,
    expm1,
    elu,
    elu_gradient,
    sigmoid,
    silu,
    silu_gradient,
    normal,
    gelu,
    gelu_gradient,
)
"""For `formulas.compile_formulas`, beside ``exp``, ``fma``, ``maximum`` and ``where_positive``."""
