"""Pictures of a run: speed-up against density on log axes beside the ideal, and the whole job."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparse_tickets.analysis.style import DPI, GREY, INK, styled
from sparse_tickets.files import write_atomic

from .measure import Record
from .results import Run
from .tables import groups

__all__ = ["draw"]

# Okabe and Ito's colours, by peer in order of appearance.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
# The share of the work that pruning touches: an actor-critic's critic stays dense.
_PRUNED_WORK = {"PPO iteration": 0.5}


def draw(run: Run, folder: Path) -> list[Path]:
    """Every picture the run has data for, as PNG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [
        records
        for records in groups(run)
        if len([r for r in records if 0 < r.sparsity < 100 and r.speedup]) > 1
    ]
    paths = []
    if curves:
        paths.append(_save(_speedups(curves), folder / f"{run.device}-speedup.png"))
    stages = [record for record in run.records if record.op.startswith("whole job")]
    if stages:
        paths.append(_save(_stages(stages[-1]), folder / f"{run.device}-whole-job.png"))
    return paths


@styled
def _speedups(curves: Sequence[Sequence[Record]]) -> Figure:
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.3, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.set_visible(False)
    for panel, records in zip(panels.flat, curves, strict=False):
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
def _stages(record: Record) -> Figure:
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
