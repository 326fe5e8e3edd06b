"""`sparse-tickets inspect`: what the compiler made of every GPU kernel, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich import box
from rich.markup import escape
from rich.table import Table

from sparse_tickets.kernels.compile import (
    Report,
    compile_ops,
    ops_with_kernels,
)
from sparse_tickets.kernels.dispatch import has_triton
from sparse_tickets.kernels.machine_code import CAPABILITIES

__all__ = ["inspect", "inspect_table", "plain"]


def inspect(
    ops: Sequence[str] = (),
    capabilities: Sequence[int] = (),
    *,
    everything: bool = False,
    on_report: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Compile shipped kernel configurations and read the machine code.

    Args:
        ops: folders under ``kernels/``; all that have GPU kernels by default.
        capabilities: e.g. ``[90]``; Ampere, Hopper and Blackwell by default.
        everything: every configuration, not a few per kernel.
        on_report: called with each report as it comes, from any thread.

    Returns:
        One report per configuration and capability; `Report.problems` says what is wrong.

    Raises:
        ValueError: an unknown op or capability, or no Triton to compile with.
        CompileError: a kernel does not compile.
    """
    if not has_triton():
        raise ValueError("inspect needs the triton package, which is not installed")
    known = ops_with_kernels()
    chosen, targets = list(ops) or known, list(capabilities) or list(CAPABILITIES)
    for name, given, allowed in (("op", chosen, known), ("arch", targets, CAPABILITIES)):
        for value in given:
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, got {value}"
                )
    return compile_ops(chosen, targets, smoke=not everything, on_report=on_report)


def inspect_table(reports: Sequence[Report]) -> Table:
    """One row per configuration and architecture, what must not be in red."""
    table = Table(box=box.SIMPLE_HEAD, title="GPU kernels, as compiled", title_justify="left")
    table.add_column("configuration", overflow="fold")
    table.add_column("arch", no_wrap=True)
    for name in ("registers", "spills", "shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("occupancy, limit", "matrix instructions"):
        table.add_column(name, no_wrap=True)
    for position, report in enumerate(reports):
        if position and report.op != reports[position - 1].op:
            table.add_section()
        table.add_row(
            escape(f"{report.op} {report.case}"),
            f"sm_{report.capability}",
            f"{report.registers}",
            f"[red]{report.spills} B[/red]" if report.spills else "0",
            f"{report.shared / 1024:.0f} KB",
            f"{report.occupancy.share:4.0%} {report.occupancy.limit}",
            "[red]none[/red]" if _misses_matrix(report) else ", ".join(report.matrix) or "-",
        )
    wrong = [
        f"sm_{report.capability} {report.op}/{report.case}: {problem}"
        for report in reports
        for problem in report.problems
    ]
    table.caption = (
        escape("\n".join(wrong)) if wrong else f"{len(reports)} configurations, no problems"
    )
    table.caption_justify = "left"
    table.caption_style = "red" if wrong else "dim"
    return table


def plain(reports: Sequence[Report]) -> list[dict[str, object]]:
    """The reports as data, with what follows from them."""
    return [
        {
            **asdict(report),
            "occupancy": report.occupancy._asdict(),
            "problems": report.problems,
        }
        for report in reports
    ]


def _misses_matrix(report: Report) -> bool:
    return report.needs_matrix and not report.matrix
