"""Figures for print: return against density, and what initialisation, mask and ratio contribute.

Each function returns a ``matplotlib.figure.Figure`` that belongs to no global state, and
:func:`save` writes it. Pictures of masks are drawn in ``pictures`` and offered here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from sparse_tickets.algos.registry import ALGORITHMS

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
    contribution_line,
    head,
    line_of,
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

_PANEL_HEIGHT, _LABEL_HEIGHT = 2.2, 0.14  # inches

_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
_WIDE_TICKS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # when sparser still
_LEVEL_WIDTH = np.log(1.25)  # neighbouring levels on the log axis

Array = NDArray[np.float64]


class _End(NamedTuple):
    """The last point of a condition's line."""

    condition: str
    density: float
    value: float


@styled
def return_figure(
    frame: pl.DataFrame,
    stamp: str | None = None,
    *,
    controls: str | None = None,
    metric: str | Sequence[str] = "return_final",
    effective_density: bool = False,
    title: str | None = None,
) -> Figure:
    """Return against density, dense at the left: a column per algorithm, rows for what is compared.

    A line is a condition's interquartile mean over seeds, its band the 95% bootstrap interval over
    whole tracks (none for a single seed), a dot one seed. Horizontal lines mark the dense policies'
    interquartile mean and the random policy.

    Args:
        frame: The results frame of one environment.
        stamp: A short warning printed on the figure, such as "toy budget".
        controls: "own" or "ticket"; left out, every kind the frame holds, a row each.
        metric: The return to draw, of ``frame.METRICS``; several have a row each.
        effective_density: Count only weights on a path from input to output. A line then passes
            through the median density of its seeds, and ends where the median seed has no path;
            the dots of seeds without any path stand at the right end.
        title: Stands above all; left out, the environment's name.

    Raises:
        ValueError: The frame is empty, is no results frame or holds several environments.
    """
    kinds, metrics = _rows(frame, controls, metric)
    env = results.environments(frame)[0]
    algos = results.algorithms(frame)
    rows = [(kind, name) for kind in kinds for name in metrics]
    shown = {
        (kind, name, algo): [
            results.tracks(frame, env, algo, condition, kind, name)
            for condition in results.conditions(frame, env, algo, kind)
        ]
        for kind, name in rows
        for algo in algos
    }
    drawn = [track for each in shown.values() for track in each]
    figure, grid = _grid(len(rows), len(algos))
    edge = _sparsest(drawn, effective_density)
    ends: dict[Axes, list[_End]] = {}
    for panels, (kind, name) in zip(grid, rows, strict=True):
        for panel, algo in zip(panels, algos, strict=True):
            tracks = shown[kind, name, algo]
            _density_axis(panel, edge, no_path=effective_density)
            ends[panel] = [
                end
                for position, track in enumerate(tracks)
                for end in _draw_tracks(
                    panel, track, edge, effective_density, position, len(tracks)
                )
            ]
            alone = not any(np.isfinite(track.values).any() for track in tracks)
            _draw_references(panel, _level_0(frame, env, algo, name), alone)
        label = results.METRICS[name]
        panels[0].set_ylabel(label if len(kinds) == 1 else f"{label}\n({kind} controls)")
        panels[0].yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if not effective_density:
            for panel in panels:
                _label_ends(panel, ends[panel])
    for panel, algo in zip(grid[0], algos, strict=True):
        panel.set_title(_title(algo))
    for panel in grid[-1]:
        panel.set_xlabel("effective density" if effective_density else "density")
    if effective_density:
        present = {track.condition for track in drawn}
        names = dict.fromkeys([*CONDITION_COLOURS, *sorted(present)])
        handles = [
            Line2D([], [], linewidth=1.4, label=name, **line_of(name))
            for name in names
            if name in present
        ]
        _legend(grid[0, -1], handles)
    seeds = {len(track.seeds) for track in drawn}
    about = f"interquartile mean of {_seeds(seeds)}" if seeds else ""
    if about and len(kinds) == 1:
        about = f"{kinds[0]} controls: {about}"
    head(figure, title or env, about, stamp)
    return figure


@styled
def contribution_figure(
    frame: pl.DataFrame,
    stamp: str | None = None,
    *,
    metric: str | Sequence[str] = "return_final",
    title: str | None = None,
) -> Figure:
    """What initialisation, mask and layerwise ratio contribute to the return, by density.

    A column per algorithm, a row for each kind of controls and metric. A line is the mean of the
    differences paired within seeds, its band their 95% bootstrap interval.

    Args:
        frame: The results frame of one environment.
        stamp: A short warning printed on the figure, such as "toy budget".
        metric: The return to compare, of ``frame.METRICS``; several have rows each.
        title: Stands above all; left out, the environment's name.

    Raises:
        ValueError: The frame is empty, is no results frame or holds several environments.
    """
    kinds, metrics = _rows(frame, None, metric)
    tables = {name: contributions(frame, name) for name in metrics}
    everything = pl.concat(tables.values())
    algos = results.algorithms(frame)
    rows = [(kind, name) for kind in kinds for name in metrics]
    edge = min([0.5, *everything["density"]])
    figure, grid = _grid(len(rows), len(algos))
    for panels, (kind, metric_name) in zip(grid, rows, strict=True):
        for panel, algo in zip(panels, algos, strict=True):
            _density_axis(panel, edge)
            panel.axhline(0.0, color=INK, linewidth=0.7, zorder=1)
            here = tables[metric_name].filter(
                (pl.col("algo") == algo) & (pl.col("controls") == kind)
            )
            for position, name in enumerate(CONTRIBUTIONS):
                line = here.filter(pl.col("contribution") == name).sort("level")
                x, y, low, high = (
                    line[c].cast(pl.Float64).fill_null(float("nan")).to_numpy()
                    for c in ("density", "mean", "low", "high")
                )
                style = contribution_line(name)
                panel.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
                panel.plot(x, y, linewidth=1.4, markevery=_every(position, len(x)), **style)
            if here.is_empty():
                note(panel, "no paired conditions")
        label = f"difference in\n{results.METRICS[metric_name]}"
        panels[0].set_ylabel(label if len(kinds) == 1 else f"{label}\n({kind} controls)")
    for panel, algo in zip(grid[0], algos, strict=True):
        panel.set_title(_title(algo))
    for panel in grid[-1]:
        panel.set_xlabel("density")
    handles = [
        Line2D(
            [],
            [],
            linewidth=1.4,
            label=f"{name}\n{having}\n− {lacking}",  # noqa: RUF001 (a minus sign)
            **contribution_line(name),
        )
        for name, (having, lacking) in CONTRIBUTIONS.items()
        if name in everything["contribution"]
    ]
    _legend(grid[0, -1], handles, labelspacing=1.2)
    pairs = set(everything.filter(pl.col("level") > 0)["seeds"])
    about = f"mean difference within {_seeds(pairs)}" if pairs else ""
    if about and len(kinds) == 1:
        about = f"{kinds[0]} controls: {about}"
    head(figure, title or results.environments(frame)[0], about, stamp)
    return figure


def _rows(
    frame: pl.DataFrame, controls: str | None, metric: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """The kinds of controls and the metrics that have rows in a figure."""
    metrics = [metric] if isinstance(metric, str) else list(metric)
    if not metrics:
        raise ValueError("metric must name at least one return, got none")
    for name in metrics:
        results.check(frame, name, one_env=True)
    kinds = results.controls_kinds(frame)
    if controls is not None and controls not in kinds:
        raise ValueError(f"controls must be one of {', '.join(kinds)}, got {controls!r}")
    return ([controls] if controls else kinds), metrics


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    size = (0.6 + 3.9 * columns, 0.9 + _PANEL_HEIGHT * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)


def _every(position: int, levels: int) -> tuple[int, int]:
    """Which points have markers: every third of many, each line others, so that all are seen."""
    step = 3 if levels > 8 else 1
    return position % step, step


def _label_ends(panel: Axes, ends: list[_End]) -> None:
    """Name each condition's line at its end, to the right of the panel, one below the other."""
    low, high = panel.get_ylim()
    gap = _LABEL_HEIGHT / _PANEL_HEIGHT * (high - low)
    height = low - gap
    ends = sorted(ends, key=lambda end: end.value)
    for position, (condition, density, value) in enumerate(ends):
        # Above the one below, leaving room for those above.
        highest = high - gap * (len(ends) - 1 - position)
        height = max(min(value, highest), height + gap)
        panel.annotate(
            condition,
            (density, value),
            (1.05, height),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            fontsize=7,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour_of(condition),
                "linewidth": 0.7,
                "relpos": (0, 0.5),  # from the name's left end, not through its letters
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def _title(algo: str) -> str:
    return ALGORITHMS[algo].title if algo in ALGORITHMS else algo


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
) -> Iterator[_End]:
    """Draw band, line and dots of one condition; yields where the line ends, if there is one."""
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
        linewidth=1.4,
        zorder=4 + position / 100,
        markevery=_every(position, int(there.sum())),
        **line_of(track.condition),
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
    if there.any():
        yield _End(track.condition, float(x[there][-1]), float(middle[there][-1]))


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
