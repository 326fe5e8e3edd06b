"""A sweep's progress: what is trained, how fast, how long it still takes; as a bar or in lines."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from sparse_tickets.kernels.compiling import on_compile
from sparse_tickets.sweep.spec import Sweep

__all__ = ["SweepProgress", "expert_steps", "total_steps"]

_BETWEEN_LINES_S = 30.0


def total_steps(spec: Sweep) -> int:
    """Agent-steps of a whole sweep, experts included (those of one round of tries)."""
    first, later = spec.cells
    pruned = later * (spec.levels - 1)
    steps = sum(
        first * spec.train_steps(algo, 0) + pruned * spec.train_steps(algo, 1)
        for algo in spec.algos
    )
    return steps + expert_steps(spec) if spec.imitating else steps


def expert_steps(spec: Sweep) -> int:
    """Agent-steps of one round of experts, and of their training once more where it is replayed;
    none where data sets take their place."""
    if spec.bc.dataset:
        return 0
    times = 2 if spec.bc.states == "replay" else 1
    return times * spec.bc.experts * spec.expert_budget.steps


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        if not speed:
            return Text("")
        return Text(f"{speed / 1000:,.0f}k steps/s", style="cyan")


class SweepProgress:
    """Shows a bar while its context is open; `advance` is what `run` calls.

    Where the console is no terminal, a line now and then takes the place of the bar.

    Args:
        sweeps: one that is run, or several.
        console: where to.
    """

    def __init__(self, sweeps: Sweep | Collection[Sweep], console: Console) -> None:
        sweeps = [sweeps] if isinstance(sweeps, Sweep) else sweeps
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:28}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%"),
            _Speed(Column(no_wrap=True)),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=sum(map(total_steps, sweeps)))
        self._next_line = time.monotonic()
        self._open = ExitStack()

    def __enter__(self) -> SweepProgress:
        self._open.enter_context(self._bar)
        self._open.enter_context(on_compile(self._compiling))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def _compiling(self, kernel: str | None) -> None:
        if kernel is not None:
            self.advance(f"compiling once: {kernel}", 0)

    def advance(self, description: str, steps: int) -> None:
        """Say what is under way and add the agent-steps just done."""
        self._bar.update(self._task, description=description, advance=steps)
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _BETWEEN_LINES_S
            self._console.print(self._line(), highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        task = self._bar.tasks[0]
        line = f"{task.percentage:3.0f}%  {task.description}"
        if task.speed:
            line += f", {task.speed / 1000:,.0f}k steps/s"
        if task.time_remaining is not None:
            minutes, seconds = divmod(round(task.time_remaining), 60)
            line += f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        return line
