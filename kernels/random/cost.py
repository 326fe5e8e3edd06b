"""What random numbers must do at least: Philox itself is integer arithmetic, and no operation here.

Ten rounds of two 32-bit products for every four words bound a draw before memory does; a roofline
of floating-point rates does not show it.
"""

from __future__ import annotations

from ..cost import Cost

__all__ = ["bits", "categorical", "integers", "normal", "permutation", "uniform"]


def bits(tickets: int, n: int) -> Cost:
    """A key in, ``n`` words of 8 bytes out.

    Args:
        tickets: P.
        n: words per ticket.
    """
    return Cost(0, tickets * (8 + 8 * n))


def uniform(tickets: int, n: int) -> Cost:
    """A multiplication and 4 bytes a number."""
    return Cost(tickets * n, tickets * (8 + 4 * n))


def normal(tickets: int, n: int) -> Cost:
    """Box-Muller in float64, 11 operations a pair, and 4 bytes a number."""
    return Cost(tickets * n * 5.5, tickets * (8 + 4 * n))


def permutation(tickets: int, n: int) -> Cost:
    """8 bytes an index; the sort of its words may stay on the chip."""
    return bits(tickets, n)


def integers(tickets: int, n: int) -> Cost:
    """8 bytes a number."""
    return bits(tickets, n)


def categorical(rows: int, actions: int) -> Cost:
    """Probabilities and a uniform in, an index out; two running sums and a product.

    Args:
        rows: draws.
        actions: A, probabilities a draw.
    """
    return Cost(rows * (2 * actions + 1), rows * (4 * actions + 4 + 8))
