"""What a tracker is shown of a sweep: curves while tickets train, levels once they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_tickets.algos.evaluation import due
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.unit import Unit
from sparse_tickets.tracking import Tracker

__all__ = ["Shown"]

_Origin = tuple[str, str, str, int]
_OF_LEVELS = ("return_final", "return_final_sampled", "return_initial", "effective_density")


class Shown:
    """Shows a sweep's returns, condition by condition and seed by seed.

    A tracker that fails is left alone from then on, with a warning: training goes on.

    Args:
        spec: the sweep.
        tracker: where; None shows nothing.
    """

    def __init__(self, spec: Sweep, tracker: Tracker | None) -> None:
        self._spec, self._tracker = spec, tracker

    @property
    def wanted(self) -> bool:
        """Whether there is somebody to show it to."""
        return self._tracker is not None

    def point(
        self, unit: Unit, tracks: Sequence[Track], iteration: int, greedy: Tensor, sampled: Tensor
    ) -> None:
        """One point of the curves of tickets in training, ``[P]`` each."""
        if not self.wanted:
            return
        for track, *returns in zip(tracks, greedy.tolist(), sampled.tolist(), strict=True):
            origin = unit.algo, track.condition, track.controls, track.seed
            self._point(origin, unit.level, iteration, *returns)

    def level(self, rows: Sequence[Mapping[str, Any]], curves: bool = False) -> None:
        """The rows of a finished unit; with their curves where these were not shown in training."""
        if not self.wanted:
            return
        spec = self._spec
        for row in rows:
            origin = row["algo"], row["condition"], row["controls"], row["seed"]
            if curves:
                algo = row["algo"]
                first = 0 if row["level"] == 0 else spec.rewind_iteration(algo)
                at = due(spec.evaluation.points, first, spec.budget(algo).iterations)
                # Of what could not be trained there is no curve.
                points = zip(at, row["curve"], row["curve_sampled"], strict=False)
                for iteration, greedy, sampled in points:
                    self._point(origin, row["level"], iteration, greedy, sampled)
            known = {name: row[name] for name in _OF_LEVELS if row[name] is not None}
            self._log(origin, known, row["level"])

    def _point(
        self, origin: _Origin, level: int, iteration: int, greedy: float, sampled: float
    ) -> None:
        values = {
            f"curve level {level:02d}": greedy,
            f"sampled curve level {level:02d}": sampled,
        }
        self._log(origin, values, (iteration + 1) * self._spec.budget(origin[0]).batch)

    def _log(self, origin: _Origin, values: Mapping[str, float], step: int) -> None:
        if self._tracker is None:
            return
        algo, condition, controls, seed = origin
        named = {f"{name}/seed {seed:02d}": value for name, value in values.items()}
        try:
            self._tracker.log(f"{algo} {condition} {controls}", named, step)
        except Exception as error:
            warnings.warn(f"tracking failed and is given up: {error!r}", stacklevel=2)
            self._tracker = None
