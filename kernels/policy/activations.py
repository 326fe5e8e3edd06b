"""Which of torch's modules the kernels know as activations, and by what number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..activations_cpu import ELU, GELU, GELU_TANH, LEAKY, RELU, SIGMOID, SILU, TANH


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
