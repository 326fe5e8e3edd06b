"""What a ticket owes to its initial weights, to its mask, and to its spread over the layers.

Neighbouring conditions differ in one thing, so the difference of their returns is what that thing
contributes. Differences are taken within a seed, then averaged over seeds.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from . import frame as results
from .statistics import bootstrap_interval, mean

__all__ = ["CONTRIBUTIONS", "contributions"]

CONTRIBUTIONS = {
    "initialisation": ("mask/weights", "mask/permuted"),
    "mask": ("mask/permuted", "permuted/permuted"),
    "layerwise ratio": ("permuted/permuted", "random/re-init"),
}
"""Name of each contribution: the condition that has it, minus the one that does not. The layerwise
ratio comes together with a fresh initialisation."""

_SCHEMA = {
    "env": pl.String,
    "algo": pl.String,
    "controls": pl.String,
    "contribution": pl.String,
    "level": pl.Int64,
    "density": pl.Float64,
    "seeds": pl.Int64,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}


def contributions(
    frame: pl.DataFrame,
    metric: str = "return_final",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Paired contributions with bootstrap intervals, one row per level.

    Args:
        frame: The results frame; any number of environments, algorithms and kinds of controls.
        metric: The return to compare, one of ``frame.METRICS``.
        confidence: Coverage of the interval, which resamples whole paired tracks.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Columns env, algo, controls, contribution, level, density, seeds (pairs at that level),
        mean, low, high, in units of the metric; low and high are null below two pairs. A
        contribution whose conditions were not both run has no rows; level 0 is zero by definition.

    Raises:
        ValueError: The frame is empty or is no results frame.

    Source: Vischer, Lange and Sprekeler 2022, "On Lottery Tickets and Minimal Task Representations
    in Deep Reinforcement Learning".
    """
    results.check(frame, metric)
    rows: list[dict[str, object]] = []
    for env in results.environments(frame):
        here = frame.filter(pl.col("env") == env)
        for algo in results.algorithms(here):
            for kind in results.controls_kinds(here.filter(pl.col("algo") == algo)):
                present = results.conditions(here, env, algo, kind)
                for name, pair in CONTRIBUTIONS.items():
                    if not set(pair) <= set(present):
                        continue
                    having, lacking = (
                        results.tracks(here, env, algo, condition, kind, metric)
                        for condition in pair
                    )
                    density, difference = _paired_difference(having, lacking)
                    low, high = bootstrap_interval(difference, mean, confidence, resamples, seed)
                    middle = mean(difference, 0)
                    pairs = np.sum(~np.isnan(difference), axis=0)
                    rows += [
                        {
                            "env": env,
                            "algo": algo,
                            "controls": kind,
                            "contribution": name,
                            "level": int(level),
                            "density": float(density[level]),
                            "seeds": int(pairs[level]),
                            "mean": float(middle[level]),
                            "low": float(low[level]),
                            "high": float(high[level]),
                        }
                        for level in np.flatnonzero(pairs)
                    ]
    return pl.DataFrame(rows, schema=_SCHEMA).with_columns(
        pl.col("low", "high").fill_nan(None),
    )


def _paired_difference(
    having: results.Tracks, lacking: results.Tracks
) -> tuple[results.Array, results.Array]:
    """``density[levels]`` and ``difference[pairs, levels]`` over the seeds and levels of both."""
    _, a, b = np.intersect1d(having.seeds, lacking.seeds, return_indices=True)
    levels = min(having.values.shape[1], lacking.values.shape[1])
    return having.density[:levels], having.values[a, :levels] - lacking.values[b, :levels]
