"""Summaries of a sweep as tables: every level, when each condition degrades, BC against PPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import frame as results
from .statistics import (
    bootstrap_interval,
    holm,
    iqm,
    mean,
    restricted_levels,
    restricted_mean,
)

__all__ = ["compare", "degradation", "markdown_table", "summary", "summary_table"]

_IDENTITY = ("env", "algo", "controls", "condition")
_LEVEL = ("level", "low", "high", "censored")
_SUMMARY = {
    **dict.fromkeys(_IDENTITY, pl.String),
    "level": pl.Int64,
    "density": pl.Float64,
    "effective_density": pl.Float64,
    "seeds": pl.Int64,
    "diverged": pl.Int64,
    "iqm": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "mean": pl.Float64,
    "normalised_iqm": pl.Float64,
    "retained": pl.Float64,
}
_DEGRADATION = {
    **dict.fromkeys(_IDENTITY, pl.String),
    "seeds": pl.Int64,
    "level": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "density": pl.Float64,
    "horizon": pl.Int64,
    "censored": pl.Int64,
}
_COMPARISON = {
    "env": pl.String,
    "controls": pl.String,
    "condition": pl.String,
    "pairs": pl.Int64,
    "first": pl.Float64,
    "second": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "horizon": pl.Int64,
    "first_censored": pl.Int64,
    "second_censored": pl.Int64,
    "p_value": pl.Float64,
}
_SHOWN_DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
_MISSING = "-"


def summary(
    frame: pl.DataFrame,
    metric: str = "return_final",
    threshold: float = 0.95,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Statistics over seeds of every condition at every level, one row each.

    Args:
        frame: The results frame; any number of environments, algorithms and kinds of controls.
        metric: The return to summarise, one of ``frame.METRICS``.
        threshold: Share of the dense median return that counts as retained.
        confidence: Coverage of the interval, which resamples whole tracks.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Columns env, algo, controls, condition, level, density, effective_density (mean), seeds
        (finite returns), diverged (seeds without a result, which the means leave out), iqm, low,
        high, mean (the IQM trims failures, the mean does not), normalised_iqm (0 is random, 1 the
        median dense policy), retained (fraction of seeds, diverged ones included, at or above the
        threshold). Null where a value does not exist: no interval below two seeds, no
        normalised return where dense policies do not beat random ones.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    rows: list[dict[str, object]] = []
    for track in _all_tracks(frame, metric):
        middle, average = iqm(track.values, 0), mean(track.values, 0)
        low, high = bootstrap_interval(track.values, iqm, confidence, resamples, seed)
        seeds = np.sum(~np.isnan(track.values), axis=0)
        diverged = np.sum(track.diverged, axis=0)
        nothing = np.full_like(middle, np.nan)
        normalised, retained = nothing, nothing
        if track.normalised is not None:
            normalised = iqm(track.normalised, 0)
            kept = np.sum(track.normalised >= threshold, axis=0)
            run = seeds + diverged
            retained = np.where(run > 0, kept / np.maximum(run, 1), np.nan)
        effective = mean(track.effective_density, 0)
        rows += [
            {
                **_identity(track),
                "level": int(level),
                "density": float(track.density[level]),
                "effective_density": float(effective[level]),
                "seeds": int(seeds[level]),
                "diverged": int(diverged[level]),
                "iqm": float(middle[level]),
                "low": float(low[level]),
                "high": float(high[level]),
                "mean": float(average[level]),
                "normalised_iqm": float(normalised[level]),
                "retained": float(retained[level]),
            }
            for level in np.flatnonzero(~np.isnan(track.density))
        ]
    return _frame(rows, _SUMMARY)


def degradation(
    frame: pl.DataFrame,
    metric: str = "return_final",
    threshold: float = 0.95,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """The level at which each condition's tracks degrade, one row per condition.

    Args:
        frame: The results frame.
        metric: The return to judge by, one of ``frame.METRICS``.
        threshold: Share of the dense median return that must be kept.
        confidence: Coverage of the interval, which resamples tracks.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Columns env, algo, controls, condition, seeds, level (mean over tracks, each cut at the
        horizon), low, high, density (at that level), horizon, censored (tracks that reach the
        horizon undegraded: if there are any, level is a lower bound). What diverged counts as
        degraded. Conditions without tracks
        beyond level 0, or whose dense policies do not beat random ones, have no row.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    rows: list[dict[str, object]] = []
    for track in _all_tracks(frame, metric):
        begun = _begun(track)
        if begun is None or track.condition == results.DENSE:
            continue
        (levels,), horizon, (censored,) = restricted_levels(begun[1], threshold=threshold)
        low, high = bootstrap_interval(levels[:, None], mean, confidence, resamples, seed)
        level = float(levels.mean())
        rows.append(
            {
                **_identity(track),
                "seeds": len(levels),
                "level": level,
                "low": float(low[0]),
                "high": float(high[0]),
                "density": _density_at(level, track.density),
                "horizon": horizon,
                "censored": censored,
            }
        )
    return _frame(rows, _DEGRADATION)


def compare(
    frame: pl.DataFrame,
    first: str = "bc",
    second: str = "ppo",
    metric: str = "return_final",
    threshold: float = 0.95,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Does one algorithm keep its return to sparser levels? Paired by seed, Holm over all rows.

    Args:
        frame: The results frame.
        first: Algorithm whose degradation level is the minuend.
        second: Algorithm whose degradation level is the subtrahend.
        metric: The return to judge by, one of ``frame.METRICS``.
        threshold: Share of its own dense median return that each must keep.
        confidence: Coverage of the interval, which resamples pairs of tracks.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        One row per env, controls and condition that both algorithms have (once where both kinds
        of controls share the cells), with the fields of
        ``statistics.Contrast`` and p_holm, adjusted over the rows. No rows if nothing pairs.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    found = {
        (track.env, track.source, track.condition, track.algo): track
        for track in _all_tracks(frame, metric)
        if track.condition != results.DENSE
    }
    rows: list[dict[str, object]] = []
    for (env, kind, condition, algo), track in found.items():
        other = found.get((env, kind, condition, second))
        if algo != first or other is None:
            continue
        a, b = _begun(track), _begun(other)
        if a is None or b is None:
            continue
        _, rows_a, rows_b = np.intersect1d(a[0], b[0], return_indices=True)
        if rows_a.size == 0:
            continue
        result = restricted_mean(a[1][rows_a], b[1][rows_b], threshold, confidence, resamples, seed)
        rows.append(
            {
                "env": env,
                "controls": kind,
                "condition": condition,
                "pairs": result.pairs,
                "first": result.first,
                "second": result.second,
                "difference": result.difference,
                "low": result.low,
                "high": result.high,
                "horizon": result.horizon,
                "first_censored": result.censored[0],
                "second_censored": result.censored[1],
                "p_value": result.p_value,
            }
        )
    table = _frame(rows, _COMPARISON)
    tested = table["p_value"].is_not_null().to_numpy()
    adjusted = np.full(len(rows), np.nan)
    adjusted[tested] = holm(table["p_value"].drop_nulls().to_numpy())
    return table.with_columns(pl.Series("p_holm", adjusted).fill_nan(None))


def summary_table(
    frame: pl.DataFrame, metric: str = "return_final", threshold: float = 0.95
) -> Table:
    """The sweep at a glance for a terminal: IQM returns and degradation levels.

    Args:
        frame: The results frame.
        metric: The return to summarise, one of ``frame.METRICS``.
        threshold: Share of the dense median return that must be kept.

    Returns:
        A ``rich`` table with one row per environment, algorithm, kind of controls and condition.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    return _for_terminal(*_cells(frame, metric, threshold))


def markdown_table(
    frame: pl.DataFrame, metric: str = "return_final", threshold: float = 0.95
) -> str:
    """:func:`summary_table` as Markdown, with the intervals of the returns too.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    return _for_markdown(*_cells(frame, metric, threshold))


def both_tables(frame: pl.DataFrame, metric: str) -> tuple[Table, str]:
    """:func:`summary_table` and :func:`markdown_table` in the time of one.

    Raises:
        ValueError: The frame is empty or is no results frame.
    """
    cells = _cells(frame, metric, 0.95)
    return _for_terminal(*cells), _for_markdown(*cells)


def _for_terminal(title: str, header: list[str], rows: list[_Row]) -> Table:
    # As text: names may have brackets, which rich would take for its markup.
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False
    )
    words = len(rows[0].words)
    for position, name in enumerate(header):
        justify: Literal["left", "right"] = "left" if position < words else "right"
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following.words[:-1] != row.words[:-1]
        texts = [*row.words, *(value for value, _ in row.returns)]
        levels = [Text(value).append(f" {span}".rstrip(), style="dim") for value, span in row.level]
        table.add_row(*map(Text, texts), *levels, end_section=last)
    return table


def _for_markdown(title: str, header: list[str], rows: list[_Row]) -> str:
    words = len(rows[0].words)
    lines = [header, ["---" if i < words else "---:" for i in range(len(header))]]
    for row in rows:
        pairs = (*row.returns, *row.level)
        lines.append([*row.words, *(f"{value} {span}".strip() for value, span in pairs)])
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class _Row:
    """One row of either table: names, then (value, interval) texts.

    ``level`` is empty where a metric has no degradation level.
    """

    words: tuple[str, ...]
    returns: tuple[tuple[str, str], ...]
    level: tuple[tuple[str, str], ...]


def _cells(frame: pl.DataFrame, metric: str, threshold: float) -> tuple[str, list[str], list[_Row]]:
    """``(title, header, rows)``; what all rows share is said once, in the title."""
    every = summary(frame, metric, threshold)
    degraded = degradation(frame, metric, threshold)
    density = dict(every.group_by("level").agg(pl.col("density").mean()).sort("level").iter_rows())
    shown = _shown_levels(density)
    dense = pl.col("condition") == results.DENSE
    # Every condition's row begins with the dense policies: they need a row only where they are all.
    every = every.filter(~dense | dense.all().over("env", "algo"))
    shared = {name for name in ("env", "controls") if every[name].n_unique() == 1}
    words = [name for name in _IDENTITY if name not in shared]

    degrades = {row[:4]: row[4:] for row in degraded.select(*_IDENTITY, *_LEVEL).iter_rows()}
    judged = metric not in results.UNTRAINED
    rows = []
    for key, group in every.group_by(_IDENTITY, maintain_order=True):
        returns = {row["level"]: row for row in group.iter_rows(named=True)}
        rows.append(
            _Row(
                words=tuple(
                    str(word) for word, name in zip(key, _IDENTITY, strict=True) if name in words
                ),
                returns=tuple(_return_text(returns.get(level)) for level in shown),
                level=((_level_text(*degrades.get(key, (None, None, None, 0))),) if judged else ()),
            )
        )
    header = [*words, *(_percent(density[level]) for level in shown)]
    header += ["degrades at"] if judged else []
    setting = [every["env"][0]] if "env" in shared else []
    setting += [f"{every['controls'][0]} controls"] if "controls" in shared else []
    title = f"{', '.join([*setting, metric])}: IQM over seeds by density"
    if judged:
        title += (
            f"; degrades at the first of two successive levels below {threshold:g} of dense "
            "(mean over seeds) [95% interval]"
        )
    diverged = every["diverged"].sum()
    if diverged:
        title += f"; {diverged} cells diverged: left out of returns, degraded"
    return title, header, rows


def _shown_levels(density: dict[int, float]) -> list[int]:
    """The levels nearest to a handful of round densities, and the last one."""
    sparsest = min(density.values())
    wanted = [value for value in _SHOWN_DENSITIES if value >= sparsest]
    nearest = {
        min(density, key=lambda level, d=value: abs(np.log(density[level] / d)))  # type: ignore[misc]
        for value in wanted
    }
    return sorted(nearest | {max(density)})


def _return_text(row: dict[str, float] | None) -> tuple[str, str]:
    if row is None or row["iqm"] is None:
        return _MISSING, ""
    if row["low"] is None:
        return _number(row["iqm"]), ""
    return _number(row["iqm"]), f"[{_number(row['low'])}, {_number(row['high'])}]"


def _level_text(
    level: float | None, low: float | None, high: float | None, censored: int
) -> tuple[str, str]:
    if level is None:
        return _MISSING, ""
    bound = "≥ " if censored else ""
    span = "" if low is None else f"[{low:.1f}, {high:.1f}]"
    return f"{bound}{level:.1f}", span


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _percent(density: float) -> str:
    return f"{density:.0%}" if density >= 0.1 else f"{density:.1%}"


def _all_tracks(frame: pl.DataFrame, metric: str) -> Iterator[results.Tracks]:
    """Every dense level 0, then every condition's tracks, in a fixed order."""
    results.check(frame, metric)
    for env in results.environments(frame):
        here = frame.filter(pl.col("env") == env)
        for algo in results.algorithms(here):
            cells = here.filter(pl.col("algo") == algo)
            if not cells.filter(pl.col("level") == 0).is_empty():
                yield results.tracks(cells, env, algo, results.DENSE, "shared", metric)
            for kind in results.controls_kinds(cells):
                for condition in results.conditions(cells, env, algo, kind):
                    yield results.tracks(cells, env, algo, condition, kind, metric)


def _identity(track: results.Tracks) -> dict[str, object]:
    return dict(
        zip(_IDENTITY, (track.env, track.algo, track.controls, track.condition), strict=True)
    )


def _begun(track: results.Tracks) -> tuple[NDArray[np.int64], results.Array] | None:
    """Seeds and normalised tracks that hold their level 0; None if there are none."""
    judged = track.judged
    if judged is None:
        return None
    begun = ~np.isnan(judged[:, 0])
    return (track.seeds[begun], judged[begun]) if begun.any() else None


def _density_at(level: float, density: NDArray[np.float64]) -> float:
    """Between two levels, on a logarithmic scale: pruning multiplies densities."""
    known = np.flatnonzero(density > 0)
    return float(np.exp(np.interp(level, known, np.log(density[known]))))


def _frame(rows: list[dict[str, object]], schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=schema).fill_nan(None)
