"""Check a run against plain torch: the same cells again, by the reference of every op."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparse_tickets.algos.evaluation import FINAL_INDEX, Evaluation
from sparse_tickets.analysis.statistics import binomial_tail, sign_flip
from sparse_tickets.envs import open_env
from sparse_tickets.files import StoreError
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population
from sparse_tickets.sweep.cells import cell_population
from sparse_tickets.sweep.experts import stored_demonstrations
from sparse_tickets.sweep.run import train_population
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.unit import Unit
from sparse_tickets.ticket import Ticket

__all__ = ["verify"]

# Shares of the range from random to dense. What comes before training must be equal, and what the
# stored weights earn must be what is stored, up to the rounding that flips an action now and then.
EVALUATION_TOLERANCE = 0.02
STANDARD_ERRORS = 3.0
# Training is chaotic: rounding alone flips sampled actions, and some cells end far from where they
# did (11 of 135 in one run). One cell therefore says nothing, but over cells there must be no
# direction, and not more that end elsewhere than chaos was ever seen to move.
RETURN_TOLERANCE = 0.25
CHAOTIC_SHARE = 0.2
SIGNIFICANCE = 0.01


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
    standard_error: float
    retrained: float


def verify(path: str | Path, cells: int, console: Console) -> tuple[Table, bool]:
    """Retrain some finished cells by the reference ops and compare with what is stored.

    Two comparisons hold for every cell: the mask and the weights that training started from are
    drawn again and must be equal to the bit; the stored final weights are evaluated again and must
    give the stored return. Then the cells are trained again from the start in plain torch, which
    rounds otherwise, so that some end elsewhere. Over all cells together the differences must have
    no direction (exact sign-flip test), and no more may end elsewhere than chaos moves (binomial
    test), both at 1%: few cells can hardly fail these two.

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
    store, spec = _open(path)
    chosen, dense = _choose(store, cells)
    # Plain torch takes as long for one ticket as for several: what trains alike trains together.
    groups: dict[tuple[str, int], list[_Cell]] = {}
    for cell in chosen:
        level = cell.unit.level if spec.during != "none" else min(cell.unit.level, 1)
        groups.setdefault((cell.unit.algo, level), []).append(cell)

    table = Table(title=Text(f"{spec.env}: {len(chosen)} cells again, in plain torch"))
    for column in ("cell", "start", "stored weights", "stored return", "retrained", "verdict"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    agree = True
    scale = _range(chosen, dense)
    differences, elsewhere = [], 0
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        for (algo, level), group in groups.items():
            steps = len(group) * spec.train_steps(algo, group[0].unit.level)
            kind = "pruned" if level else "dense"
            what = f"{len(group)} {kind} {algo} cells in plain torch"
            if not console.is_terminal:  # where a bar is not drawn
                console.print(what, highlight=False)
            bar = progress.add_task(what, total=steps)
            again = _again(spec, store, group, partial(progress.advance, bar))
            for cell, found in zip(group, again, strict=True):
                holds = _holds(cell, found, scale)
                agree &= holds
                difference = found.retrained - cell.row["return_final"]
                if math.isfinite(difference):
                    differences.append(difference)
                # One that diverges ends elsewhere too.
                moved = not abs(difference) <= RETURN_TOLERANCE * scale
                elsewhere += moved
                verdict = "agrees, ends elsewhere" if moved else "agrees"
                table.add_row(
                    escape(str(cell)),
                    "equal" if found.same_start else "[red]differs[/red]",
                    f"{found.stored_weights:.1f}",
                    f"{cell.row['return_final']:.1f}",
                    f"{found.retrained:.1f}",
                    verdict if holds else "[red]disagrees[/red]",
                )
    direction = sign_flip(differences or [0.0])
    excess = binomial_tail(elsewhere, len(chosen), CHAOTIC_SHARE)
    beyond = min(direction, excess) < SIGNIFICANCE
    agree &= not beyond
    table.caption = Text(
        f"start: to the bit; stored weights: within {EVALUATION_TOLERANCE:.0%} of the range and "
        f"{STANDARD_ERRORS:g} standard errors; retrained: rounding alone changes a training run, "
        f"so only all together count. {elsewhere} of {len(chosen)} end elsewhere, beyond "
        f"{RETURN_TOLERANCE:.0%} of the range (p = {excess:.2g} if chaos moves "
        f"{CHAOTIC_SHARE:.0%}); direction of the differences p = {direction:.2g}; "
        f"{'beyond' if beyond else 'within'} chance at {SIGNIFICANCE:.0%}"
    )
    return table, agree


def _open(path: str | Path) -> tuple[Store, Sweep]:
    """A run that can be retrained, and its spec."""
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
    return store, spec


def _choose(store: Store, cells: int) -> tuple[list[_Cell], float]:
    """Some finished cells, of every algorithm and level first; and the best dense return."""
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
    return [cell for _, cell in sorted(spread, key=itemgetter(0))[:cells]], dense


def _range(cells: list[_Cell], dense: float) -> float:
    """From the random policy's return to the best dense one's."""
    lowest = cells[0].row["random_return"]
    return max(abs(dense - (0.0 if lowest is None else lowest)), 1e-9)


def _holds(cell: _Cell, found: _Again, scale: float) -> bool:
    allowed = EVALUATION_TOLERANCE * scale + STANDARD_ERRORS * found.standard_error
    return found.same_start and abs(found.stored_weights - cell.row["return_final"]) <= allowed


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
    masks = population.parameters.mask.clone()
    with use_backend("reference"):
        stored = population.with_weight(torch.stack([cell.ticket.final for cell in cells]))
        returns = _returns(spec, arena, stored, key)
        # Evaluations on the way change nothing in training.
        brief = replace(spec, evaluation=Evaluation(1, 1, spec.evaluation.final_episodes))
        tracks = [cell.track for cell in cells]
        dataset = stored_demonstrations(spec, store, algo) if algo in spec.imitating else None
        result = train_population(
            brief, algo, population, key, level, tracks, dataset, on_iteration
        )
    if spec.during != "none":  # Of masks found in training there is no telling before.
        masks = torch.stack([cell.ticket.mask for cell in cells])
        result.initial[:, : arena.prunable].masked_fill_(~masks, 0.0)
    same = [
        torch.equal(masks[index], cell.ticket.mask)
        and torch.equal(result.initial[index], cell.start)
        for index, cell in enumerate(cells)
    ]
    error = returns.std(1, correction=0) / returns.shape[1] ** 0.5
    columns = (returns.mean(1), error, result.return_final)
    values = zip(same, *(column.tolist() for column in columns), strict=True)
    return [_Again(*value) for value in values]


def _returns(spec: Sweep, arena: Arena, parameters: Parameters, key: Tensor) -> Tensor:
    """Returns ``[P, episodes]``, ticket by ticket: environments of Python are heavy."""
    episodes = []
    with open_env(spec.env, 1, spec.evaluation.final_episodes) as env:
        for index in range(len(key)):
            one = Parameters(*(value[index : index + 1] for value in parameters))
            where = key[index : index + 1]
            episodes.append(evaluate(one, arena, env, where, index=FINAL_INDEX, greedy=True))
    return torch.cat(episodes).double()
