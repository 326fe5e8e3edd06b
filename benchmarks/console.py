"""What `run` shows, a line as each configuration finishes and tables with bars; and `compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from sparse_tickets.ceilings import BUSY

from .compare import FALSE_ALARMS, Change, RunComparison
from .measure import Record, Refusal
from .results import SuiteRun, versions_in_words
from .tables import NOISY, Table, duration, tables

_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"
_VERDICTS = {"slower": "red", "faster": "green", "unknown": "yellow", "same": "dim"}
# What two runs must have in common, or peers changed for other reasons than the machine's.
_ALIKE = ("device", "hardware", "threads", "versions")


def bar(value: float, largest: float, width: int = _BAR) -> str:
    """A bar of at most ``width`` characters, to an eighth of one."""
    if largest <= 0 or value <= 0:
        return ""
    eighths = round(8 * width * value / largest)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def show_line(
    console: Console, index: int, total: int, outcome: Record | Refusal, left: str = ""
) -> None:
    """One configuration, done; ``left`` ends the line."""
    head = f"[dim]{index:3}/{total}[/dim] {outcome.label:58}"
    if isinstance(outcome, Refusal):
        console.print(f"{head} [red]refused[/red] {outcome.reason}{left}", soft_wrap=True)
        return
    if outcome.unit == "agent-step":
        result = f"{outcome.per_second:,.0f} agent-steps/s"
    else:
        result = duration(outcome.contenders[outcome.subject].wall.median)
    # As in the tables: a win or a loss is one only if the spread says so.
    ratios = []
    for peer, spread in outcome.speedup.items():
        colour = "green" if spread.p20 > 1 else "red" if spread.p80 < 1 else "yellow"
        ratios.append(f"[{colour}]{spread.median:.2f}x[/{colour}] {peer}")
    line = f"{head} {result}  {', '.join(ratios)}{left}"
    console.print(line, highlight=False, soft_wrap=True)


def show_run(console: Console, run: SuiteRun) -> None:
    """Every table of the run."""
    for table in tables(run, brief=True):
        show_table(console, table)
    console.print(f"~ spread (p20-p80) above {NOISY:.0%} either way", highlight=False)
    versions = versions_in_words(run.versions)
    console.print(
        f"{run.hardware}; {run.threads} threads; {versions}; commit {run.commit}", highlight=False
    )
    warn_if_busy(console, run)


def show_table(console: Console, table: Table) -> None:
    """One table with its notes."""
    console.print(_rich(table))
    for note in table.notes:
        console.print(f"  {note}", style="dim", markup=False, highlight=False)
    console.print()


def show_comparison(
    console: Console, pairs: Sequence[tuple[SuiteRun, SuiteRun]], found: RunComparison
) -> None:
    """Ops, then single configurations that changed, and what could have been seen."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for old, new in pairs:
        say(f"{old.date[:16]} {old.commit} -> {new.date[:16]} {new.commit}")
        changed = [name for name in _ALIKE if getattr(old, name) != getattr(new, name)]
        if changed:
            say(
                f"[yellow]Their {' and '.join(changed)} differ, so peers changed for that reason "
                "too: what is said of ours is relative to them.[/yellow]"
            )
    if found.ops:
        console.print(_ops(found.ops))
    for change in found.configurations:
        if change.verdict in ("slower", "faster"):
            say(
                f"{_coloured(change.verdict)} {change.label}, {change.kind}: "
                f"{_percent(change.ours)} beyond what {change.against} changed by"
            )
    for text in _limits(found):
        say(text)


def _ops(changes: Sequence[Change]) -> RichTable:
    grid = RichTable(title="Time of an op, all levels together", box=box.SIMPLE_HEAD)
    grid.title_justify = "left"
    for column in ("op", "caches", "levels"):
        grid.add_column(column, justify="right" if column == "levels" else "left")
    for column in ("machine", "ours beyond it", "visible from"):
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("verdict")
    for change in changes:
        against = "" if change.against == "peers" else f", against {change.against}"
        visible = "-" if math.isinf(change.visible) else _percent(change.visible)
        grid.add_row(
            change.label + against,
            change.kind,
            str(change.count),
            _percent(change.machine),
            _percent(change.ours),
            visible,
            _coloured(change.verdict),
        )
    return grid


def _limits(found: RunComparison) -> list[str]:
    """How to read the table, and what these runs cannot tell."""
    said = []
    alone = sorted(c.visible for c in found.configurations if not math.isinf(c.visible))
    if found.ops:
        said.append(
            "Machine: what the peers' times changed by, whose code is the same. Visible from: the "
            "smallest slow-down of ours that noise between these runs would not explain; noise is "
            "what peers changed by beyond one another."
        )
    if alone:
        said.append(
            f"A single configuration shows a change from {_percent(alone[0])} at best, "
            f"{_percent(median(alone))} typically. Runs of the same code raise an alarm in the "
            f"table once in {1 / FALSE_ALARMS:.0f} comparisons, and as often below it. For smaller "
            "changes give several pairs, measured in turn: compare OLD NEW OLD NEW."
        )
    if any(change.verdict == "unknown" for change in found.ops):
        said.append(
            "[yellow]unknown: too few peers ran in both, so noise cannot be told from change."
            "[/yellow]"
        )
    if found.left_out:
        said.append(f"Nobody ran beside us, not compared: {', '.join(found.left_out)}.")
    said.append(f"{len(found.slower)} slower beyond noise")
    return said


def _coloured(verdict: str) -> str:
    return f"[{_VERDICTS[verdict]}]{verdict}[/{_VERDICTS[verdict]}]"


def _percent(factor: float) -> str:
    """``+30%`` of 1.3."""
    return f"{100 * (factor - 1):+.0f}%"


def warn_if_busy(console: Console, run: SuiteRun) -> None:
    """Idle threads spin: beside other work, whoever uses more threads loses more."""
    if run.busy > BUSY:
        console.print(
            f"[yellow]Other processes used {run.busy:.0%} of the cores: neither times nor ratios "
            "can be trusted. Run it again on a quiet machine.[/yellow]"
        )


def _rich(table: Table) -> RichTable:
    grid = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        text = index == 0 or column == "reason"
        width = None if text else max(len(row[index]) for row in table.rows)
        grid.add_column(column, justify="left" if text else "right", min_width=width)
    largest = max(table.bars, default=0.0)
    if table.bars:
        grid.add_column(table.bars_are, no_wrap=True, min_width=_BAR)
    for index, row in enumerate(table.rows):
        extra = [f"[cyan]{bar(table.bars[index], largest)}[/cyan]"] if table.bars else []
        grid.add_row(*row, *extra)
    return grid
