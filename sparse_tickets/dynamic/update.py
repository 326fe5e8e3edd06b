"""One update of a population's masks: drop, then grow, exactly k weights a ticket afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_tickets.kernels.errors import check_dtype, check_shape
from sparse_tickets.kernels.prune import prune

from .distributions import Layer

__all__ = ["update_mask"]


def update_mask(
    mask: Tensor,
    drop: Tensor,
    grow: Tensor | None,
    k: int,
    *,
    replaced: float,
    layers: Sequence[Layer],
    counts: Sequence[int] | None,
) -> Tensor:
    """Drop the weights of smallest score and grow others where their score is largest.

    With something to grow every ticket keeps exactly k afterwards, or exactly its count in each
    layer; without, ``min(k, kept)``. Nothing is computed across tickets; ties keep and grow the
    lowest position. What is dropped may be grown again at once.

    Args:
        mask: ``[P, N]`` bool.
        drop: ``[P, N]`` scores; of the kept weights the largest stay.
        grow: ``[P, N]`` scores of what is grown, or None.
        k: weights to keep.
        replaced: share of the weights kept that are dropped for others, in [0, 1].
        layers: offset, outputs and inputs of each layer in a row.
        counts: weights of each layer, k in all; None where the layers compete.

    Returns:
        ``[P, N]`` bool.

    Raises:
        ValueError: a wrong shape, a NaN score, k or a count that does not fit, or a share outside
            [0, 1].
        TypeError: the mask is not bool.
    """
    check_dtype("mask", mask, torch.bool)
    for name, scores in (("drop", drop), ("grow", grow)):
        if scores is not None:
            check_shape(name, scores, tuple(mask.shape))
    if not 0 <= replaced <= 1:
        raise ValueError(f"replaced must be in [0, 1], got {replaced}")
    if counts is None:
        return _update(mask, drop, grow, k, replaced)
    if len(counts) != len(layers) or sum(counts) != k:
        raise ValueError(
            f"counts must be {len(layers)} numbers that sum to k = {k}, got {list(counts)}"
        )
    updated = torch.empty_like(mask)
    for (offset, out, inp), count in zip(layers, counts, strict=True):
        at = slice(offset, offset + out * inp)
        growing = None if grow is None else grow[:, at]
        updated[:, at] = _update(mask[:, at], drop[:, at], growing, count, replaced)
    return updated


def _update(mask: Tensor, drop: Tensor, grow: Tensor | None, k: int, replaced: float) -> Tensor:
    mask, drop = mask.contiguous(), _comparable(drop)
    if grow is None:
        return prune(drop, mask, k)
    stay = mask.count_nonzero(1).clamp(max=k)
    stay -= (stay * replaced + 0.5).floor().long()
    kept = prune(drop, mask, stay)
    return kept | prune(_comparable(grow), ~kept, k - stay)


def _comparable(scores: Tensor) -> Tensor:
    """In a dtype that `prune` ranks, and in which nothing becomes equal."""
    return (scores if scores.dtype is torch.float64 else scores.float()).contiguous()
