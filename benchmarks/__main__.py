"""The command line: run, steps, jobs, cleanrl, returns, simulators, report and others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sparse_tickets.timing import Budget

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
from .scheduling import SIZES, run_scheduling
from .simulators import run_simulators
from .suites import SUITES

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
    run.add_argument("--fresh", action="store_true", help="do not go on with a stopped run")

    report = commands.add_parser("report", help="results -> README.md and figures")
    report.set_defaults(command=_report)
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--out", type=Path, default=Path(__file__).parent)
    report.add_argument(
        "--readme",
        type=Path,
        default=Path(__file__).parents[1] / "README.md",
        help="whose markers are filled in",
    )

    two = commands.add_parser(
        "compare",
        help="what became slower by more than the machine did",
        description="Compares results of two versions of the code. One pair of files sees large "
        "changes; several, measured in turn (old, new, old, new), see smaller ones.",
    )
    two.set_defaults(command=_compare)
    two.add_argument("results", type=Path, nargs="+", metavar="OLD NEW", help="one or more pairs")

    whole = commands.add_parser("steps", help="whole training steps in plain loops")
    whole.set_defaults(command=_steps)
    whole.add_argument("--rounds", type=int, default=7)
    whole.add_argument("--stretch", type=float, default=0.1, help="seconds of a turn")
    whole.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    whole.add_argument("--only", default="", help="problems whose label contains this")
    whole.add_argument("--out", type=Path, help="default: results/steps/<device>-<date>.json")

    jobs = commands.add_parser("jobs", help="whole jobs of Stable-Baselines3, dense and pruned")
    jobs.set_defaults(command=_jobs)
    jobs.add_argument("--rounds", type=int, default=5)
    jobs.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    jobs.add_argument("--only", default="", help="jobs whose label contains this")
    jobs.add_argument("--out", type=Path, help="default: results/jobs/<device>-<date>.json")

    scripts = commands.add_parser("cleanrl", help="CleanRL's scripts, dense and pruned")
    scripts.set_defaults(command=_cleanrl)
    scripts.add_argument("clone", type=Path, help="a clone of CleanRL")
    scripts.add_argument("--python", default=sys.executable, help="with what the scripts import")
    scripts.add_argument("--rounds", type=int, default=2)
    scripts.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    scripts.add_argument("--out", type=Path, help="default: results/jobs/<device>-<date>.json")

    returns = commands.add_parser("returns", help="what the same jobs learn, seed by seed")
    returns.set_defaults(command=_returns)
    returns.add_argument("--seeds", type=int, default=5)
    returns.add_argument("--only", default="", help="jobs whose label contains this")
    returns.add_argument("--out", type=Path, help="default: results/jobs/<device>-returns.json")

    slow = commands.add_parser("simulators", help="PPO where the simulator is a Python object")
    slow.set_defaults(command=_simulators)
    slow.add_argument("--rounds", type=int, default=5)
    slow.add_argument("--only", default="", help="environments whose name contains this")
    slow.add_argument("--out", type=Path, help="default: results/simulators/<device>-<date>.json")

    units = commands.add_parser("scheduling", help="what a sweep's driver costs per unit")
    units.set_defaults(command=_scheduling)
    units.add_argument("--units", type=int, nargs="+", default=SIZES)
    units.add_argument("--folder", type=Path, help="where stores are written and deleted again")
    units.add_argument("--out", type=Path, help="default: results/scheduling/<device>-<date>.json")

    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    return run_suite(
        console,
        name=options.suite,
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        only=options.only,
        out=options.out,
        fresh=options.fresh,
    )


def _steps(options: argparse.Namespace, console: Console) -> int:
    compiled = not options.no_compile
    steps.run_steps(console, options.rounds, options.stretch, compiled, options.only, options.out)
    return 0


def _jobs(options: argparse.Namespace, console: Console) -> int:
    run_jobs(console, options.rounds, tuple(options.threads), options.only, options.out)
    return 0


def _cleanrl(options: argparse.Namespace, console: Console) -> int:
    threads = tuple(options.threads)
    run_cleanrl(console, options.clone, options.python, options.rounds, threads, options.out)
    return 0


def _returns(options: argparse.Namespace, console: Console) -> int:
    run_returns(console, options.seeds, options.only, options.out)
    return 0


def _simulators(options: argparse.Namespace, console: Console) -> int:
    run_simulators(console, options.rounds, options.only, options.out)
    return 0


def _scheduling(options: argparse.Namespace, console: Console) -> int:
    run_scheduling(console, options.units, options.out, options.folder)
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    runs = newest(options.results)
    tables = (newest_table(options.results / name) for name in ("steps", "jobs"))
    pages = rewrite(options.readme, runs, *tables), write_report(options.out, runs)
    console.print(f"written to {pages[0]} and {pages[1]}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    runs = [load(path) for path in options.results]
    if len(runs) % 2:
        raise ValueError(f"results must come in pairs, OLD NEW, got {len(runs)} files")
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    for run in runs:
        warn_if_busy(console, run)
    found = compare(pairs)
    show_comparison(console, pairs, found)
    return 1 if found.slower else 0


if __name__ == "__main__":
    sys.exit(main())
