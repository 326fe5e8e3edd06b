"""Runs a suite: a line per configuration, what is left to do, and a file that is never behind.

The file is written after every configuration. A run that was stopped goes on where it was, if the
machine, the code, the versions and the number of rounds are the same; otherwise it starts again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparse_tickets.ceilings import Neighbours, measure_ceilings
from sparse_tickets.timing import Budget, pinned_threads

from .clock import is_lost, make_timer
from .console import show_line, show_run, warn_if_busy
from .measure import Refusal, measure
from .results import PART, SuiteRun, default_path, load, provenance, save
from .suites import SUITES
from .suites import suite as cases_of

_SAME = ("device", "suite", "threads", "hardware", "versions", "commit", "rounds")


def run_suite(
    console: Console,
    *,
    suite: Literal[tuple(SUITES)] = "quick",
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = Budget.rounds,
    only: str = "",
    out: Path | None = None,
    fresh: bool = False,
) -> int:
    """Verify and time a suite; returns the exit status, 1 if a result was wrong.

    Args:
        console: where to say how it goes.
        suite: see `suites.SUITES`.
        device: ``cpu`` or a CUDA device.
        threads: of everyone; default: as many as torch takes.
        rounds: samples per contender.
        only: part of the labels of the configurations to run.
        out: the file; by default `results.default_path`.
        fresh: start again although a stopped run could go on.

    Raises:
        ValueError: no such suite, device or label.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {device} and torch sees no GPU")
    everything = cases_of(suite, device)
    cases = [case for case in everything if only in case.label]
    if not cases:
        labels = "\n  ".join(case.label for case in everything)
        raise ValueError(f"only must be part of a label, got {only!r}; there are:\n  {labels}")
    budget, began, neighbours = Budget(rounds=rounds), time.perf_counter(), Neighbours()
    timer = make_timer(torch.device(device)) if torch.device(device).type == "cuda" else None
    time.sleep(1.0)
    with pinned_threads(threads or torch.get_num_threads()):
        title = suite if len(cases) == len(everything) else suite + PART
        run = provenance(title, device, measure_ceilings(budget, device), rounds)
        run.busy = neighbours.share()
        warn_if_busy(console, run)
        path = default_path(run) if out is None else out
        before = None if fresh else _stopped(run, path, console)
        if before is not None:
            run = replace(before, refused=[])
            done = {record.label for record in run.records}
            cases = [case for case in cases if case.label not in done]
        spent, busy = (run.seconds, run.busy) if before else (0.0, 0.0)
        remaining = Remaining(len(cases))
        with _progress(console) as progress:
            task = progress.add_task(title, total=len(cases), left=remaining)
            for index, case in enumerate(cases, 1):
                outcome = measure(case, budget, device, timer)
                if isinstance(outcome, Refusal):
                    run.refused.append(outcome)
                else:
                    run.records.append(outcome)
                seconds = time.perf_counter() - began
                run.seconds = spent + seconds
                run.busy = (busy * spent + neighbours.share() * seconds) / run.seconds
                run.complete = index == len(cases)
                save(run, path)
                remaining.update(index, seconds)
                progress.advance(task)
                left = "" if console.is_terminal else f" [dim]{remaining}[/dim]"
                show_line(console, index, len(cases), outcome, left)
                if timer is not None and (timer.spoiled or is_lost(torch.device(device))):
                    # Nothing more can be timed here, see `clock`; the file has all there is.
                    again = "the GPU needs a new process: go on with the same command"
                    console.print(again, highlight=False)
                    return 1
    console.print()
    show_run(console, run)
    console.print(f"{run.seconds:.0f} s; written to {path}", highlight=False)
    return 1 if run.refused else 0


class Remaining:
    """How long the rest takes, if a configuration goes on taking what it took on average."""

    def __init__(self, total: int) -> None:
        self._total, self._seconds = total, 0.0

    def update(self, done: int, seconds: float) -> None:
        """After ``done`` configurations and ``seconds``."""
        self._seconds = seconds / done * (self._total - done)

    def __str__(self) -> str:
        if not self._seconds:
            return ""
        minutes, seconds = divmod(round(self._seconds), 60)
        return f"{minutes}:{seconds:02} left"


def _stopped(run: SuiteRun, path: Path, console: Console) -> SuiteRun | None:
    """The run that was stopped and that this one goes on with."""
    if not path.exists():
        return None
    before = load(path)
    if before.complete:
        return None
    changed = [name for name in _SAME if getattr(before, name) != getattr(run, name)]
    if changed:
        console.print(
            f"{path} was stopped after {len(before.records)} configurations, and "
            f"{', '.join(changed)} changed since: starting again",
            highlight=False,
            soft_wrap=True,
        )
        return None
    console.print(f"going on after {len(before.records)} configurations", highlight=False)
    return before


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )
