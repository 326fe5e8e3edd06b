"""A method laid over a training of so many gradient steps: when it acts, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .method import METHODS, Method

__all__ = ["Course", "find_method"]


def find_method(method: Method | str) -> Method:
    """A method by its name, or itself.

    Raises:
        ValueError: no method has this name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


@dataclass(frozen=True)
class Course:
    """When the masks are updated, to which density, and how much is replaced.

    Attributes:
        method: the method.
        steps: gradient steps of the whole training.
        initial: density before the pruning phase.
        final: density after it.

    Raises:
        ValueError: steps below 1, or a density outside [0, 1].
    """

    method: Method
    steps: int
    initial: float
    final: float

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for density in (self.initial, self.final):
            if not 0 <= density <= 1:
                raise ValueError(f"density must be in [0, 1], got {density}")

    def is_due(self, count: int) -> bool:
        """Whether the masks are updated after gradient step ``count``, counted from 1."""
        start = math.ceil(self.method.start * self.steps)
        stop = max(1, start, math.ceil(self.method.stop * self.steps))
        within = max(1, start) <= count <= stop
        return within and ((count - start) % self.method.every == 0 or count == stop)

    def density(self, count: int) -> float:
        """The density after an update at a step."""
        return self.method.density(self._progress(count), self.initial, self.final)

    def replaced(self, count: int) -> float:
        """The share of the kept weights that an update at a step replaces."""
        return self.method.replaced(self._progress(count))

    def _progress(self, count: int) -> float:
        return min(1.0, count / self.steps)
