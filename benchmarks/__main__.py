"""The command line of the benchmarks: run, report, compare, instructions."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sparse_tickets.ceilings import measure_ceilings
from sparse_tickets.timing import Budget, pinned_threads

from .compare import compare
from .console import show_line, show_run, warn_if_busy
from .first_screen import rewrite
from .instructions import count_instructions
from .measure import Refusal, measure
from .report import write_report
from .results import RESULTS, Neighbours, load, newest, provenance, save
from .suites import SUITES, suite

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for a regression, a refusal or bad input."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    options = _parser().parse_args(arguments)
    try:
        return options.command(options, console)
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="verify and time a suite")
    run.set_defaults(command=_run)
    run.add_argument("--suite", choices=list(SUITES), default="quick")
    run.add_argument("--out", type=Path, help="default: results/<device>-<date>.json")
    run.add_argument("--device", default="cpu")
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    run.add_argument("--rounds", type=int, default=Budget.rounds)
    run.add_argument("--only", default="", help="configurations whose label contains this")

    report = commands.add_parser("report", help="results -> README.md and figures")
    report.set_defaults(command=_report)
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--out", type=Path, default=Path(__file__).parent)
    report.add_argument(
        "--readme",
        type=Path,
        default=Path(__file__).parents[1] / "README.md",
        help="whose measured and losses markers are filled in",
    )

    two = commands.add_parser("compare", help="what became slower beyond noise")
    two.set_defaults(command=_compare)
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)

    count = commands.add_parser("instructions", help="instructions per call under valgrind")
    count.set_defaults(command=_instructions)
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {options.device} and torch sees no GPU")
    cases = [case for case in suite(options.suite, options.device) if options.only in case.label]
    if not cases:
        labels = "\n  ".join(case.label for case in suite(options.suite, options.device))
        raise ValueError(
            f"only must be part of a label, got {options.only!r}; there are:\n  {labels}"
        )
    budget = Budget(rounds=options.rounds)
    began, neighbours = time.perf_counter(), Neighbours()
    time.sleep(1.0)
    with pinned_threads(options.threads):
        ceilings = measure_ceilings(budget, options.device)
        run = provenance(options.suite, options.device, ceilings, options.rounds)
        run.busy = neighbours.share()
        warn_if_busy(console, run)
        for index, case in enumerate(cases, 1):
            outcome = measure(case, budget, options.device)
            if isinstance(outcome, Refusal):
                run.refused.append(outcome)
            else:
                run.records.append(outcome)
            show_line(console, index, len(cases), outcome)
            run.seconds, run.busy = time.perf_counter() - began, neighbours.share()
            path = save(run, options.out)
    console.print()
    show_run(console, run)
    console.print(f"{run.seconds:.0f} s; written to {path}", highlight=False)
    return 1 if run.refused else 0


def _report(options: argparse.Namespace, console: Console) -> int:
    runs = newest(options.results)
    pages = rewrite(options.readme, runs), write_report(options.out, runs)
    console.print(f"written to {pages[0]} and {pages[1]}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    changes = compare(load(options.old), load(options.new))
    slower = [change for change in changes if change.verdict == "slower"]
    for change in changes:
        if change.verdict == "same":
            continue
        colour = "red" if change.verdict == "slower" else "green"
        console.print(
            f"[{colour}]{change.verdict}[/{colour}] {change.label}, {change.measure}: "
            f"{change.old.median:.3g} ({change.old.p20:.3g}-{change.old.p80:.3g}) -> "
            f"{change.new.median:.3g} ({change.new.p20:.3g}-{change.new.p80:.3g})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{len(changes)} compared, {len(slower)} slower beyond noise")
    return 1 if slower else 0


def _instructions(options: argparse.Namespace, console: Console) -> int:
    return count_instructions(console)


if __name__ == "__main__":
    sys.exit(main())
