"""Check a run against plain torch: the same cells again, by the reference of every op."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparse_tickets.algos import bc
from sparse_tickets.algos.evaluation import FINAL_INDEX, Result
from sparse_tickets.envs import make_env
from sparse_tickets.files import StoreError
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.sweep.data import read_data
from sparse_tickets.sweep.run import cell_population, train_population
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store
from sparse_tickets.ticket import Ticket

__all__ = ["verify"]

# Training is chaotic: rounding alone flips sampled actions. Retrained returns are therefore held
# to a share of the range from random to dense, everything before training to equality.
RETURN_TOLERANCE = 0.25
EVALUATION_TOLERANCE = 0.02


def verify(path, cells: int, console: Console) -> tuple[Table, bool]:
    """Retrain some finished cells by the reference ops and compare with what is stored.

    Three comparisons per cell: the mask and the weights training started from are drawn again and
    must be equal to the bit; the stored final weights are evaluated again and must give the stored
    return; and the cell is trained again from the start in plain torch, its return shown beside
    the stored one.

    Args:
        path: the run's folder.
        cells: how many cells, chosen by a fixed hash.
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
    if spec.to_dict() != store.spec:
        raise StoreError(
            f"{spec.env} scales observations otherwise than when {store.path} was run: it cannot "
            "be retrained with this version or plugin"
        )
    finished = [
        (unit, ticket, row)
        for unit in store.units()
        if store.has(unit)
        for ticket, row in zip(store.read_tickets(unit), store.read_rows(unit), strict=True)
    ]
    if not finished:
        raise StoreError(f"{store.path} has no finished unit yet: run the sweep")
    finished.sort(
        key=lambda cell: derive_key("verify", cell[0].name, cell[1].condition, cell[1].seed)
    )
    table = Table(title=f"{spec.env}: {min(cells, len(finished))} cells again, in plain torch")
    for column in ("cell", "start", "stored weights", "stored return", "retrained", "verdict"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    dense = max(row["return_final"] for _, _, row in finished)
    agree = True
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=min(cells, len(finished)))
        for unit, ticket, row in finished[:cells]:
            name = f"{unit.algo} {ticket.condition} seed {ticket.seed} level {unit.level}"
            progress.update(bar, description=name)
            track = Track(ticket.seed, ticket.condition, ticket.controls)
            population, key = cell_population(spec, store, unit.algo, unit.level, [track])
            start = population.parameters
            same_start = torch.equal(start.mask[0], ticket.mask) and torch.equal(
                start.weight[0], _started_from(ticket)
            )
            lowest = row["random_return"] if row["random_return"] is not None else 0.0
            range_ = max(abs(dense - lowest), 1e-9)
            with use_backend("reference"):
                again = _evaluate(spec, population, key, ticket)
                result = _retrain(spec, store, unit.algo, population, key, unit.level, track)
            stored = row["return_final"]
            retrained = float(result.return_final[0])
            holds = (
                same_start
                and abs(again - stored) <= EVALUATION_TOLERANCE * range_
                and abs(retrained - stored) <= RETURN_TOLERANCE * range_
            )
            agree &= holds
            table.add_row(
                name,
                "equal" if same_start else "[red]differs[/red]",
                f"{again:.1f}",
                f"{stored:.1f}",
                f"{retrained:.1f}",
                "agrees" if holds else "[red]disagrees[/red]",
            )
            progress.advance(bar)
    table.caption = (
        f"stored weights: evaluated again, within {EVALUATION_TOLERANCE:.0%} of the range; "
        f"retrained: within {RETURN_TOLERANCE:.0%}, since rounding alone changes a training run"
    )
    return table, agree


def _started_from(ticket: Ticket):
    """The row training started from; at level 0 the `rewind` row may be a later snapshot."""
    return ticket.initial if ticket.level == 0 else ticket.rewind


def _evaluate(spec: Sweep, population, key, ticket: Ticket) -> float:
    env = make_env(spec.env, 1, spec.evaluation.final_episodes)
    parameters = population.with_weight(ticket.final[None])
    returns = evaluate(parameters, population.arena, env, key, index=FINAL_INDEX, greedy=True)
    return float(returns.mean())


def _retrain(spec: Sweep, store: Store, algo: str, population, key, level: int, track) -> Result:
    dataset = None
    if algo == "bc":
        stored = read_data(store, "demonstrations")
        if stored is None:
            raise StoreError(f"{store.data} has no demonstrations: run the sweep again")
        dataset = bc.Dataset(**stored)
    return train_population(spec, algo, population, key, level, [track], dataset)
