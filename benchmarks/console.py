"""What `run` shows: a line as each configuration finishes, and at the end tables with bars."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .measure import Record, Refusal
from .results import BUSY, Run
from .tables import NOISY, Table, duration, tables

__all__ = ["show_line", "show_run", "show_table", "warn_if_busy"]

_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


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


def show_run(console: Console, run: Run) -> None:
    """Every table of the run."""
    for table in tables(run, brief=True):
        show_table(console, table)
    console.print(f"~ spread (p20-p80) above {NOISY:.0%} either way", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
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


def warn_if_busy(console: Console, run: Run) -> None:
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
