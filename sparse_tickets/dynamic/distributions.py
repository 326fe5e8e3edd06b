"""Where: how many weights each layer keeps of the number kept in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor

from sparse_tickets.prune import erk_counts

__all__ = ["DISTRIBUTIONS", "Layer", "layer_counts"]

Layer = tuple[int, int, int]
"""Offset, outputs and inputs of a layer's weights in a row, as in `Arena.prunable_layers`."""

Distribution = Callable[[Sequence[Layer], int], list[int] | None]


def globally(layers: Sequence[Layer], k: int) -> None:
    """All layers compete."""
    return None


def uniform(layers: Sequence[Layer], k: int) -> list[int]:
    """Every layer keeps the same share; largest remainders round up, ties: the lowest layer."""
    sizes = [out * inp for _, out, inp in layers]
    ideal = [Fraction(k * size, max(1, sum(sizes))) for size in sizes]
    counts = [floor(share) for share in ideal]
    by_remainder = sorted(range(len(sizes)), key=lambda layer: counts[layer] - ideal[layer])
    for layer in by_remainder[: k - sum(counts)]:
        counts[layer] += 1
    return counts


DISTRIBUTIONS: dict[str, Distribution] = {
    "global": globally,
    "uniform": uniform,
    "erk": erk_counts,
}
"""Every distribution by its name; None where layers compete."""


def layer_counts(
    distribution: str, layers: Sequence[Layer], k: int, available: Sequence[int] | None = None
) -> list[int] | None:
    """Weights that each layer keeps, k in all; None where the layers compete.

    Args:
        distribution: one of `DISTRIBUTIONS`.
        layers: offset, outputs and inputs of each.
        k: weights to keep in all.
        available: the most that each layer can keep, where nothing grows; what is too many for one
            goes to those with most to spare.

    Raises:
        ValueError: an unknown distribution, or k is negative or more than there are.
    """
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
    most = [out * inp for _, out, inp in layers] if available is None else list(available)
    if not 0 <= k <= sum(most):
        raise ValueError(f"k must be in [0, {sum(most)}], got {k}")
    counts = DISTRIBUTIONS[distribution](layers, k)
    if counts is None:
        return None
    counts = [min(count, limit) for count, limit in zip(counts, most, strict=True)]
    while missing := k - sum(counts):
        room = [limit - count for count, limit in zip(counts, most, strict=True)]
        widest = room.index(max(room))
        counts[widest] += min(missing, max(1, room[widest] // 2))
    return counts
