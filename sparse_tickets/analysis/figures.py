"""Figures for print: return against density, and what initialisation, mask and ratio contribute.

Each function returns a ``matplotlib.figure.Figure`` that belongs to no global state, and
:func:`save` writes it. Pictures of masks are drawn in ``pictures`` and offered here too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from . import frame as results
from .contributions import CONTRIBUTIONS, contributions
from .pictures import mask_figure, ticket_figure
from .statistics import bootstrap_interval, iqm
from .style import (
    CONDITION_COLOURS,
    DPI,
    GREY,
    INK,
    PALE,
    colour_of,
    dash,
    head,
    note,
    save,
    styled,
)

__all__ = [
    "CONDITION_COLOURS",
    "contribution_figure",
    "mask_figure",
    "return_figure",
    "save",
    "ticket_figure",
]

_CONTRIBUTION_COLOURS = {
    "initialisation": "#332288",
    "mask": "#AA4499",
    "layerwise ratio": "#88812C",
}
_ALGORITHM_NAMES = {"ppo": "PPO", "bc": "behavioural cloning"}
_METRIC_NAMES = {
    "return_final": "final return",
    "return_best": "return of the best checkpoint",
    "return_final_sampled": "final return, sampled actions",
    "return_auc": "area under the learning curve",
}

_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
_WIDE_TICKS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # when sparser still
_LEVEL_WIDTH = np.log(1.25)  # neighbouring levels on the log axis

Array = NDArray[np.float64]


@styled
def return_figure(
    frame: pl.DataFrame,
    stamp: str | None = None,
    *,
    controls: str | None = None,
    metric: str = "return_final",
    effective_density: bool = False,
) -> Figure:
    """Return against density, dense at the left, one panel per algorithm.

    A line is a condition's interquartile mean over seeds, its band the 95% bootstrap interval over
    whole tracks (none for a single seed), a dot one seed. Horizontal lines mark the dense policies'
    interquartile mean and the random policy.

    Args:
        frame: The results frame of one environment.
        stamp: A short warning printed on the figure, such as "toy budget".
        controls: "own" or "ticket"; left out, the kind the frame holds, "own" if it holds both.
        metric: The return to draw, one of ``frame.METRICS``.
        effective_density: Count only weights on a path from input to output. A line then passes
            through the median density of its seeds, and ends where the median seed has no path;
            the dots of seeds without any path stand at the right end.

    Raises:
        ValueError: The frame is empty, is no results frame or holds several environments.
    """
    results.check(frame, metric, one_env=True)
    kind = _controls(frame, controls)
    env = results.environments(frame)[0]
    algos = results.algorithms(frame)
    shown = {
        algo: [
            results.tracks(frame, env, algo, condition, kind, metric)
            for condition in results.conditions(frame, env, algo, kind)
        ]
        for algo in algos
    }
    figure = Figure(figsize=(2.0 + 2.9 * len(algos), 3.1), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(algos), sharey=True, squeeze=False)[0]
    edge = _sparsest([t for each in shown.values() for t in each], effective_density)
    for panel, algo in zip(panels, algos, strict=True):
        panel.set_title(_ALGORITHM_NAMES.get(algo, algo))
        _density_axis(panel, edge, no_path=effective_density)
        panel.set_xlabel("effective density" if effective_density else "density")
        drawn = [
            _draw_tracks(panel, track, edge, effective_density, position, len(shown[algo]))
            for position, track in enumerate(shown[algo])
        ]
        _draw_references(panel, _level_0(frame, env, algo, metric), alone=not any(drawn))
    panels[0].set_ylabel(_METRIC_NAMES[metric])
    panels[0].yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))

    present = {track.condition for each in shown.values() for track in each}
    handles = [
        Line2D([], [], color=colour_of(name), linestyle=dash(name), linewidth=1.6, label=name)
        for name in dict.fromkeys([*CONDITION_COLOURS, *sorted(present)])
        if name in present
    ]
    _legend(panels[-1], handles)
    seeds = {len(track.seeds) for each in shown.values() for track in each}
    about = f"{kind} controls: interquartile mean of {_seeds(seeds)}" if seeds else ""
    head(figure, env, about, stamp)
    return figure


@styled
def contribution_figure(
    frame: pl.DataFrame, stamp: str | None = None, *, metric: str = "return_final"
) -> Figure:
    """What initialisation, mask and layerwise ratio contribute to the return, by density.

    One panel per algorithm, and a row for each kind of controls. A line is the mean of the
    differences paired within seeds, its band their 95% bootstrap interval.

    Args:
        frame: The results frame of one environment.
        stamp: A short warning printed on the figure, such as "toy budget".
        metric: The return to compare, one of ``frame.METRICS``.

    Raises:
        ValueError: The frame is empty, is no results frame or holds several environments.
    """
    results.check(frame, metric, one_env=True)
    table = contributions(frame, metric)
    algos, kinds = results.algorithms(frame), results.controls_kinds(frame)
    edge = min([0.5, *table["density"]])
    figure = Figure(
        figsize=(2.0 + 2.9 * len(algos), 0.7 + 2.2 * len(kinds)), dpi=DPI, layout="constrained"
    )
    grid = figure.subplots(len(kinds), len(algos), sharex=True, sharey=True, squeeze=False)
    for panels, kind in zip(grid, kinds, strict=True):
        for panel, algo in zip(panels, algos, strict=True):
            _density_axis(panel, edge)
            panel.axhline(0.0, color=INK, linewidth=0.7, zorder=1)
            here = table.filter((pl.col("algo") == algo) & (pl.col("controls") == kind))
            for name, colour in _CONTRIBUTION_COLOURS.items():
                line = here.filter(pl.col("contribution") == name).sort("level")
                x, y, low, high = (
                    line[c].cast(pl.Float64).fill_null(float("nan")).to_numpy()
                    for c in ("density", "mean", "low", "high")
                )
                panel.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
                panel.plot(x, y, color=colour, linewidth=1.4)
            if here.is_empty():
                note(panel, "no paired conditions")
        panels[0].set_ylabel(f"difference in {_METRIC_NAMES[metric]}\n({kind} controls)")
    for panel, algo in zip(grid[0], algos, strict=True):
        panel.set_title(_ALGORITHM_NAMES.get(algo, algo))
    for panel in grid[-1]:
        panel.set_xlabel("density")
    handles = [
        Line2D(
            [],
            [],
            color=_CONTRIBUTION_COLOURS[name],
            linewidth=1.6,
            label=f"{name}\n{having}\n− {lacking}",  # noqa: RUF001 (a minus sign)
        )
        for name, (having, lacking) in CONTRIBUTIONS.items()
        if name in table["contribution"]
    ]
    _legend(grid[0, -1], handles, labelspacing=1.2)
    pairs = set(table.filter(pl.col("level") > 0)["seeds"])
    about = f"mean difference within {_seeds(pairs)}" if pairs else ""
    head(figure, results.environments(frame)[0], about, stamp)
    return figure


def _controls(frame: pl.DataFrame, wanted: str | None) -> str:
    kinds = results.controls_kinds(frame)
    if wanted is not None and wanted not in kinds:
        raise ValueError(f"controls must be one of {', '.join(kinds)}, got {wanted!r}")
    return wanted or kinds[0]


def _level_0(frame: pl.DataFrame, env: str, algo: str, metric: str) -> results.Tracks | None:
    here = frame.filter((pl.col("algo") == algo) & (pl.col("level") == 0))
    return (
        None if here.is_empty() else results.tracks(frame, env, algo, results.DENSE, metric=metric)
    )


def _sparsest(tracks: list[results.Tracks], effective: bool) -> float:
    """Smallest density above zero, the right end of the axis; never above one half."""
    found = [t.effective_density if effective else t.density for t in tracks]
    positive = [float(np.min(x[x > 0])) for x in found if np.any(x > 0)]
    return min([*positive, 0.5])


def _density_axis(panel: Axes, edge: float, *, no_path: bool = False) -> None:
    panel.set_xscale("log")
    end = _no_path(edge) if no_path else edge
    panel.set_xlim(1.12, end * 0.87)
    ticks = [t for t in (_TICKS if edge > 0.004 else _WIDE_TICKS) if t >= edge * 0.98]
    labels = [f"{tick * 100:g}%" for tick in ticks]
    if no_path:
        ticks, labels = [*ticks, end], [*labels, "no\npath"]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FixedFormatter(labels))
    panel.grid(axis="y", color=PALE, linewidth=0.4)
    panel.set_axisbelow(True)


def _no_path(edge: float) -> float:
    """Where a density of zero stands on the log axis: past the sparsest one."""
    return edge * 0.55


def _draw_tracks(
    panel: Axes,
    track: results.Tracks,
    edge: float,
    effective: bool,
    position: int,
    conditions: int,
) -> bool:
    """Band, line and dots of one condition; returns whether there was anything finite to draw."""
    shade = colour_of(track.condition)
    middle = iqm(track.values, 0)
    low, high = bootstrap_interval(track.values)
    x = track.density
    if effective:
        x = _median(np.where(np.isnan(track.values), np.nan, track.effective_density))
    there = ~np.isnan(middle)
    there &= np.cumprod((x > 0) | ~there).astype(bool)  # a line ends at its first zero density
    panel.fill_between(
        x[there], low[there], high[there], color=shade, alpha=0.16, linewidth=0, zorder=2
    )
    panel.plot(
        x[there],
        middle[there],
        color=shade,
        linewidth=1.5,
        linestyle=dash(track.condition),
        zorder=4,
    )
    # Conditions side by side within a level, seeds spread a little: dots do not hide each other.
    spread = np.random.default_rng(position).uniform(-0.5, 0.5, track.values.shape)
    shift = ((position + 0.5 + 0.7 * spread) / conditions - 0.5) * 0.8 * _LEVEL_WIDTH
    dots = np.broadcast_to(x, track.values.shape)
    if effective:
        dots = np.where(track.effective_density > 0, track.effective_density, _no_path(edge))
    panel.scatter(
        (dots * np.exp(shift))[:, 1:],
        track.values[:, 1:],
        s=2.2,
        color=shade,
        alpha=0.35,
        linewidths=0,
        zorder=3,
    )
    return bool(np.isfinite(track.values).any())


def _draw_references(panel: Axes, dense: results.Tracks | None, alone: bool) -> None:
    """The dense seeds at the left end, and lines for the dense and the random policies."""
    height = float("nan")
    if dense is not None:
        values = dense.values[:, 0]
        height = float(iqm(values))
        shift = np.random.default_rng(0).uniform(-0.4, 0.4, len(values)) * _LEVEL_WIDTH
        panel.scatter(np.exp(shift), values, s=2.2, color=INK, alpha=0.35, linewidths=0, zorder=3)
        if np.isfinite(height):
            panel.axhline(height, color=GREY, linewidth=0.8, zorder=1)
            _name_line(panel, "dense", height, "right")
        if np.isfinite(dense.random):
            panel.axhline(dense.random, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
            _name_line(panel, "random policy", dense.random, "left")
    if alone and not np.isfinite(height):
        note(panel, "no finite returns")
    panel.margins(y=0.1)


def _name_line(panel: Axes, name: str, height: float, side: Literal["left", "right"]) -> None:
    """Above the line at the right end, below it at the left: where curves seldom are."""
    right = side == "right"
    panel.annotate(
        name,
        (1.0 if right else 0.0, height),
        (-2, 3) if right else (3, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha=side,
        va="bottom" if right else "top",
        fontsize=6.5,
        color=GREY,
        bbox={"boxstyle": "square,pad=0", "facecolor": "white", "linewidth": 0},
    )


def _median(values: Array) -> Array:
    """Median over seeds of each level, NaN where there is none (without numpy's warning)."""
    return np.array(
        [np.median(v[~np.isnan(v)]) if np.any(~np.isnan(v)) else np.nan for v in values.T]
    )


def _seeds(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    if high == 1:
        return "1 seed"
    return f"{high if low == high else f'{low} to {high}'} seeds, 95% interval"


def _legend(panel: Axes, handles: list[Line2D], labelspacing: float = 0.6) -> None:
    if handles:
        panel.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.03, 1.02),
            borderaxespad=0,
            handlelength=1.8,
            labelspacing=labelspacing,
        )
