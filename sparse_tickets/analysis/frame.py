"""Reads tracks out of a results frame: one matrix of seeds by levels per algorithm and condition.

The frame has one row per trained cell. Level 0 is trained once per (algorithm, seed) and shared:
its rows carry the condition "dense" and the controls "shared", and every track begins with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from sparse_tickets.algos.registry import ALGORITHMS

from .statistics import normalised_return

__all__ = [
    "CONDITIONS",
    "DENSE",
    "METRICS",
    "SHOWN_METRICS",
    "UNTRAINED",
    "Tracks",
    "algorithms",
    "check",
    "conditions",
    "controls_kinds",
    "environments",
    "tracks",
]

DENSE = "dense"
CONDITIONS = (
    "mask/weights",
    "mask/permuted",
    "permuted/permuted",
    "random/re-init",
    "mask/re-init",
    "permuted/re-init",
    "erk-random/re-init",
)
METRICS = {
    "return_final": "final return",
    "return_final_sampled": "final return, sampled actions",
    "return_auc": "area under the learning curve",
    "return_best": "return of the best checkpoint",
    "return_initial": "return before training",
    "return_initial_sampled": "return before training, sampled actions",
}
"""The returns of a cell, greedy unless said otherwise, with their names in figures."""
SHOWN_METRICS = ("return_final", "return_final_sampled", "return_auc", "return_initial")
"""Shown side by side: a final return alone hides from where, and how fast, it was reached."""
UNTRAINED = ("return_initial", "return_initial_sampled")
"""Of weights no one has trained, dense ones too: there is no dense return to keep."""

_KINDS = ("own", "ticket")
# These draw nothing from another track, so both kinds of controls mean the same cells by them.
_SAME_IN_BOTH_KINDS = ("mask/weights", "random/re-init", "erk-random/re-init")
_COLUMNS = (
    "env",
    "algo",
    "condition",
    "controls",
    "seed",
    "level",
    "density",
    "effective_density",
    "random_return",
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tracks:
    """The tracks of one condition: row s of every matrix is ``seeds[s]``, column k is level k.

    Attributes:
        env: Environment name.
        algo: Algorithm name.
        condition: One of :data:`CONDITIONS`, a registered one, or :data:`DENSE`.
        controls: "own" or "ticket".
        source: The controls its cells carry: another kind's where they are the same in both.
        seeds: ``[seeds]`` in increasing order.
        values: ``[seeds, levels]`` of the metric; NaN where a cell is missing or not finite.
        diverged: ``[seeds, levels]`` bool, cells whose training has no result.
        density: ``[levels]``, NaN at a level without cells.
        effective_density: ``[seeds, levels]``.
        random: Mean return of the random policy; NaN where unknown.
        dense_median: Median metric of all the algorithm's dense policies; NaN where there is none,
            or where the metric is of untrained ones.
    """

    env: str
    algo: str
    condition: str
    controls: str
    source: str
    seeds: NDArray[np.int64]
    values: Array
    diverged: NDArray[np.bool_]
    density: Array
    effective_density: Array
    random: float
    dense_median: float

    @property
    def normalised(self) -> Array | None:
        """``values`` with random at 0 and dense at 1; None where dense does not beat random."""
        if not self.dense_median > self.random:
            return None
        return normalised_return(self.values, self.random, self.dense_median)

    @property
    def judged(self) -> Array | None:
        """``normalised`` with what diverged below everything, so that it counts as degraded."""
        if self.normalised is None:
            return None
        return np.where(self.diverged, -np.inf, self.normalised)


def check(frame: pl.DataFrame, metric: str = "return_final", *, one_env: bool = False) -> None:
    """Raise ``ValueError`` unless ``frame`` is a results frame that holds ``metric``.

    Args:
        frame: The results, one row per trained cell.
        metric: One of :data:`METRICS`.
        one_env: Whether a second environment is an error too.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    missing = [name for name in (*_COLUMNS, metric) if name not in frame.columns]
    if missing:
        raise ValueError(f"frame must have the columns {', '.join(missing)}, got {frame.columns}")
    if frame.is_empty():
        raise ValueError("frame must hold at least one trained cell, got none")
    kinds = set(frame["controls"].unique()) - {"shared", *_KINDS}
    if kinds:
        raise ValueError(f"controls must be own, ticket or shared, got {sorted(kinds)}")
    cell = ["env", "algo", "condition", "controls", "seed", "level"]
    twice = frame.select(cell).filter(pl.struct(cell).is_duplicated())
    if not twice.is_empty():
        raise ValueError(f"frame must hold each cell once, got several of {twice.row(0)}")
    names = environments(frame)
    if one_env and len(names) > 1:
        raise ValueError(f"frame must hold one env, filter it first, got {', '.join(names)}")


def environments(frame: pl.DataFrame) -> list[str]:
    """The environments of the frame, sorted."""
    return sorted(frame["env"].unique())


def algorithms(frame: pl.DataFrame) -> list[str]:
    """The algorithms of the frame in the registry's order, then any other by name."""
    known, found = list(ALGORITHMS), set(frame["algo"].unique())
    return [*(name for name in known if name in found), *sorted(found.difference(known))]


def controls_kinds(frame: pl.DataFrame) -> list[str]:
    """The kinds of controls that were run; "own" if there is nothing beyond level 0."""
    pruned = frame.filter(pl.col("level") > 0)
    telling = pruned.filter(~pl.col("condition").is_in(_SAME_IN_BOTH_KINDS))
    kinds = set((pruned if telling.is_empty() else telling)["controls"].unique())
    return [kind for kind in _KINDS if kind in kinds] or ["own"]


def conditions(frame: pl.DataFrame, env: str, algo: str, controls: str) -> list[str]:
    """The conditions with tracks under these controls: ours in a fixed order, then a user's."""
    others = sorted(set(frame["condition"].unique()) - {DENSE, *CONDITIONS})
    return [
        name
        for name in (*CONDITIONS, *others)
        if not _cells(frame, env, algo, name, controls).is_empty()
    ]


def tracks(
    frame: pl.DataFrame,
    env: str,
    algo: str,
    condition: str,
    controls: str = "own",
    metric: str = "return_final",
) -> Tracks:
    """Collect one condition's tracks, each beginning with its seed's dense level 0.

    mask/weights and the random masks are the same cells under both kinds of controls: where the
    frame holds them under one kind only, they serve both.

    Args:
        frame: The results frame, already passed through :func:`check`.
        env: Environment name.
        algo: Algorithm name.
        condition: One of :data:`CONDITIONS`, a registered one, or :data:`DENSE` for level 0 alone.
        controls: "own" or "ticket".
        metric: One of :data:`METRICS`.

    Raises:
        ValueError: The frame holds no cell of the condition.
    """
    here = frame.filter((pl.col("env") == env) & (pl.col("algo") == algo))
    dense = here.filter(pl.col("level") == 0)
    pruned = _cells(frame, env, algo, condition, controls)
    own = dense if condition == DENSE else pruned
    if own.is_empty():
        raise ValueError(f"frame must hold {condition} cells of {algo} on {env}, got none")

    seeds = np.array(sorted(own["seed"].unique()), dtype=np.int64)
    cells = pl.concat([dense.filter(pl.col("seed").is_in(seeds.tolist())), pruned])
    row = np.searchsorted(seeds, cells["seed"].to_numpy())
    column = cells["level"].to_numpy().astype(np.int64)
    shape = (len(seeds), int(column.max()) + 1)

    def matrix(name: str) -> Array:
        out = np.full(shape, np.nan)
        out[row, column] = _floats(cells, name)
        return out

    # Results of before divergence was recorded have no such column.
    diverged = matrix("diverged") == 1.0 if "diverged" in cells.columns else np.zeros(shape, bool)

    values = matrix(metric)
    density = np.full(shape[1], np.nan)
    density[column] = _floats(cells, "density")
    return Tracks(
        env=env,
        algo=algo,
        condition=condition,
        controls=controls,
        source=str(own["controls"][0]),
        seeds=seeds,
        values=np.where(np.isfinite(values) & ~diverged, values, np.nan),
        diverged=diverged,
        density=density,
        effective_density=matrix("effective_density"),
        random=_finite(_floats(here, "random_return"), np.mean),
        dense_median=(
            float("nan") if metric in UNTRAINED else _finite(_floats(dense, metric), np.median)
        ),
    )


def _cells(frame: pl.DataFrame, env: str, algo: str, condition: str, controls: str) -> pl.DataFrame:
    cells = frame.filter(
        (pl.col("env") == env)
        & (pl.col("algo") == algo)
        & (pl.col("condition") == condition)
        & (pl.col("level") > 0)
    )
    kind = cells.filter(pl.col("controls") == controls)
    return cells if kind.is_empty() and condition in _SAME_IN_BOTH_KINDS else kind


def _floats(frame: pl.DataFrame, name: str) -> Array:
    return frame[name].cast(pl.Float64).to_numpy()  # null is NaN there


def _finite(values: Array, statistic: Any) -> float:
    values = values[np.isfinite(values)]
    return float(statistic(values)) if values.size else float("nan")
