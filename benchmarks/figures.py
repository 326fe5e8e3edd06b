"""Pictures of a device's runs, on log axes beside the ideal: speed-ups, scaling, the whole job."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparse_tickets.analysis.style import DPI, GREY, INK, PALE, styled
from sparse_tickets.files import write_atomic

from .measure import Record
from .results import SuiteRun, share_out
from .scaling import AXES, Curve, curves
from .tables import groups, in_words

# Okabe and Ito's colours but their yellow, which vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^")
_COLUMNS = 4
_ORDER = ("linear", "layer", "policy", "PPO", "whole level")
# What each stage of the whole job adds to the one before it.
_ADDED = ("batching", "fusion", "sparsity")
# The share of the work that pruning touches: an actor-critic's critic stays dense.
_PRUNED_WORK = {"PPO iteration": 0.5}


def draw(runs: Sequence[SuiteRun], folder: Path) -> list[Path]:
    """Every picture that the runs of one device have data for, as PNG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [records for run in share_out(runs) for records in groups(run)]
    speedups = sorted(
        (
            records
            for records in tables
            if len([r for r in records if 0 < r.sparsity < 100 and r.speedup]) > 1
        ),
        key=_place,
    )
    # Of one run alone, since points of a curve are compared with each other.
    scaling = max((curves(run.records) for run in runs), key=_varied, default=[])
    stages = [r for records in tables for r in records if r.op.startswith("whole job")]
    pictures = (
        ("speedup", speedups, _speedups),
        ("scaling", scaling if _varied(scaling) > 1 else [], _scaling),
        ("whole-job", stages[-1:], _stages),
    )
    return [
        _save(picture(data), folder / f"{runs[0].device}-{name}.png")
        for name, data, picture in pictures
        if data
    ]


def _place(records: Sequence[Record]) -> tuple[object, ...]:
    """Small things first: by op, and then by size."""
    op = records[0].op
    begins = [index for index, start in enumerate(_ORDER) if op.startswith(start)]
    sizes = (records[0].shape.get(name, 0) for name in ("P", "I", "width", "B"))
    return (begins[0] if begins else len(_ORDER), op, *sizes)


def _varied(found: Sequence[Curve]) -> int:
    """How many axes there are curves over."""
    return len({curve.axis for curve in found})


@styled
def _scaling(found: Sequence[Curve]) -> Figure:
    """One panel per axis; per curve our cost, its spread, and the ideal line."""
    axes = [axis for axis in AXES if any(curve.axis == axis for curve in found)]
    figure, panels = _panels(len(axes), 3, (3.1, 2.7))
    for panel, axis in zip(panels, axes, strict=True):
        chosen = [curve for curve in found if curve.axis == axis]
        for curve, colour in zip(chosen, _COLOURS, strict=False):
            sizes = [size for size, _ in curve.points]
            walls = [record.contenders[record.subject].wall for _, record in curve.points]
            unit = curve.points[0][1].unit
            panel.plot(sizes, [1e3 * w.median for w in walls], "o-", color=colour, ms=2.5, lw=1.1,
                       label=f"{curve.op}, per {unit}\n{curve.fixed}")  # fmt: skip
            low, high = [1e3 * w.p20 for w in walls], [1e3 * w.p80 for w in walls]
            panel.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
            panel.plot(
                sizes, [1e3 * curve.ideal(size) for size in sizes], "--", color=colour, lw=0.6
            )
        ticks = _apart(sorted({size for curve in chosen for size, _ in curve.points}))
        _log_axes(panel, ticks, [f"{tick:g}" for tick in ticks], "{:g}")
        # Room for the legend above the curves.
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * (high / low) ** (0.11 * len(chosen)))
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("milliseconds")
        panel.legend(fontsize=5, loc="upper left", labelspacing=0.3)
    figure.suptitle(
        "What our cost does as one size grows; dashed: if it grew with the work alone, or fell "
        "with the threads; shaded: p20-p80",
        fontsize=8,
    )
    return figure


def _panels(count: int, most: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure and as many panels, at most ``most`` beside each other."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, list(panels[:count])


def _log_axes(panel: Any, ticks: Sequence[float], labels: Sequence[str], vertical: str) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(ticks, labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: vertical.format(value)))


def _apart(sizes: Sequence[float]) -> list[float]:
    """Those of ascending sizes that leave room for their labels on a log axis."""
    room = (sizes[-1] / sizes[0]) ** 0.12
    kept = list(sizes[:1])
    for size in sizes[1:]:
        if size >= room * kept[-1]:
            kept.append(size)
    return kept


@styled
def _speedups(found: Sequence[Sequence[Record]]) -> Figure:
    """One panel per op and size; a peer looks the same in all of them."""
    figure, panels = _panels(len(found), _COLUMNS, (2.3, 2.0))
    peers = Counter(peer for records in found for r in records for peer in r.speedup)
    looks = {
        peer: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index // len(_COLOURS) % len(_MARKERS)],
        }
        for index, (peer, _) in enumerate(peers.most_common())
    }
    lines: dict[str, Any] = {}
    for panel, records in zip(panels, found, strict=True):
        lines |= _speedup(panel, [r for r in records if 0 < r.sparsity < 100], looks)
    order = [*(f"vs {peer}" for peer in looks), *lines]
    lines = {name: lines[name] for name in dict.fromkeys(order) if name in lines}
    for panel in panels[::_COLUMNS]:
        panel.set_ylabel("speed-up over peer")
    figure.legend(
        lines.values(), lines, loc="outside upper left", ncols=4, fontsize=7, handlelength=2.5
    )
    return figure


def _speedup(
    panel: Any, records: Sequence[Record], looks: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Draw one op at one size; returns lines by what they are."""
    lines = {}
    for peer in dict.fromkeys(peer for r in records for peer in r.speedup):
        points = [(1 - r.sparsity / 100, r.speedup[peer]) for r in records if peer in r.speedup]
        x = [density for density, _ in points]
        (lines[f"vs {peer}"],) = panel.plot(
            x, [s.median for _, s in points], ms=2.5, lw=1.1, **looks[peer]
        )
        low, high = [s.p20 for _, s in points], [s.p80 for _, s in points]
        panel.fill_between(x, low, high, color=looks[peer]["color"], alpha=0.15, lw=0)
    work = _PRUNED_WORK.get(records[0].op, 1.0)
    ends = [1.0, *(1 - r.sparsity / 100 for r in records)]
    ideal = [1 / (1 - work + work * end) for end in ends]
    (lines["if time fell with operations"],) = panel.plot(ends, ideal, "--", color=GREY, lw=0.8)
    panel.axhline(1.0, color=INK, lw=0.6)
    ticks = sorted({1.0, *(round(1 - r.sparsity / 100, 4) for r in records)})
    ticks = _apart(ticks)[::-1]
    _log_axes(panel, ticks, [f"{100 * (1 - tick):g}" for tick in ticks], "{:g}x")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.8), high)
    lines["we are slower"] = panel.axhspan(panel.get_ylim()[0], 1.0, color=PALE, alpha=0.5, lw=0)
    panel.invert_xaxis()
    panel.set_title(f"{records[0].op}\n{fill(in_words(records[0].shape), 40)}", fontsize=7)
    panel.set_xlabel("% of weights pruned")
    return lines


@styled
def _stages(records: Sequence[Record]) -> Figure:
    record = records[-1]
    names = [*record.speedup, record.subject]
    walls = [record.contenders[name].wall for name in names]
    rates = [1 / wall.median for wall in walls]
    figure = Figure(figsize=(6.2, 0.45 * len(names) + 1.0), layout="constrained")
    panel = figure.subplots()
    errors = [
        [rate - 1 / wall.p80 for rate, wall in zip(rates, walls, strict=True)],
        [1 / wall.p20 - rate for rate, wall in zip(rates, walls, strict=True)],
    ]
    places = range(len(names))[::-1]
    panel.barh(places, rates, xerr=errors, color=_COLOURS[: len(names)], ecolor=INK, height=0.6)
    gains = ["", *(f"   {new / old:.1f}x" for old, new in pairwise(rates))]
    if len(gains) == len(_ADDED) + 1:
        gains[1:] = [f"{gain} by {by}" for gain, by in zip(gains[1:], _ADDED, strict=True)]
    for place, rate, gain in zip(places, rates, gains, strict=True):
        panel.text(rate * 1.12, place, f"{rate:,.0f}{gain}", va="center", fontsize=7)
    panel.set_yticks(places, names)
    panel.set_xscale("log")
    panel.set_xlim(min(rates) / 4, max(rates) * 40)
    panel.set_xlabel("agent-steps per second, log scale")
    panel.set_title(
        f"PPO on CartPole: {in_words(record.shape)} an iteration\n"
        f"the last stage prunes {record.sparsity:g}% of the actor"
    )
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    write_atomic(path, buffer.getvalue())
    return path
