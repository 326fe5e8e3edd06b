"""A method: one choice on each of the four axes, and when it acts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_tickets.settings import above, at_least, check_fields, within

from .distributions import DISTRIBUTIONS
from .schedules import SCHEDULES
from .scores import DROP_SCORES, GROW_SCORES, NEEDS_GRADIENT

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """How a network becomes and stays sparse while it trains.

    Attributes:
        schedule: one of `SCHEDULES`.
        distribution: one of `DISTRIBUTIONS`.
        drop: one of `DROP_SCORES`.
        grow: one of `GROW_SCORES`.
        start: where in training the pruning phase begins, in [0, 1].
        stop: where it ends; from there on the mask is fixed.
        every: gradient steps between two updates of the mask.
        fraction: share of the kept weights that an update replaces where something grows; it falls
            to zero along a cosine until ``stop`` (Dettmers and Zettlemoyer 2019).
        shares: for the distribution ``by-layer``, how dense each layer is beside the others, input
            to head: of (100, 1, 1) the first stays dense while there is room.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown name, a number out of range, shares without ``by-layer`` or the
            reverse, ``stop`` before ``start``, or a density that would rise while nothing grows.
    """

    schedule: str = "cubic"
    distribution: str = "erk"
    drop: str = "magnitude"
    grow: str = "none"
    start: float = 0.2
    stop: float = 0.8
    every: int = 1000
    fraction: float = 0.3
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        share = within(0, 1)
        ranges = dict.fromkeys(("start", "stop", "fraction"), share)
        check_fields(self, ranges | {"every": at_least(1), "shares": above(0)})
        for name, known in (
            ("schedule", SCHEDULES),
            ("distribution", DISTRIBUTIONS),
            ("drop", DROP_SCORES),
            ("grow", GROW_SCORES),
        ):
            if getattr(self, name) not in known:
                words = ", ".join(known)
                raise ValueError(f"{name} must be one of {words}, got {getattr(self, name)!r}")
        if (self.distribution == "by-layer") != bool(self.shares):
            raise ValueError(
                "shares must be given where the distribution is by-layer, and nowhere else, got "
                f"{self.shares} for {self.distribution}"
            )
        if self.stop < self.start:
            raise ValueError(f"stop must be at least start = {self.start}, got {self.stop}")
        if self.schedule == "cyclic" and self.grow == "none":
            raise ValueError(
                "grow must be random or gradient where the schedule is cyclic, got 'none': the "
                "density rises between two cycles"
            )

    @property
    def needs_gradient(self) -> bool:
        """Whether an update reads a dense gradient."""
        return not NEEDS_GRADIENT.isdisjoint((self.drop, self.grow))

    def density(self, progress: float, initial: float, final: float) -> float:
        """The density after an update at a point of training.

        Args:
            progress: share of training that is done, in [0, 1].
            initial: density before the phase.
            final: density after it.
        """
        if progress < self.start and self.schedule != "constant":
            return initial
        length = self.stop - self.start
        way = min(1.0, (progress - self.start) / length) if length else 1.0
        return initial + (final - initial) * SCHEDULES[self.schedule](way)

    def replaced(self, progress: float) -> float:
        """The share of the kept weights that an update replaces: zero where nothing grows."""
        if self.grow == "none" or progress >= self.stop:
            return 0.0
        return self.fraction * (1 + math.cos(math.pi * progress / self.stop)) / 2


METHODS: dict[str, Method] = {
    "gradual": Method(),
    "one-shot": Method("one-shot", start=0.5, stop=0.5),
    "snip": Method(
        schedule="one-shot", drop="saliency", distribution="global", start=0.0, stop=0.0
    ),
    "static": Method("constant", drop="random", start=0.0, stop=0.0),
    "static-uniform": Method("constant", "uniform", "random", start=0.0, stop=0.0),
    "set": Method("constant", grow="random", start=0.0, every=5000),
    "rigl": Method("constant", grow="gradient", start=0.0, every=5000),
}
"""Published methods by name: gradual magnitude pruning (Zhu and Gupta 2017; Graesser et al. 2022),
one-shot, SNIP (Lee et al. 2019), static random masks under ERK or uniform, SET (Mocanu et al. 2018)
and RigL (Evci et al. 2020), the last two from a random mask."""
