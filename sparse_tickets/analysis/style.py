"""The look of every figure: colours, typography, headline and stamp; and how a figure is saved."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_tickets.files import write_atomic

__all__ = [
    "CONDITION_COLOURS",
    "DPI",
    "GREY",
    "INK",
    "PALE",
    "colour_of",
    "contribution_line",
    "head",
    "line_of",
    "note",
    "put_stamp",
    "save",
    "styled",
]

# Okabe and Ito's colours; the last is a brown, since their yellow vanishes on white.
CONDITION_COLOURS = {
    "mask/weights": "#0072B2",
    "mask/permuted": "#E69F00",
    "permuted/permuted": "#009E73",
    "random/re-init": "#D55E00",
    "mask/re-init": "#CC79A7",
    "permuted/re-init": "#56B4E9",
    "erk-random/re-init": "#7A5C3E",
}
# Dashes and marker: colours alone are lost in print, and one line under another altogether.
_LINES: dict[str, tuple[Any, str]] = {
    "mask/weights": ("-", "o"),
    "mask/permuted": ((0, (4, 1.6)), "s"),
    "permuted/permuted": ((0, (4, 1.2, 1, 1.2)), "^"),
    "random/re-init": ((0, (1, 1.2)), "D"),
    "mask/re-init": ((0, (2, 1)), "v"),
    "permuted/re-init": ((0, (6, 1, 1, 1, 1, 1)), "P"),
    "erk-random/re-init": ((0, (7, 2)), "X"),
}
INK, GREY, PALE = "#222222", "#767676", "#D9D9D9"
DPI = 200

# In colours of their own, dashed and marked as the condition that has the thing.
_CONTRIBUTION_LINES = {
    "initialisation": ("#332288", "mask/weights"),
    "mask": ("#AA4499", "mask/permuted"),
    "layerwise ratio": ("#88812C", "permuted/permuted"),
}
_OWN_COLOURS = ("#000000", "#882255", "#999933", "#332288")
_WARNING = "#A03000"
_STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "sparse_tickets",
}
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the house style without leaving it behind in matplotlib's global settings."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return drawn


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write the figure as PNG and as SVG, each complete or not at all.

    Equal figures are equal files: no date is written, and identifiers have a fixed salt.

    Args:
        figure: The figure.
        path: Where to; an ending .png or .svg is left off. The folder is made if it is missing.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        StoreError: The disk is full.
    """
    path = Path(path)
    stem = path.name.removesuffix(".png").removesuffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.parent / f"{stem}.png", path.parent / f"{stem}.svg"
    with matplotlib.style.context(["default", _STYLE]):
        # Laid out once for both, which takes as long as drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        for file, metadata in ((png, None), (svg, {"Date": None})):
            kind = file.suffix.removeprefix(".")
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, facecolor="white", metadata=metadata)
            write_atomic(file, buffer.getvalue())
    return png, svg


def colour_of(condition: str) -> str:
    """Colour of a condition: for those a user registered one of a few, always the same by name."""
    own = _OWN_COLOURS[zlib.crc32(condition.encode()) % len(_OWN_COLOURS)]
    return CONDITION_COLOURS.get(condition, own)


def line_of(condition: str) -> dict[str, Any]:
    """Colour, dashes and marker of a condition, told apart in grey and where lines coincide."""
    dashes, marker = _LINES.get(condition, ((0, (3.5, 1.2, 1, 1.2, 1, 1.2)), "*"))
    return {
        "color": colour_of(condition),
        "linestyle": dashes,
        "marker": marker,
        "markersize": 3.4,
        "markerfacecolor": "white",
        "markeredgewidth": 0.8,
    }


def contribution_line(name: str) -> dict[str, Any]:
    """Colour, dashes and marker of a contribution."""
    colour, twin = _CONTRIBUTION_LINES[name]
    return {**line_of(twin), "color": colour}


def note(panel: Axes, text: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    panel.text(
        0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY, fontsize=7
    )


def head(figure: Figure, title: str, detail: str, stamp: str | None) -> None:
    """A bold line, below it a grey one, above the area left to the layout."""
    inches = figure.get_figheight()
    room = (0.45 if detail else 0.3) / inches
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - room))
    left = 0.06 / figure.get_figwidth()
    figure.text(left, 1 - 0.07 / inches, title, va="top", fontsize=9, weight="bold")
    figure.text(left, 1 - 0.26 / inches, detail, va="top", fontsize=7, color=GREY)
    put_stamp(figure, stamp)


def put_stamp(figure: Figure, stamp: str | None) -> None:
    """A small framed warning in the upper right corner; nothing for None."""
    if stamp is None:
        return
    box = {
        "boxstyle": "round,pad=0.3",
        "facecolor": "white",
        "edgecolor": _WARNING,
        "linewidth": 0.7,
    }
    figure.text(
        1 - 0.08 / figure.get_figwidth(),
        1 - 0.09 / figure.get_figheight(),
        stamp,
        ha="right",
        va="top",
        fontsize=7,
        color=_WARNING,
        bbox=box,
    )
