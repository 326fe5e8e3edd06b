"""What Adam must do at least: every entry of a row once, masked or packed.

A masked row is read and written whole, pruned entries included, and its mask with it; of a packed
row give its length k, and no mask.
"""

from __future__ import annotations

from ..cost import Cost

__all__ = ["adam"]


def adam(
    tickets: int, size: int, prunable: int = 0, *, partials: bool = False, itemsize: int = 4
) -> Cost:
    """Read weight, gradient, two moments and the mask; write weight and moments.

    Per entry 2 operations for the norm (none if ``partials`` bring it), 1 for clipping, 3 for the
    first moment, 4 for the second, 6 for the step. The gradient counts once: a row can stay on
    the chip between its norm and its update.

    Args:
        tickets: P.
        size: T, entries of a row.
        prunable: N, entries of the mask; 0 without one.
        partials: the norm comes from elsewhere.
        itemsize: bytes of a number.
    """
    flops = 14 if partials else 16
    return Cost(tickets * size * flops, tickets * (7 * itemsize * size + prunable))
