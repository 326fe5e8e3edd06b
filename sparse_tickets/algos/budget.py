"""How a training's steps are divided into iterations, whatever the algorithm."""

from __future__ import annotations

__all__ = ["IterationBudget"]


class IterationBudget:
    """A `TrainingBudget` (algorithm.py) from settings of these names."""

    steps: int
    copies: int
    horizon: int
    learning_rate: float

    def check_budget(self, prefix: str) -> None:
        """Raise ``ValueError``, with the settings' prefix, unless there is a whole iteration."""
        if self.steps < self.batch:
            raise ValueError(
                f"{prefix}steps must be at least copies * horizon = {self.batch}, got {self.steps}"
            )

    @property
    def batch(self) -> int:
        """Steps per iteration."""
        return self.copies * self.horizon

    @property
    def iterations(self) -> int:
        """Iterations of acting and updates."""
        return self.steps // self.batch

    def learning_rate_at(self, iteration: int) -> float:
        """Linear from `learning_rate` to zero over the whole budget."""
        return self.learning_rate * (1.0 - iteration / self.iterations)
