"""A whole CartPole sweep on a GPU, as many levels of it as the time allows.

It is the protocol's sweep of PPO, run by the library's own runner into a store of its own; what a
level took and what its tickets earned is read from the store's files.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.kernels import use_backend
from sparse_tickets.sweep.run import run as run_sweep
from sparse_tickets.sweep.spec import Sweep

from .process import Work

ASKED_S = 60.0
"""In which the sweep is to be done."""

REAL = Sweep(algos=("ppo",))
COMPILING = replace(
    REAL,
    ppo=replace(REAL.ppo, steps=3 * REAL.ppo.batch),
    evaluation=replace(REAL.evaluation, points=1),
)
"""Launches every kernel of `REAL`, and captures its graphs, in a few iterations a level."""

TINY = Sweep(
    algos=("ppo",),
    conditions=("mask/weights", "random/re-init"),
    seeds=1,
    levels=2,
    hidden=(8,),
    ppo=PPO(steps=64, copies=2, horizon=16, epochs=1, minibatches=2),
    evaluation=Evaluation(1, 1, 1),
)
"""For a rehearsal without a GPU."""

_EVERY_S = 5.0


class OutOfTime(Exception):
    """The deadline passed; finished levels are in the store."""


@dataclass
class _Watch:
    """Counts agent-steps, tells now and then, and stops the sweep at the deadline."""

    deadline: float
    tell: Callable[[int, str], None]
    steps: int = 0
    told: float = 0.0

    def advance(self, description: str, steps: int) -> None:
        self.steps += steps
        now = time.monotonic()
        if now - self.told > _EVERY_S:
            self.told = now
            self.tell(self.steps, description)
        if now > self.deadline:
            raise OutOfTime


def part(work: Work) -> bool:
    """The whole sweep, or as much of it as there is time for."""
    spec, backend = (TINY, "reference") if work.rehearse else (REAL, "auto")
    folder, device = work.folder / "sweep", str(work.device)
    sweep(spec, folder, device, work.deadline, work.found, work.keep, backend)
    return False


def sweep(
    spec: Sweep,
    folder: Path,
    device: str,
    deadline: float,
    found: dict[str, Any],
    save: Callable[[], None],
    backend: str = "auto",
) -> None:
    """Run ``spec`` until it is finished or the deadline passes.

    Args:
        spec: the sweep.
        folder: of its store; a store that is there is gone on with.
        device: where.
        deadline: by `time.monotonic`.
        found: filled in: what was asked for, what is finished, and how fast it went.
        save: called whenever `found` changed.
        backend: of every op.
    """
    tracks = sum(len(spec.tracks(level)) for level in range(spec.levels))
    found |= {
        "asked": {
            "env": spec.env,
            "algos": list(spec.algos),
            "seeds": spec.seeds,
            "conditions": list(spec.conditions),
            "levels": spec.levels,
            "steps": spec.ppo.steps,
            "trainings": tracks,
        },
        "complete": False,
        "levels_finished": 0,
        "levels": [],
    }
    began = time.monotonic()

    def tell(steps: int, description: str) -> None:
        seconds = time.monotonic() - began
        found.update(
            agent_steps=steps,
            sweep_seconds=seconds,
            agent_steps_per_second=steps / seconds if seconds else 0.0,
            at=description,
        )
        found["levels"] = _levels(folder)
        found["levels_finished"] = _finished(spec, found["levels"])
        found["projected_seconds"] = _projected(spec, found["levels"])
        save()

    watch = _Watch(deadline, tell)
    try:
        with use_backend(backend):
            run_sweep(spec, folder, device=device, on_progress=watch.advance)
        found["complete"] = True
    except OutOfTime:
        found["unfinished"] = "the time was up; finished levels are whole"
    finally:
        tell(watch.steps, "")


def _levels(folder: Path) -> list[dict[str, Any]]:
    """What every finished training of the store says, by level."""
    import pyarrow.parquet

    trainings: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("units/*-chunk-[0-9]*[0-9]/rows.parquet")):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            trainings[row["level"]].append(row)
    return [_level(level, rows) for level, rows in sorted(trainings.items())]


def _level(level: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_condition = defaultdict(list)
    for row in rows:
        by_condition[row["condition"]].append(row["return_final"])
    steps = sum(row["train_steps"] for row in rows)
    training = sum(row["train_s"] for row in rows)
    return {
        "level": level,
        "density": rows[0]["density"],
        "trainings": len(rows),
        "agent_steps": steps,
        "seconds": sum(row["wall_s"] for row in rows),
        "train_seconds": training,
        "agent_steps_per_second": steps / training if training else 0.0,
        "return_final": {
            name: {"median": median(values), "mean": mean(values)}
            for name, values in by_condition.items()
        },
    }


def _finished(spec: Sweep, levels: list[dict[str, Any]]) -> int:
    """How many levels, from the dense one on, are trained in full."""
    trained = {each["level"]: each["trainings"] for each in levels}
    level = 0
    while level < spec.levels and trained.get(level, 0) == len(spec.tracks(level)):
        level += 1
    return level


def _projected(spec: Sweep, levels: list[dict[str, Any]]) -> float | None:
    """Seconds of the whole sweep if levels to come are like the last one, all being equally large.

    None before the second level: the first trains fewer tickets.
    """
    done = levels[: _finished(spec, levels)]
    if len(done) < 2:
        return None
    return sum(level["seconds"] for level in done) + done[-1]["seconds"] * (spec.levels - len(done))
