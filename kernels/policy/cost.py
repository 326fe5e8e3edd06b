"""What one network must do at least: its nonzeros over the batch, its tensors once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..cost import Cost

__all__ = ["backward", "forward"]


def forward(widths: Sequence[int], nonzeros: int, batch: int) -> Cost:
    """One multiply-add for each nonzero and row; input, weights and output once.

    Args:
        widths: features of the input and of each layer.
        nonzeros: weights that are left.
        batch: rows.
    """
    moved = batch * (widths[0] + widths[-1]) + nonzeros + sum(widths[1:])
    return Cost(2 * nonzeros * batch, 4 * moved)


def backward(widths: Sequence[int], nonzeros: int, batch: int) -> Cost:
    """The gradients of all weights, written dense, and of the input; arguments as `forward`."""
    weights = sum(out * inp for inp, out in itertools.pairwise(widths))
    moved = 2 * batch * (widths[0] + widths[-1]) + nonzeros + weights + sum(widths[1:])
    return Cost(4 * nonzeros * batch, 4 * moved)
