"""What pruning must do at least: read scores and mask once, write a mask; it computes nothing.

A selection of the k-th largest compares and counts integers: no floating-point operations.
"""

from __future__ import annotations

from ..cost import Cost

__all__ = ["prune"]


def prune(tickets: int, prunable: int, *, itemsize: int = 4) -> Cost:
    """Scores and mask in, counts in, mask out.

    Args:
        tickets: P.
        prunable: N, scores of a ticket.
        itemsize: bytes of a score.
    """
    return Cost(0, tickets * (prunable * (itemsize + 2) + 8))
