"""Activations in Numba, on spans of a panel; see `activations`."""

from __future__ import annotations

import numpy as np

from .compiling import njit
from .vector import LANES, fma, load, maximum, splat, store, tanh

__all__ = ["activate", "code_of", "deactivate"]

TANH, RELU = range(2)
_CODES = {"tanh": TANH, "relu": RELU}
_ZERO = np.float32(0.0)


def code_of(name: str) -> int:
    """The number that kernels know an activation by.

    Raises:
        ValueError: they have none of this name.
    """
    if name not in _CODES:
        raise ValueError(f"activation must be one of {', '.join(_CODES)} on a CPU, got {name!r}")
    return _CODES[name]


@njit(cache=True)
def activate(x, begin, end, code):
    """In place, on ``x[begin:end]``: whole vectors of LANES."""
    if code == RELU:
        for i in range(begin, end, LANES):
            store(x, i, maximum(load(x, i), splat(_ZERO)))
    else:
        for i in range(begin, end, LANES):
            store(x, i, tanh(load(x, i)))


@njit(cache=True)
def deactivate(space, delta, y, count, code):
    """Multiply the gradient at ``delta`` by the derivative, which the output at ``y`` tells."""
    if code == RELU:
        for c in range(count):
            # Read first: a conditional load would be a branch per element.
            gradient = space[delta + c]
            space[delta + c] = gradient if space[y + c] > _ZERO else _ZERO
    else:
        for c in range(0, count, LANES):
            value, gradient = load(space, y + c), load(space, delta + c)
            store(space, delta + c, fma(splat(_ZERO) - gradient * value, value, gradient))
