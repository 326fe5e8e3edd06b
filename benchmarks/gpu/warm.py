"""Compile ahead what will be measured: contenders of every case, every candidate, the sweep.

On a machine that has never run them, compiling would take most of the time there is for measuring,
and on one core. Here some processes do it side by side, while the tests run; Triton's and torch's
own caches on the disk keep what they made. Nothing is checked or timed, and what fails here fails
again, with its reason, where it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from sparse_tickets.kernels import tuning
from sparse_tickets.sweep.spec import Sweep

from ..clock import is_lost
from ..measure import Case, precision_of_torch
from ..suites import REAL, Sizes, targets
from .process import Work, say
from .sweep import COMPILING, sweep
from .table import forget_compiled
from .tune import Subject, candidates, questions, subjects


def part(work: Work) -> bool:
    """A share of everything."""
    folder = work.folder / "compiling"
    warm(REAL, COMPILING, work.device, folder, work.deadline, work.share, work.shares)
    return False


def warm(
    sizes: Sizes,
    spec: Sweep,
    device: torch.device,
    folder: Path,
    deadline: float,
    share: int,
    shares: int,
) -> None:
    """Compile one share of everything, or as much of it as there is time for.

    Args:
        sizes: of the table, and of what is tuned.
        spec: a brief sweep with the kernels of the real one.
        device: a GPU.
        folder: of the brief sweep's store.
        deadline: by `time.monotonic`; looked at between jobs.
        share: which, from 0 on.
        shares: how many processes do this.
    """
    for name, job in list(_jobs(sizes, spec, device, folder, deadline))[share::shares]:
        if time.monotonic() > deadline or is_lost(device):
            return
        try:
            job()
        except Exception as error:  # It fails again where it is measured, and is reported there.
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        else:
            say(name)
        forget_compiled(device)


def _jobs(
    sizes: Sizes, spec: Sweep, device: torch.device, folder: Path, deadline: float
) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "sweep", lambda: sweep(spec, folder, str(device), deadline, {}, lambda: None)
    # Of cases that differ in sparsity alone, one: they launch the same kernels.
    different = {case.table: case for case in targets(str(device), sizes)}
    for case in different.values():
        yield case.label, partial(_case, case)
    for subject in subjects(sizes, device):
        yield subject.name, partial(_subject, subject, deadline)


def _case(case: Case) -> None:
    with precision_of_torch(case.precision):
        contest = case.build()
        for contender in (contest.subject, *contest.peers):
            _launch(contender.name, contender.run)


def _subject(subject: Subject, deadline: float) -> None:
    contender = subject.build()
    for question in questions(contender):
        for candidate in candidates(question):
            if time.monotonic() > deadline:
                return
            with tuning.override(question.op, question.shapes, candidate):
                _launch(f"{question.op} {candidate}", contender.run)


def _launch(name: str, run: Callable[[], object]) -> None:
    """One that fails does not keep the others from being compiled."""
    try:
        run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
