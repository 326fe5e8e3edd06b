"""Check a run against plain torch: the same cells again, by the reference of every op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from sparse_tickets.algos.evaluation import FINAL_INDEX, Evaluation
from sparse_tickets.envs import make_env
from sparse_tickets.files import StoreError
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population
from sparse_tickets.sweep.experts import stored_demonstrations
from sparse_tickets.sweep.run import cell_population, train_population
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store, Unit
from sparse_tickets.ticket import Ticket

__all__ = ["verify"]

# Training is chaotic: rounding alone flips sampled actions. Retrained returns are therefore held
# to a share of the range from random to dense, everything before training to equality.
RETURN_TOLERANCE = 0.25
EVALUATION_TOLERANCE = 0.02


class _Cell(NamedTuple):
    """A finished training: where it is stored, its ticket, and its row of the results."""

    unit: Unit
    ticket: Ticket
    row: dict[str, Any]

    @property
    def track(self) -> Track:
        return Track(self.ticket.seed, self.ticket.condition, self.ticket.controls)

    @property
    def start(self) -> Tensor:
        """The row training started from; at level 0 `rewind` may be a later snapshot."""
        return self.ticket.initial if self.unit.level == 0 else self.ticket.rewind

    def __str__(self) -> str:
        ticket = self.ticket
        return f"{self.unit.algo} {ticket.condition} seed {ticket.seed} level {self.unit.level}"


class _Again(NamedTuple):
    """What plain torch makes of a cell."""

    same_start: bool
    stored_weights: float
    retrained: float


def verify(path: str | Path, cells: int, console: Console) -> tuple[Table, bool]:
    """Retrain some finished cells by the reference ops and compare with what is stored.

    Three comparisons per cell: the mask and the weights training started from are drawn again and
    must be equal to the bit; the stored final weights are evaluated again and must give the stored
    return; and the cell is trained again from the start in plain torch, its return shown beside
    the stored one.

    Args:
        path: the run's folder.
        cells: how many cells; one of every algorithm and level before a second of any, and
            otherwise by a fixed hash.
        console: where progress is shown.

    Returns:
        The table, and whether every comparison holds.

    Raises:
        ValueError: cells below 1.
        StoreError: there is no run, or nothing is finished yet.
    """
    if cells < 1:
        raise ValueError(f"cells must be at least 1, got {cells}")
    store = Store(path)
    spec = Sweep.from_dict(store.spec)
    today = spec.to_dict()
    if today.get("critic_layout") != store.spec.get("critic_layout"):
        raise StoreError(
            f"{store.path} was run when random conditions took a pruned critic's mask from "
            "one-shot pruning: its table can be read, its cells cannot be retrained"
        )
    if today != store.spec:
        raise StoreError(
            f"{spec.env} scales observations otherwise than when {store.path} was run: it cannot "
            "be retrained with this version or plugin"
        )
    finished = [
        _Cell(unit, ticket, row)
        for unit in store.units()
        if store.has(unit)
        for ticket, row in zip(store.read_tickets(unit), store.read_rows(unit), strict=True)
        if not row.get("diverged")
    ]
    if not finished:
        raise StoreError(f"{store.path} has no finished unit yet: run the sweep")
    dense = max(cell.row["return_final"] for cell in finished)
    finished.sort(
        key=lambda cell: derive_key("verify", cell.unit.name, cell.track.condition, cell.track.seed)
    )
    taken: Counter[tuple[str, int]] = Counter()
    spread = []
    for cell in finished:
        place = cell.unit.algo, cell.unit.level
        spread.append((taken[place], cell))
        taken[place] += 1
    chosen = [cell for _, cell in sorted(spread, key=itemgetter(0))[:cells]]
    # Plain torch takes as long for one ticket as for several: what trains alike trains together.
    groups: dict[tuple[str, bool], list[_Cell]] = {}
    for cell in chosen:
        groups.setdefault((cell.unit.algo, cell.unit.level == 0), []).append(cell)

    table = Table(title=f"{spec.env}: {len(chosen)} cells again, in plain torch")
    for column in ("cell", "start", "stored weights", "stored return", "retrained", "verdict"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    agree = True
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        for (algo, _), group in groups.items():
            steps = len(group) * spec.train_steps(group[0].unit.level)
            bar = progress.add_task(f"{len(group)} {algo} cells in plain torch", total=steps)
            again = _again(spec, store, group, partial(progress.advance, bar))
            for cell, found in zip(group, again, strict=True):
                holds = _holds(cell, found, dense)
                agree &= holds
                table.add_row(
                    str(cell),
                    "equal" if found.same_start else "[red]differs[/red]",
                    f"{found.stored_weights:.1f}",
                    f"{cell.row['return_final']:.1f}",
                    f"{found.retrained:.1f}",
                    "agrees" if holds else "[red]disagrees[/red]",
                )
    table.caption = (
        f"stored weights: evaluated again, within {EVALUATION_TOLERANCE:.0%} of the range; "
        f"retrained: within {RETURN_TOLERANCE:.0%}, since rounding alone changes a training run"
    )
    return table, agree


def _holds(cell: _Cell, found: _Again, dense: float) -> bool:
    lowest = cell.row["random_return"]
    range_ = max(abs(dense - (0.0 if lowest is None else lowest)), 1e-9)
    stored = cell.row["return_final"]
    return (
        found.same_start
        and abs(found.stored_weights - stored) <= EVALUATION_TOLERANCE * range_
        and abs(found.retrained - stored) <= RETURN_TOLERANCE * range_
    )


def _again(
    spec: Sweep, store: Store, cells: list[_Cell], on_iteration: Callable[[int], None]
) -> list[_Again]:
    """Draw, evaluate and train the cells of one algorithm again, as one population."""
    algo, level = cells[0].unit.algo, cells[0].unit.level
    drawn = [cell_population(spec, store, algo, cell.unit.level, [cell.track]) for cell in cells]
    arena = drawn[0][0].arena
    key = torch.cat([each for _, each in drawn])
    rows = zip(*(population.parameters for population, _ in drawn), strict=True)
    # The reference ops do not look at the nominal density.
    population = Population(arena, Parameters(*(torch.cat(values) for values in rows)))
    start = population.parameters
    same = [
        torch.equal(start.mask[index], cell.ticket.mask)
        and torch.equal(start.weight[index], cell.start)
        for index, cell in enumerate(cells)
    ]
    with use_backend("reference"):
        env = make_env(spec.env, len(cells), spec.evaluation.final_episodes)
        stored = population.with_weight(torch.stack([cell.ticket.final for cell in cells]))
        returns = evaluate(stored, arena, env, key, index=FINAL_INDEX, greedy=True).mean(1)
        # Evaluations on the way change nothing in training.
        brief = replace(spec, evaluation=Evaluation(1, 1, spec.evaluation.final_episodes))
        tracks = [cell.track for cell in cells]
        dataset = stored_demonstrations(store, algo) if algo in spec.imitating else None
        result = train_population(
            brief, algo, population, key, level, tracks, dataset, on_iteration
        )
    values = zip(same, returns.tolist(), result.return_final.tolist(), strict=True)
    return [_Again(*value) for value in values]
