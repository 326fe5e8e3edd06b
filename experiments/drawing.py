"""Lines with intervals, seeds as dots and names at their ends: most figures here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from sparse_tickets.analysis.statistics import bootstrap_interval, mean
from sparse_tickets.analysis.style import CONDITION_COLOURS, DPI, PALE, head, line_of, styled

__all__ = ["Line", "line_figure"]

_LOOKS = tuple(CONDITION_COLOURS)
_PERCENT = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2)
_WIDTH, _HEIGHT, _LABEL = 2.7, 2.1, 0.13  # inches
_WIDEST = 9.0  # inches: of more, letters are too small at half of a page's width


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        name: written at its end.
        x: ``[points]``.
        values: ``[seeds, points]``; NaN where there is none.
    """

    name: str
    x: NDArray[np.float64]
    values: NDArray[np.float64]


@styled
def line_figure(
    panels: Mapping[str, Sequence[Line]],
    title: str,
    detail: str,
    xlabel: str,
    ylabel: str,
    *,
    scale: Literal["density", "log", "linear"] = "density",
    share_y: bool = True,
    ratios: bool = False,
) -> Figure:
    """A panel for each title: means over seeds, 95% bootstrap bands, a dot per seed.

    Args:
        panels: titles with their lines; a name looks the same in every panel. More than three,
            or three that are too wide, stand in two columns.
        title: bold.
        detail: beneath it, grey.
        xlabel: of every panel.
        ylabel: of the first one.
        scale: of x; a density, in percent, is logarithmic and falls to the right.
        share_y: whether panels have one scale.
        ratios: whether y is a ratio, on a logarithmic axis.
    """
    names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
    xs = np.concatenate([line.x for lines in panels.values() for line in lines])
    lowest, highest = xs.min(), xs.max()
    longest = max(map(len, names), default=0)
    wide = _WIDTH + 0.055 * longest
    columns = len(panels) if len(panels) <= 3 and 0.5 + len(panels) * wide <= _WIDEST else 2
    rows = -(-len(panels) // columns)
    size = (0.5 + columns * wide, 0.5 + rows * (0.3 + _HEIGHT))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    every = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    grid = every.flat[: len(panels)]
    for panel in every.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, (name, lines) in zip(grid, panels.items(), strict=True):
        panel.set_title(name)
        panel.set_xlabel(xlabel)
        if ratios:
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
        else:
            panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if scale != "linear":
            panel.set_xscale("log")
            panel.xaxis.set_minor_locator(NullLocator())
        if scale == "density":
            panel.set_xlim(1.2 * highest, lowest / 1.2)
            ticks = [tick for tick in _PERCENT if lowest / 1.2 <= tick <= 1.2 * highest]
            panel.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
        panel.grid(axis="y", color=PALE, linewidth=0.4)
        panel.set_axisbelow(True)
        for line in lines:
            _draw(panel, line, line_of(_LOOKS[names.index(line.name) % len(_LOOKS)]))
    for panel in every[:, 0]:
        panel.set_ylabel(ylabel)
    for panel, lines in zip(grid, panels.values(), strict=True):
        _name_ends(panel, [line for line in lines if np.isfinite(line.values).any()], names)
    head(figure, title, detail, None)
    return figure


def _draw(panel: Axes, line: Line, look: dict) -> None:
    middle = mean(line.values, 0)
    low, high = bootstrap_interval(line.values, mean)
    there = np.isfinite(middle)
    panel.fill_between(
        line.x[there], low[there], high[there], color=look["color"], alpha=0.14, linewidth=0
    )
    panel.plot(line.x[there], middle[there], linewidth=1.3, **look)
    if len(line.values) > 1:
        x = np.broadcast_to(line.x, line.values.shape)
        panel.scatter(x, line.values, s=2.5, color=look["color"], alpha=0.4, linewidths=0)


def _name_ends(panel: Axes, lines: Sequence[Line], names: list[str]) -> None:
    """Names to the right of the panel, one above the other, in the order of the lines' ends."""
    panel.get_xlim(), panel.get_ylim()  # settles the limits that the transform goes by
    to_axes = panel.transData + panel.transAxes.inverted()
    ends = []
    for line in lines:
        middle = mean(line.values, 0)
        last = np.flatnonzero(np.isfinite(middle))[-1]
        x, y = to_axes.transform((line.x[last], middle[last]))
        ends.append((float(y), float(x), line.name))
    ends.sort()
    height = -np.inf
    gap = _LABEL / _HEIGHT
    for position, (y, x, name) in enumerate(ends):
        height = max(min(y, 1 - gap * (len(ends) - 1 - position)), height + gap)
        panel.annotate(
            name,
            (x, y),
            (1.04, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line_of(_LOOKS[names.index(name) % len(_LOOKS)])["color"],
                "linewidth": 0.7,
                "relpos": (0, 0.5),  # from the name's left end, not through its letters
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )
