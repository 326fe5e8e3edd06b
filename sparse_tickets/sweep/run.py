"""Run a sweep: unit by unit, from whatever the store already holds, by one process or several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_tickets.algos.algorithm import PruningSchedule, Taught
from sparse_tickets.algos.evaluation import Result, on_evaluation
from sparse_tickets.algos.registry import find_algorithm
from sparse_tickets.connectivity import connectivity
from sparse_tickets.diagnostics import mask_overlap
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.population import Population, initialise
from sparse_tickets.provenance import commit, processor, versions
from sparse_tickets.sweep.cells import (
    DIVERGED,
    cell_population,
    initial_keys,
    lost_cells,
    masks_before,
)
from sparse_tickets.sweep.experts import POLL_S, Teacher, assigned, check_teachers
from sparse_tickets.sweep.memory import free_memory, is_out_of_memory, memory_explained
from sparse_tickets.sweep.rows import COLUMNS
from sparse_tickets.sweep.shown import Shown
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.unit import Unit
from sparse_tickets.ticket import Ticket
from sparse_tickets.tracking import Tracker

__all__ = ["Progress", "Runner", "begin", "check", "find_device", "run", "train_population"]

Cell = tuple[dict[str, Any], Ticket]
Progress = Callable[[str, int], None]
"""Called with a description of the work under way and the agent-steps just done.

Where memory ran out, a negative number takes back those that have to be done again.
"""


def run(
    spec: Sweep,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    tracker: Tracker | None = None,
    on_progress: Progress | None = None,
) -> Store:
    """Train every cell of a sweep that the store does not hold yet.

    May be stopped at any moment and started again; several processes may share one store, each
    taking the units that no other works on. A unit waits for every unit of its algorithm's level
    before; algorithms do not wait for each other.

    Args:
        spec: what to run.
        out: folder of the store.
        overwrite: throw away the run that the folder holds, of whatever specification.
        device: where to train.
        tracker: shown the returns of what this process trains, as they come.
        on_progress: called as work advances.

    Returns:
        The store, complete.

    Raises:
        StoreError: the folder belongs to another specification, or the disk is full.
        ExpertError: behavioural cloning found too few experts.
        MemoryError: there is too little for a single ticket; with enough for some of a chunk, those
            are trained at once, which changes no result.
        ValueError: an unknown environment, a device that is not there, or an environment to clone
            experts in that does not say when it is solved.
    """
    where = find_device(device)
    store = begin(spec, out, overwrite)
    notify = on_progress or (lambda description, steps: None)
    runner = Runner(spec, store, where, notify, Shown(spec, tracker))
    algorithms = [runner.algorithm(algo) for algo in spec.algos]
    while algorithms:
        algorithms = [each for each in algorithms if next(each, None) is not None]
        if algorithms:
            time.sleep(POLL_S)
    return store


def begin(spec: Sweep, out: str | Path, overwrite: bool) -> Store:
    """The store of a sweep; what cannot work is refused before anything is written."""
    check(spec)
    if spec.env_spec.time_limit is None:
        warnings.warn(
            f"{spec.env} names no time limit: evaluation waits for every episode to end. If a "
            "policy can go on for ever, register the environment wrapped in "
            "gymnasium.wrappers.TimeLimit",
            stacklevel=3,
        )
    return Store.open(out, spec.to_dict(), overwrite=overwrite)


def check(spec: Sweep) -> None:
    """Raise ``ValueError`` where a sweep cannot be run."""
    spec.to_dict()
    for algo in spec.algos:
        find_algorithm(algo).plan(spec.arena(algo), torch.device("cpu"), 1.0)
    if spec.imitating:
        check_teachers(spec)


def find_device(name: str) -> torch.device:
    """A device by name; ``ValueError`` where torch has none of it here."""
    try:
        return torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one torch has here, got {name!r} ({reason})") from error


class Runner:
    """Trains a sweep's units from what its store holds, and stores them.

    Attributes:
        teacher: has the experts' demonstrations.
    """

    def __init__(
        self,
        spec: Sweep,
        store: Store,
        device: torch.device,
        notify: Progress,
        shown: Shown | None = None,
    ) -> None:
        self._spec = spec
        self._store = store
        self._device = device
        self._notify = notify
        self._shown = shown or Shown(spec, None)
        self.teacher = Teacher(spec, store, device, notify)
        # Tickets that memory holds.
        self._at_once = spec.chunk

    def algorithm(self, algo: str) -> Iterator[Unit]:
        """Train an algorithm level by level; yields a unit that another process is working on."""
        for level, units in groupby(self._spec.units(algo), key=itemgetter(0)):
            left = [(Unit(algo, level, chunk), tracks) for _, chunk, tracks in units]
            while left := [each for each in left if not self.finish(*each)]:
                self._wait_for(left[0][0], self.describe(left[0][0]))
                yield left[0][0]
        if algo in self._spec.imitating:
            self.teacher.check(algo)

    def finish(self, unit: Unit, tracks: Sequence[Track]) -> bool:
        """Train one chunk of a level if nobody has; False while another process does."""
        if not self.is_stored(unit):
            with self._store.claim(unit) as mine:
                if not mine:
                    return False
                # Another process may have finished it a moment ago.
                if not self.is_stored(unit):
                    self._train(unit, tracks)
                    return True
        self._notify(
            self.describe(unit), len(tracks) * self._spec.train_steps(unit.algo, unit.level)
        )
        return True

    def is_stored(self, unit: Unit) -> bool:
        """Whether a unit is finished and, at level 0, what later levels rewind to is there."""
        if not self._store.has(unit):
            return False
        needs_rewind = unit.level == 0 and self._spec.rewind_step > 0
        return not needs_rewind or self._store.read_rewind(unit) is not None

    def _train(self, unit: Unit, tracks: Sequence[Track]) -> None:
        spec = self._spec
        imitates = unit.algo in spec.imitating
        dataset = self.teacher.dataset(unit.algo, unit.level) if imitates else None
        lost = lost_cells(spec, self._store, unit.algo, unit.level, tracks)
        alive = [track for track in tracks if track not in lost]
        cells = {track: self._lost_cell(unit, track, reason) for track, reason in lost.items()}
        later = []
        while alive:
            some = alive[: self._at_once]
            trained = self._train_together(unit, some, dataset)
            if trained is None:
                self._at_once = (len(some) + 1) // 2
                continue
            population, result = trained
            cells |= self._trained_cells(unit, some, population, result)
            if result.rewind is not None:
                later.append(result.rewind)
            alive = alive[len(some) :]
        rows, tickets = zip(*(cells[track] for track in tracks), strict=True)
        inputs = {} if dataset is None else self.teacher.inputs
        rewind = _joined(later)._asdict() if later else None
        self._store.write(unit, rows, tickets, inputs, rewind=rewind)
        self._shown.level(rows)

    def _train_together(
        self, unit: Unit, tracks: Sequence[Track], dataset: Taught | None
    ) -> tuple[Population, Result] | None:
        """Train tracks as one population; None, with a warning, where memory holds fewer only."""
        what = self.describe(unit)
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            self._notify(what, steps)

        try:
            population, key = cell_population(
                self._spec, self._store, unit.algo, unit.level, tracks, self._device
            )
            with on_evaluation(partial(self._shown.point, unit, tracks)):
                result = train_population(
                    self._spec,
                    unit.algo,
                    population,
                    key,
                    unit.level,
                    tracks,
                    dataset,
                    on_iteration=advance,
                )
            return population, result
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(tracks) == 1:
                with memory_explained(f"training a single ticket, {what}"):
                    raise
        # Only here: until the error is gone, its traceback holds the attempt's tensors.
        free_memory()
        self._notify(what, -done)
        warnings.warn(
            f"{what}: out of memory with {len(tracks)} tickets at once. Going on with "
            f"{(len(tracks) + 1) // 2}, which changes no result",
            stacklevel=2,
        )
        return None

    def _wait_for(self, unit: Unit, what: str) -> None:
        """Say who is waited for; a process that is stopped or busy is somebody's to look after."""
        owner = self._store.claimed_by(unit) or "another process"
        self._notify(f"{what}: waiting for {owner}", 0)

    def describe(self, unit: Unit) -> str:
        return f"{unit.algo} level {unit.level}, density {self._spec.density(unit.level):.1%}"

    def _origin(self, unit: Unit, track: Track) -> dict[str, Any]:
        return {
            "env": self._spec.env,
            "algo": unit.algo,
            "seed": track.seed,
            "condition": track.condition,
            "controls": track.controls,
            "level": unit.level,
        }

    def _lost_cell(self, unit: Unit, track: Track, reason: str) -> Cell:
        """A cell that cannot be trained: no returns, and a ticket of no weights."""
        spec, origin = self._spec, self._origin(unit, track)
        arena = spec.arena(unit.algo)
        environment = spec.env_spec
        nothing = torch.zeros(arena.size, dtype=torch.float32, device="cpu")
        final = nothing.clone()
        final[arena.prunable :] = torch.nan
        unknown = [float("nan")] * min(spec.evaluation.points, spec.budget(unit.algo).iterations)
        row = origin | dict.fromkeys(COLUMNS.keys() - origin.keys())
        row |= dict.fromkeys((name for name in COLUMNS if name.startswith("return_")), unknown[0])
        row |= {
            "density": spec.kept(unit.algo, unit.level) / arena.prunable,
            "curve": unknown,
            "curve_sampled": unknown,
            "train_steps": 0,
            "wall_s": 0.0,
            "train_s": 0.0,
            "random_return": environment.random_return,
            "diverged": True,
            "commit": commit(),
            "processor": processor(),
        }
        ticket = Ticket.of(
            arena,
            **origin,
            mask=torch.zeros(arena.prunable, dtype=torch.bool, device="cpu"),
            initial=nothing,
            rewind=nothing,
            final=final,
            best=final,
            offset=tuple(environment.offset),
            scale=tuple(environment.scale),
            metadata={DIVERGED: reason},
        )
        return row, ticket

    def _trained_cells(
        self,
        unit: Unit,
        tracks: Sequence[Track],
        population: Population,
        result: Result,
    ) -> dict[Track, Cell]:
        spec, algo, level = self._spec, unit.algo, unit.level
        mask = population.parameters.mask
        links = connectivity(mask.cpu(), population.arena)
        overlap = torch.full((len(tracks),), torch.nan, dtype=torch.float64, device="cpu")
        if level > 0 and spec.during == "none":
            overlap = mask_overlap(mask.cpu(), masks_before(spec, self._store, algo, level, tracks))
        kept = spec.kept(algo, level)
        initial = initialise(population.arena, initial_keys(spec, tracks), spec.init, spec.log_std)
        how: dict[str, Any] = {
            "versions": versions(("sparse-tickets", "torch", "numpy", "numba")),
            "plan": str(
                find_algorithm(algo).plan(population.arena, self._device, population.density)
            ),
        }
        if algo in spec.imitating:
            how["inputs"] = self.teacher.inputs
        rewind = result.initial if result.rewind is None else result.rewind.weight
        environment = spec.env_spec
        cells: dict[Track, Cell] = {}
        for index, track in enumerate(tracks):
            origin = self._origin(unit, track)
            reason = result.diverged[index]
            about = how if reason is None else how | {DIVERGED: reason}
            if reason is not None:
                warnings.warn(
                    f"{algo} {track.condition} ({track.controls} controls), seed {track.seed}, "
                    f"diverged at level {level}: {reason}. Recorded as such; the others go on",
                    stacklevel=2,
                )
            row = origin | {
                "density": kept / population.arena.prunable,
                "effective_density": float(links.effective_density[index]),
                "has_path": bool(links.has_path[index]),
                "dead_inputs": int(links.dead_inputs[index]),
                "dead_units": int(links.dead_units[index]),
                "reachable_actions": int(links.reachable_actions[index]),
                "mask_iou": _known(overlap[index]),
                "dormant_share": _known(result.dormant_curve[index, -1]),
                "effective_rank": _known(result.effective_rank[index], int),
                "parameter_norm": _known(result.norm_curve[index, -1]),
                "dormant_curve": result.dormant_curve[index].tolist(),
                "norm_curve": result.norm_curve[index].tolist(),
                "gradient_norm": _known(result.gradient_norm_curve[index, -1]),
                "gradient_norm_curve": result.gradient_norm_curve[index].tolist(),
                "return_initial": float(result.return_initial[index]),
                "return_initial_sampled": float(result.return_initial_sampled[index]),
                "return_final": float(result.return_final[index]),
                "return_best": float(result.return_best[index]),
                "return_final_sampled": float(result.return_final_sampled[index]),
                "return_auc": float(result.curve[index].mean()),
                "curve": result.curve[index].tolist(),
                "curve_sampled": result.curve_sampled[index].tolist(),
                "train_steps": result.train_steps,
                "wall_s": result.wall_s / len(tracks),
                "train_s": result.train_s / len(tracks),
                "random_return": environment.random_return,
                "diverged": reason is not None,
                "commit": commit(),
                "processor": processor(),
            }
            ticket = Ticket.of(
                population.arena,
                **origin,
                mask=mask[index],
                initial=initial[index],
                rewind=rewind[index],
                final=zero_off(result.final[index], mask[index]),
                best=zero_off(result.best[index], mask[index]),
                offset=tuple(environment.offset),
                scale=tuple(environment.scale),
                metadata=about,
            )
            cells[track] = row, ticket
        return cells


def _known(value: Tensor, kind: Callable[[float], float] = float) -> float | None:
    """A number, or None for one that is NaN."""
    return None if value.isnan() else kind(value.item())


def zero_off(row: Tensor, mask: Tensor) -> Tensor:
    """Zero where pruned, whatever a diverged update left there."""
    row = row.clone()
    row[: len(mask)].masked_fill_(~mask, 0.0)
    return row


def train_population(
    spec: Sweep,
    algo: str,
    population: Population,
    key: Tensor,
    level: int,
    tracks: Sequence[Track],
    dataset: Taught | None,
    on_iteration: Callable[[int], None] | None = None,
) -> Result:
    """Train one level of some tracks by the sweep's settings; levels above 0 start rewound."""
    rewound = spec.rewind_iteration(algo)
    first = 0 if level == 0 else rewound
    rewind = rewound if level == 0 and spec.rewind_step else None
    schedule: PruningSchedule = {
        "evaluation": spec.evaluation,
        "first_iteration": first,
        "rewind_iteration": rewind,
        "on_iteration": on_iteration,
    }
    pruning = spec.pruning(algo, level)
    if pruning is not None:
        schedule["pruning"] = pruning
    demonstrations = None if dataset is None else assigned(tracks, dataset)
    settings = spec.settings_of(algo)
    return find_algorithm(algo).train(
        settings, spec.ppo, spec.env, population, key, demonstrations, schedule
    )


def _joined(parts: Sequence[Parameters]) -> Parameters:
    """Populations as one, ticket after ticket."""
    return Parameters(*(torch.cat(values) for values in zip(*parts, strict=True)))
