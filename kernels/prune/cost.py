"""What pruning must do at least: read scores and mask once, write a mask; it computes nothing.

A selection of the k-th largest compares and counts integers: no floating-point operations.
"""

from __future__ import annotations

from ..cost import Cost
from ..update import cost as update

__all__ = ["prune", "prune_rewind"]


def prune(tickets: int, prunable: int, *, itemsize: int = 4) -> Cost:
    """Scores and mask in, counts in, mask out.

    Args:
        tickets: P.
        prunable: N, scores of a ticket.
        itemsize: bytes of a score.
    """
    return Cost(0, tickets * (prunable * (itemsize + 2) + 8))


def prune_rewind(
    tickets: int, size: int, prunable: int, *, moments: bool = False, itemsize: int = 4
) -> Cost:
    """Pruning, and rewinding without reading the mask once more.

    Args:
        tickets: P.
        size: T, entries of a row of weights.
        prunable: N, scores of a ticket.
        moments: rewind to moments other than zero.
        itemsize: bytes of a number.
    """
    rewinding = update.rewind(tickets, size, moments=moments, itemsize=itemsize)
    return prune(tickets, prunable, itemsize=itemsize).plus(rewinding)
