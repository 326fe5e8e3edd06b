"""The numbers in the top README, between markers: programs as they run, no isolated calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_tickets.files import write_atomic

from . import brief, jobs, steps
from .results import SuiteRun


def rewrite(
    page: Path,
    runs: Mapping[str, Sequence[SuiteRun]],
    loops: Path | None = None,
    whole: Path | None = None,
) -> Path:
    """Write all texts between their markers in ``page``; the rest stays as it is.

    Args:
        page: to rewrite.
        runs: newest runs by device.
        loops: the file of whole steps, if there is one.
        whole: the file of whole jobs, if there is one.

    Raises:
        ValueError: the page lacks a pair of markers, or has it twice.
    """
    text, run = page.read_text(encoding="utf-8"), brief.widest(runs)
    bodies = {
        "steps": _not_yet("steps") if loops is None else steps.measured(loops),
        "jobs": _not_yet("jobs") if whole is None else jobs.measured(whole),
        "population": _not_yet("run")
        if run is None
        else f"{brief.population(run)}\n\n{brief.origin(run)}",
        "losses": _not_yet("steps") if loops is None else steps.lost(loops),
    }
    for name, body in bodies.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
        found = len(pattern.findall(text))
        if found != 1 or text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have the markers {begin} and {end}, once and in order")
        text = pattern.sub(lambda _, body=body: f"\n{body}\n", text)
    write_atomic(page, text.encode())
    return page


def _not_yet(command: str) -> str:
    return (
        f"Not measured yet: `python -m benchmarks {command}`, then `python -m benchmarks report`."
    )
