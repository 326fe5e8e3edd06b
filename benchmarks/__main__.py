"""The command line: every command is a function, and its arguments are the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console

from . import steps
from .cleanrl_jobs import run_cleanrl
from .compare import compare
from .console import show_comparison, warn_if_busy
from .first_screen import rewrite
from .job_returns import run_returns
from .jobs import run_jobs
from .report import write_report
from .results import RESULTS, load, newest, newest_table
from .runner import run_suite
from .scheduling import run_scheduling
from .simulators import run_simulators

HERE = Path(__file__).parent


def report(
    console: Console,
    results: Path = RESULTS,
    out: Path = HERE,
    readme: Path = HERE.parent / "README.md",
) -> None:
    """Make README.md and figures of the results.

    Args:
        console: where to say what was written.
        results: folder of the runs.
        out: folder of the page and the figures.
        readme: the page whose markers are filled in.
    """
    runs = newest(results)
    whole_steps, jobs = (newest_table(results / name) for name in ("steps", "jobs"))
    pages = rewrite(readme, runs, whole_steps, jobs), write_report(out, runs, whole_steps)
    console.print(f"written to {pages[0]} and {pages[1]}", highlight=False, soft_wrap=True)


def compare_runs(console: Console, results: tyro.conf.Positional[tuple[Path, ...]]) -> int:
    """Tell what became slower by more than the machine did, between two versions of the code.

    One pair of files sees large changes; several, measured in turn (old, new, old, new), see
    smaller ones.

    Args:
        console: where the table goes.
        results: OLD NEW, one or more pairs.
    """
    runs = [load(path) for path in results]
    if not runs or len(runs) % 2:
        raise ValueError(f"results must come in pairs, OLD NEW, got {len(runs)} files")
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    for run in runs:
        warn_if_busy(console, run)
    found = compare(pairs)
    show_comparison(console, pairs, found)
    return 1 if found.slower else 0


COMMANDS = {
    "run": run_suite,
    "report": report,
    "compare": compare_runs,
    "steps": steps.run_steps,
    "jobs": run_jobs,
    "cleanrl": run_cleanrl,
    "returns": run_returns,
    "simulators": run_simulators,
    "scheduling": run_scheduling,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for a regression, a refusal or bad input."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    commands = {name: partial(command, console) for name, command in COMMANDS.items()}
    try:
        found = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m benchmarks", description=__doc__, args=arguments
        )
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 1
    return found if isinstance(found, int) else 0


if __name__ == "__main__":
    sys.exit(main())
