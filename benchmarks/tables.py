"""A run as tables of text, the same for the terminal and for README.md: losses beside wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse_tickets.bench.tables import crossover as interpolated
from sparse_tickets.timing import Spread

from .cases import FUSED_DENSE
from .measure import Record
from .ppo_job import KFLOP_PER_STEP
from .results import SuiteRun

NOISY = 0.1
"""Spreads above this share of the median are marked ``~`` in brief tables."""

_BASELINE = {
    "linear forward": "torch dense",
    "linear forward+backward": "torch dense",
    "policy forward+backward": "torch w*mask",
    "PPO iteration": FUSED_DENSE,
}
STAGES = "whole job, gains told apart"
"""The op whose contenders are stages, each faster than the one before."""
_WORDS = {
    "P": "{:g} tickets",
    "B": "batch {:g}",
    "envs": "{:g} copies",
    "steps": "{:g} steps",
    "block": "blocks of {0:g} x {0:g}",
    "threads": "{:g} threads",
    "iterations": "{:g} iterations",
    "density": "{:g}% kept",
}
_ROOFLINE = (
    "Bound: the operations of the format at this run's sgemm rate, or its bytes at the rate of a "
    "copy of as many, whichever takes longer."
)
# The kinds of times, where a table's title names them, and what such a time is.
_KINDS = {
    "wall": ("", ""),
    "cold": (
        ", cold caches",
        "One call after every cache was overwritten and a pause; waking threads counts.",
    ),
    "replay": (
        ", CUDA graph",
        "A call replayed from a CUDA graph: the kernels without their launches.",
    ),
}


@dataclass
class Table:
    """A titled grid.

    Attributes:
        title: op and sizes.
        columns: headings; the first column is text, the others are numbers.
        rows: cells.
        bars: a value per row to draw as a bar, or none.
        bars_are: what the bars show.
        notes: sentences below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    bars: list[float] = field(default_factory=list)
    bars_are: str = ""
    notes: list[str] = field(default_factory=list)


def tables(run: SuiteRun, *, brief: bool = False) -> list[Table]:
    """Every group of records as a table; ``brief`` ones have no spreads and no plans.

    Sizes measured at one sparsity only, as for curves, share a table per op.
    """
    result = []
    for records in _joined(groups(run)):
        if records[0].op == STAGES:
            result += [_stages(record, run, brief) for record in records]
        elif records[0].unit == "agent-step":
            result.append(_throughput(records, run, brief))
        else:
            kinds = (kind for kind in _KINDS if any(time_of(record, kind) for record in records))
            result += [_latency(records, run, brief, kind) for kind in kinds]
    if run.refused:
        refused = Table("Refused: wrong results are not timed", ["configuration", "reason"])
        refused.rows = [[refusal.label, refusal.reason] for refusal in run.refused]
        result.append(refused)
    return result


def _joined(found: Sequence[list[Record]]) -> list[list[Record]]:
    """Groups of a single record joined by op, where the first of them stood."""
    joined: dict[object, list[Record]] = {}
    for records in found:
        single = len(records) == 1 and records[0].op != STAGES
        joined.setdefault(records[0].op if single else records[0].table, []).extend(records)
    return list(joined.values())


def groups(run: SuiteRun) -> list[list[Record]]:
    """Records of one op and shape, sparsities ascending."""
    found: dict[tuple, list[Record]] = {}
    for record in run.records:
        found.setdefault(record.table, []).append(record)
    return [sorted(records, key=lambda record: record.sparsity) for records in found.values()]


def crossover(records: Sequence[Record], peer: str) -> str:
    """From which sparsity on ``records`` beat ``peer``; see `sparse_tickets.bench.crossover`."""
    return interpolated([(r.sparsity, r.speedup[peer]) for r in records if peer in r.speedup])


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds / 1e-9)} ns"


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _ratio(spread: Spread | None, brief: bool) -> str:
    if spread is None:
        return "-"
    if brief:
        return f"{'~' if spread.noise > NOISY else ''}{spread.median:.2f}x"
    return f"{spread.median:.2f}x ({spread.p20:.2f}-{spread.p80:.2f})"


def shape_of(record: Record) -> str:
    """``P = 1, B = 2048, ...``."""
    return ", ".join(f"{name} = {size}" for name, size in record.shape.items())


def in_words(shape: Mapping[str, float]) -> str:
    """``60 tickets, batch 128, width 64`` of ``{"P": 60, "B": 128, "width": 64}``."""
    if "I" in shape and "O" in shape:
        shape = dict(shape)
        inp, out = shape.pop("I"), shape.pop("O")
        shape["width" if inp == out else f"{inp:g} to"] = out
    said = (_WORDS.get(name, f"{name} {{:g}}").format(size) for name, size in shape.items())
    return ", ".join(text.removesuffix("s") if text.startswith("1 ") else text for text in said)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """As Markdown; all columns but the first ``text`` are numbers."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rules = ["---" if index < text else "---:" for index in range(len(columns))]
    return "\n".join([line(columns), line(rules), *map(line, rows)])


def _heads(records: Sequence[Record], kind: str = "") -> tuple[str, str, list[str]]:
    """Title, and the first column: what was pruned, or the sizes too where they differ."""
    first, op = records[0], f"{records[0].op}{kind}"
    pruned = "actor pruned" if first.unit == "agent-step" else "pruned"
    if all(record.table == first.table for record in records):
        return f"{op}: {shape_of(first)}", pruned, [f"{r.sparsity:g}%" for r in records]
    cells = [f"{shape_of(record)}, {record.sparsity:g}%" for record in records]
    return f"{op}, by size", f"sizes, {pruned}", cells


def time_of(record: Record, kind: str) -> Spread | None:
    """Our time of a kind: ``wall``, ``cold`` or ``replay``."""
    return getattr(record.contenders[record.subject], kind)


def speedup_of(record: Record, kind: str) -> dict[str, Spread]:
    """Our speed-ups of a kind."""
    return getattr(record, "speedup" if kind == "wall" else f"{kind}_speedup")


def _peers(records: Sequence[Record], kind: str = "wall") -> list[str]:
    return list(dict.fromkeys(peer for record in records for peer in speedup_of(record, kind)))


def _latency(records: Sequence[Record], run: SuiteRun, brief: bool, kind: str) -> Table:
    """One kind of time; plans, bounds, crossovers and reasons stand with the warm ones."""
    peers, warm, said = _peers(records, kind), kind == "wall", _KINDS[kind]
    bounds = [run.bound(record) for record in records] if warm else []
    title, head, cells = _heads(records, said[0])
    columns = [head, "time"]
    columns += ["bound", "reached"] if any(bounds) else []
    columns += [f"vs {peer}" for peer in peers] + (["plan"] if warm and not brief else [])
    table = Table(title, columns)
    baseline = _BASELINE.get(records[0].op, peers[0] if peers else "")
    for index, record in enumerate(records):
        time, speedup = time_of(record, kind), speedup_of(record, kind)
        row = [cells[index], "-" if time is None else duration(time.median)]
        if any(bounds):
            bound = bounds[index]
            row += [duration(bound), f"{bound / time.median:.0%}"] if bound and time else ["-", "-"]
        row += [_ratio(speedup.get(peer), brief) for peer in peers]
        if warm and not brief:
            plan = record.contenders[record.subject].plan
            row.append(plan.split(" (")[0].split(": ")[-1] or "-")
        table.rows.append(row)
        table.bars.append(speedup[baseline].median if baseline in speedup else 0.0)
    table.bars_are = f"vs {baseline}" if any(table.bars) else ""
    table.notes += [said[1]] if said[1] else []
    if records[0].unit != "call":
        table.notes.append(f"Times are per {records[0].unit}.")
    if not warm:
        return table
    if any(bounds):
        table.notes.append(_ROOFLINE)
    if len({record.sparsity for record in records}) == len(records) > 1:
        table.notes += [f"Crossover with {peer}: {crossover(records, peer)}." for peer in peers]
    table.notes += _skipped(records)
    return table


def _throughput(records: Sequence[Record], run: SuiteRun, brief: bool) -> Table:
    spread = [] if brief else ["p20-p80"]
    peers = _peers(records)
    title, head, cells = _heads(records)
    columns = [head, "agent-steps/s", *spread, "of sgemm", *(f"vs {p}" for p in peers)]
    table = Table(title, columns, bars_are="agent-steps/s")
    for cell, record in zip(cells, records, strict=True):
        wall = record.contenders[record.subject].wall
        row = [cell, f"{record.per_second:,.0f}"]
        row += [] if brief else [f"{1 / wall.p80:,.0f}-{1 / wall.p20:,.0f}"]
        row += [f"{_efficiency(record.per_second, run):.2f}"]
        row += [_ratio(record.speedup.get(peer), brief) for peer in peers]
        table.rows.append(row)
        table.bars.append(record.per_second)
    table.notes.append(_yardstick(run))
    table.notes += [f"{peer}: {made}." for peer, made in _made(records, peers).items()]
    table.notes += _skipped(records)
    return table


def _stages(record: Record, run: SuiteRun, brief: bool) -> Table:
    """Each stage's gain over the one before; the subject, last and sparse, is the final stage."""
    spread = [] if brief else ["p20-p80"]
    columns = ["stage", "agent-steps/s", *spread, "gain"]
    table = Table(_heads([record])[0], columns, bars_are="agent-steps/s")
    names = [*record.speedup, record.subject]
    previous = None
    for name in names:
        wall = record.contenders[name].wall
        row = [name, f"{1 / wall.median:,.0f}"]
        row += [] if brief else [f"{1 / wall.p80:,.0f}-{1 / wall.p20:,.0f}"]
        table.rows.append([*row, "" if previous is None else f"{previous / wall.median:.2f}x"])
        table.bars.append(1 / wall.median)
        previous = wall.median
    table.notes.append(
        f"Gain: over the stage before. The last stage prunes {record.sparsity:g}% of the actor; "
        "the loop is timed on one policy, since its policies do not know of each other."
    )
    table.notes.append(_yardstick(run))
    return table


def _made(records: Sequence[Record], peers: Sequence[str]) -> dict[str, str]:
    """What other systems say of themselves: version, compilation before the clock started."""
    said = {
        peer: next(r.contenders[peer].plan for r in records if peer in r.contenders)
        for peer in peers
        if peer != FUSED_DENSE
    }
    return {peer: plan for peer, plan in said.items() if plan}


def _efficiency(per_second: float, run: SuiteRun) -> float:
    return per_second * KFLOP_PER_STEP * 1e3 / run.sgemm.median


def _yardstick(run: SuiteRun) -> str:
    return (
        f"Measured sgemm of this run: {run.sgemm.median / 1e9:.0f} GFLOP/s "
        f"({run.sgemm.p20 / 1e9:.0f}-{run.sgemm.p80 / 1e9:.0f}). Of sgemm: agent-steps/s x "
        f"{KFLOP_PER_STEP} kFLOP, whatever the sparsity, over it."
    )


def _skipped(records: Sequence[Record]) -> list[str]:
    reasons = {f"{name}: {why}" for record in records for name, why in record.skipped.items()}
    return [f"Not run - {reason}." for reason in sorted(reasons)]
