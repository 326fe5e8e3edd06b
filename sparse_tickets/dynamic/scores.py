"""What goes and what comes: scores of weights, of which the largest stay or are grown.

Each sees a whole population and scores a ticket by its own row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.kernels.random import Stream, uniform

__all__ = ["DROP_SCORES", "GROW_SCORES", "NEEDS_GRADIENT", "Moment", "Score"]


@dataclass(frozen=True)
class Moment:
    """What a score may look at.

    Attributes:
        weight: ``[P, N]``, zero off the mask.
        initial: ``[P, N]``, the weights before training.
        gradient: ``[P, N]`` of the loss, dense: by pruned weights too; None if no score needs it.
        key: ``[P]`` int64, a Philox key per ticket.
        step: number of the update, which random scores are drawn by.
    """

    weight: Tensor
    initial: Tensor
    gradient: Tensor | None
    key: Tensor
    step: int

    def draw(self, purpose: int) -> Tensor:
        """Uniform random scores ``[P, N]``."""
        size = self.weight.shape[1]
        return uniform(self.key, size, stream=Stream.MASK, step=2 * self.step + purpose)


Score = Callable[[Moment], Tensor]


def magnitude(moment: Moment) -> Tensor:
    """|w|."""
    return moment.weight.abs()


def movement(moment: Moment) -> Tensor:
    """|w - w0|: how far training moved the weight (Zhou et al. 2019)."""
    return (moment.weight - moment.initial).abs()


def signed(moment: Moment) -> Tensor:
    """|w| where training kept the sign, -|w| where it flipped (as Bellec et al. 2018 drop)."""
    flipped = moment.weight * moment.initial < 0
    return torch.where(flipped, -moment.weight.abs(), moment.weight.abs())


def saliency(moment: Moment) -> Tensor:
    """|w0 g|: what removing the weight does to the loss, to first order (SNIP, Lee et al. 2019)."""
    return (moment.initial * _gradient(moment)).abs()


def drop_random(moment: Moment) -> Tensor:
    """Any weight is as good as any other."""
    return moment.draw(0)


def grow_random(moment: Moment) -> Tensor:
    """Any place is as good as any other (SET, Mocanu et al. 2018)."""
    return moment.draw(1)


def gradient(moment: Moment) -> Tensor:
    """|g|: where a weight would move fastest (RigL, Evci et al. 2020)."""
    return _gradient(moment).abs()


def _gradient(moment: Moment) -> Tensor:
    if moment.gradient is None:
        raise ValueError("gradient must be given for this score, got None")
    return moment.gradient


DROP_SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "movement": movement,
    "signed": signed,
    "saliency": saliency,
    "random": drop_random,
}
"""By name; the smallest are dropped."""

GROW_SCORES: dict[str, Score | None] = {
    "none": None,
    "random": grow_random,
    "gradient": gradient,
}
"""By name; the largest are grown."""

NEEDS_GRADIENT = frozenset({"saliency", "gradient"})
"""Scores that read a dense gradient."""
