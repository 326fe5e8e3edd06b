"""What `sparse-tickets bench` prints: a bar per speed-up, losses hollow, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from sparse_tickets.bench.layer import DIRECTIONS, Bench, BenchLine
from sparse_tickets.bench.steps import StepBench
from sparse_tickets.ceilings import BUSY
from sparse_tickets.timing import Spread

__all__ = ["bench_table", "crossover", "microseconds", "steps_table"]

_BAR = 10


def bench_table(found: Bench) -> Group:
    """A table per direction with a bar per speed-up, losses hollow; what it says below."""
    parts: list[RenderableType] = [*_warning(found.busy)]
    for direction in DIRECTIONS:
        lines = [line for line in found.lines if line.direction == direction]
        if lines:
            parts += [_table(f"{direction}, {found.what}", lines), _said(lines), ""]
    rates = [rate.median / 1e9 for rate in found.ceilings.copies.values()]
    gflops = found.ceilings.sgemm.median / 1e9
    return Group(
        *parts,
        _hanging(
            (
                "speed-up",
                "time of nn.Linear over that of SparseLinear, in warm repeats of each that took "
                "turns, with pauses: median, and half of p80 - p20. Above 1 we are faster. Both "
                "results were verified first.",
            ),
            (
                "loop",
                "the same where the two are called in turn, one call each and no pause, as a "
                "program does: caches and threads are as the other left them.",
            ),
            (
                "bound",
                "no kernel that keeps the weight so can be faster on this machine: its operations "
                f"at {gflops:,.0f} GFLOP/s, the rate of a large product here, or its bytes at "
                f"{min(rates):.3g}-{max(rates):.3g} GB/s, that of a copy by size; whichever "
                "takes longer.",
            ),
            ("crossover", "the sparsity from which we are faster, between measured ones."),
            ("reached", "the bound over our time: 100% is the machine's limit."),
            ("plan", "how the weight is kept: csr is compressed rows, dense torch's own layout."),
        ),
    )


def steps_table(found: StepBench) -> Group:
    """Times and speed-ups of whole steps; what it says below."""
    table = Table(
        title=f"a whole training step, {found.what}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    columns = ("pruned", "dense", "torch's Adam", "speed-up", "", "our Adam", "speed-up", "")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in found.lines:
        cells = []
        for time, gain in ((line.by_torch, line.gain_by_torch), (line.by_us, line.gain_by_us)):
            speedup = f"[{_colour(gain)}]{gain.median:.2f}x[/{_colour(gain)}]"
            cells += [microseconds(time.median), speedup, f"± {gain.noise:.0%}"]
        table.add_row(f"{line.sparsity:g}%", microseconds(line.dense.median), *cells)
    words = _hanging(
        (
            "a step",
            "zero_grad, forward, loss, backward, clipping by the norm and Adam, in a plain loop "
            "without pauses. Gradients were verified first.",
        ),
        (
            "dense",
            "the same policy of nn.Linear layers, not pruned, with torch's fused Adam.",
        ),
        (
            "our Adam",
            "sparse_tickets.optim.Adam, torch's arguments: steps the kept weights, and clips.",
        ),
    )
    return Group(*_warning(found.busy), table, words, "")


def crossover(points: Sequence[tuple[float, Spread]]) -> str:
    """From which sparsity on a speed-up lies above 1, interpolated between measured ones.

    A level counts as won only if its whole p20-p80 spread lies above 1.

    Args:
        points: sparsity and speed-up, ascending.
    """
    if not points:
        return "not measured"
    won = [spread.p20 > 1 for _, spread in points]
    if all(won):
        return f"faster at every level measured, from {points[0][0]:g}%"
    if not won[-1]:
        return f"not reached up to {points[-1][0]:g}%"
    last_loss = max(index for index, is_won in enumerate(won) if not is_won)
    (low, slow), (high, fast) = points[last_loss], points[last_loss + 1]
    below, above = math.log(slow.median), math.log(fast.median)
    if below >= 0:
        return f"within noise at {low:g}%, faster from {high:g}%"
    return f"about {low + (high - low) * -below / (above - below):.0f}%"


def _said(lines: Sequence[BenchLine]) -> Table:
    """From where on sparsity pays, and why each plan was chosen."""
    rows = [("crossover", crossover([(line.sparsity, line.speedup) for line in lines]))]
    for _, several in groupby(lines, lambda line: (line.plan.backend, line.plan.format)):
        alike = list(several)
        ends = dict.fromkeys((f"{alike[0].sparsity:g}", f"{alike[-1].sparsity:g}"))
        # Of neighbours with the same plan, the last one's reason.
        plan = alike[-1].plan
        rows.append((f"plan at {'-'.join(ends)}%", f"{plan.backend}/{plan.format}: {plan.reason}"))
    return _hanging(*rows)


def _table(title: str, lines: Sequence[BenchLine]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in ("pruned", "dense", "ours", "speed-up", ""):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    for column in ("loop", "bound", "reached"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    longest = max((line.speedup.median for line in lines), default=1.0)
    for line in lines:
        gain = line.speedup
        colour = _colour(gain)
        bar = ("█" if gain.median >= 1 else "░") * max(1, round(_BAR * gain.median / longest))
        table.add_row(
            f"{line.sparsity:g}%",
            microseconds(line.dense.median),
            microseconds(line.ours.median),
            f"[{colour}]{gain.median:.2f}x[/{colour}]",
            f"± {gain.noise:.0%}",
            f"[{colour}]{bar}[/{colour}]",
            f"{line.loop.median:.2f}x",
            microseconds(line.bound),
            f"{line.reached:.0%}",
            line.plan.format,
        )
    return table


def _warning(busy: float) -> list[str]:
    """What to say of a machine that others used meanwhile."""
    if busy <= BUSY:
        return []
    return [
        f"[yellow]Other processes used {busy:.0%} of the cores: neither times nor ratios "
        "can be trusted.[/yellow]"
    ]


def _colour(gain: Spread) -> str:
    """A win or a loss is one only if the whole spread lies on that side of 1."""
    return "green" if gain.p20 > 1 else "red" if gain.p80 < 1 else "yellow"


def _hanging(*rows: tuple[str, str]) -> Table:
    """Words and what is said of them, each in a column of its own."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def microseconds(seconds: float) -> str:
    """``4.2 us``, ``970 us``, ``12.3 ms``: three digits."""
    value, unit = (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "us")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f} {unit}"
