"""Where: how many weights each layer keeps of the number kept in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from sparse_tickets.prune import erk_counts, share_out

__all__ = ["DISTRIBUTIONS", "Layer", "layer_counts"]

Layer = tuple[int, int, int]
"""Offset, outputs and inputs of a layer's weights in a row, as in `Arena.prunable_layers`."""

Distribution = Callable[[Sequence[Layer], int, Sequence[float]], list[int] | None]


def globally(layers: Sequence[Layer], k: int, shares: Sequence[float]) -> None:
    """All layers compete."""
    return None


def uniform(layers: Sequence[Layer], k: int, shares: Sequence[float]) -> list[int]:
    """Every layer keeps the same share; largest remainders round up, ties: the lowest layer."""
    return by_layer(layers, k, [1.0] * len(layers))


def erk(layers: Sequence[Layer], k: int, shares: Sequence[float]) -> list[int]:
    """A layer's density is proportional to ``(in + out) / (in * out)``, as `erk_counts` has it."""
    return erk_counts(layers, k)


def by_layer(layers: Sequence[Layer], k: int, shares: Sequence[float]) -> list[int]:
    """A layer's density is proportional to its number in ``shares``, and 1 at most.

    Raises:
        ValueError: there is not one for each layer.
    """
    if len(shares) != len(layers):
        raise ValueError(
            f"shares must be a number for each of {len(layers)} layers, got {len(shares)}"
        )
    sizes = [out * inp for _, out, inp in layers]
    return share_out(sizes, [Fraction(s) * n for s, n in zip(shares, sizes, strict=True)], k)


DISTRIBUTIONS: dict[str, Distribution] = {
    "global": globally,
    "uniform": uniform,
    "erk": erk,
    "by-layer": by_layer,
}
"""Every distribution by its name; None where layers compete."""


def layer_counts(
    distribution: str,
    layers: Sequence[Layer],
    k: int,
    available: Sequence[int] | None = None,
    shares: Sequence[float] = (),
) -> list[int] | None:
    """Weights that each layer keeps, k in all; None where the layers compete.

    Args:
        distribution: one of `DISTRIBUTIONS`.
        layers: offset, outputs and inputs of each.
        k: weights to keep in all.
        available: the most that each layer can keep, where nothing grows; what is too many for one
            goes to those with most to spare.
        shares: of each layer, how dense it is beside the others; ``by-layer`` reads them.

    Raises:
        ValueError: an unknown distribution, k is negative or more than there are, or shares that
            are read and not of these layers.
    """
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
    most = [out * inp for _, out, inp in layers] if available is None else list(available)
    if not 0 <= k <= sum(most):
        raise ValueError(f"k must be in [0, {sum(most)}], got {k}")
    counts = DISTRIBUTIONS[distribution](layers, k, shares)
    if counts is None:
        return None
    counts = [min(count, limit) for count, limit in zip(counts, most, strict=True)]
    while missing := k - sum(counts):
        room = [limit - count for count, limit in zip(counts, most, strict=True)]
        widest = room.index(max(room))
        counts[widest] += min(missing, max(1, room[widest] // 2))
    return counts
