"""Pictures of a device's runs, on log axes beside the ideal: speed-ups, scaling, the whole job."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparse_tickets.analysis.style import DPI, GREY, INK, styled
from sparse_tickets.files import write_atomic

from .measure import Record
from .results import Run, share_out
from .scaling import AXES, Curve, curves
from .tables import groups

__all__ = ["draw"]

# Okabe and Ito's colours, by peer in order of appearance.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
# The share of the work that pruning touches: an actor-critic's critic stays dense.
_PRUNED_WORK = {"PPO iteration": 0.5}


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Every picture that the runs of one device have data for, as PNG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [records for run in share_out(runs) for records in groups(run)]
    speedups = [
        records
        for records in tables
        if len([r for r in records if 0 < r.sparsity < 100 and r.speedup]) > 1
    ]
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


def _varied(found: Sequence[Curve]) -> int:
    """How many axes there are curves over."""
    return len({curve.axis for curve in found})


@styled
def _scaling(found: Sequence[Curve]) -> Figure:
    """One panel per axis; per curve our cost, its spread, and the ideal line."""
    axes = [axis for axis in AXES if any(curve.axis == axis for curve in found)]
    columns = min(len(axes), 3)
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(axes) :]:
        panel.set_visible(False)
    for panel, axis in zip(panels.flat, axes, strict=False):
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
        panel.set_xscale("log")
        panel.set_yscale("log")
        ticks = _apart(sorted({size for curve in chosen for size, _ in curve.points}))
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel(AXES[axis])
        panel.legend(fontsize=4.5)
    panels[0, 0].set_ylabel("milliseconds (dashed: ideal)")
    return figure


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
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.3, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.set_visible(False)
    for panel, records in zip(panels.flat, found, strict=False):
        kept = [r for r in records if 0 < r.sparsity < 100]
        peers = list(dict.fromkeys(peer for r in kept for peer in r.speedup))
        for peer, colour in zip(peers, _COLOURS, strict=False):
            points = [(1 - r.sparsity / 100, r.speedup[peer]) for r in kept if peer in r.speedup]
            x = [density for density, _ in points]
            panel.plot(x, [s.median for _, s in points], "o-", color=colour, ms=2.5, lw=1.1,
                       label=f"vs {peer}")  # fmt: skip
            low, high = [s.p20 for _, s in points], [s.p80 for _, s in points]
            panel.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        work = _PRUNED_WORK.get(records[0].op, 1.0)
        ends = [1.0, *(1 - r.sparsity / 100 for r in kept)]
        ideal = [1 / (1 - work + work * end) for end in ends]
        panel.plot(ends, ideal, "--", color=GREY, lw=0.8, label="ideal: by operations")
        panel.axhline(1.0, color=INK, lw=0.6)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.invert_xaxis()
        ticks = sorted({1.0, *(round(1 - r.sparsity / 100, 4) for r in kept)}, reverse=True)
        panel.set_xticks(ticks, [f"{100 * (1 - tick):g}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        sizes = " ".join(f"{name}={size}" for name, size in records[0].shape.items())
        panel.set_title(f"{records[0].op}\n{sizes}")
        panel.set_xlabel("% pruned")
        panel.legend(fontsize=5.5)
    panels[0, 0].set_ylabel("speed-up")
    return figure


@styled
def _stages(records: Sequence[Record]) -> Figure:
    record = records[-1]
    names = [*record.speedup, record.subject]
    walls = [record.contenders[name].wall for name in names]
    rates = [1 / wall.median for wall in walls]
    figure = Figure(figsize=(5.5, 0.45 * len(names) + 0.8), layout="constrained")
    panel = figure.subplots()
    errors = [
        [rate - 1 / wall.p80 for rate, wall in zip(rates, walls, strict=True)],
        [1 / wall.p20 - rate for rate, wall in zip(rates, walls, strict=True)],
    ]
    places = range(len(names))[::-1]
    panel.barh(places, rates, xerr=errors, color=_COLOURS[: len(names)], ecolor=INK, height=0.6)
    for place, rate in zip(places, rates, strict=True):
        panel.text(rate * 1.12, place, f"{rate:,.0f}", va="center", fontsize=7)
    panel.set_yticks(places, names)
    panel.set_xscale("log")
    panel.set_xlim(min(rates) / 2, max(rates) * 4)
    panel.set_xlabel("agent-steps/s")
    panel.set_title(f"PPO on CartPole: {record.sparsity:g}% of the actor pruned in the last stage")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    write_atomic(path, buffer.getvalue())
    return path
