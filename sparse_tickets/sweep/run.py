"""Run a sweep: unit by unit, from whatever the store already holds, by one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_tickets.algos import bc, ppo
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.conditions import find_condition
from sparse_tickets.connectivity import connectivity
from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.population import Population, initialise
from sparse_tickets.sweep.data import read_data, write_data
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store, StoreError, Unit
from sparse_tickets.ticket import Ticket

__all__ = ["cell_population", "make_experts", "run", "train_population"]

# Claimed, like a unit, by the process that trains the experts; it never has files of its own.
_EXPERTS = Unit("experts", 0, 0)
_POLL_S = 0.5

Progress = Callable[[str, int], None]
"""Called with a description of the work under way and the agent-steps just done."""


def run(
    spec: Sweep,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Store:
    """Train every cell of a sweep that the store does not hold yet.

    May be stopped at any moment and started again; several processes may share one store, each
    taking the units that no other works on.

    Args:
        spec: what to run.
        out: folder of the store.
        overwrite: throw away what the folder holds for another specification.
        device: where to train.
        on_progress: called as work advances.

    Returns:
        The store, complete.

    Raises:
        StoreError: the folder belongs to another specification, or the disk is full.
        ExpertError: behavioural cloning found too few experts.
        ValueError: an unknown environment.
    """
    notify = on_progress or (lambda description, steps: None)
    spec.env_spec  # noqa: B018  an unknown environment is refused before anything is written
    store = Store.open(out, spec.to_dict(), overwrite=overwrite)
    runner = _Runner(spec, store, torch.device(device), notify)
    for algo in spec.algos:
        for level, chunk, tracks in spec.units(algo):
            runner.unit(algo, level, chunk, tracks)
    return store


class _Runner:
    def __init__(self, spec: Sweep, store: Store, device: torch.device, notify: Progress) -> None:
        self._spec = spec
        self._store = store
        self._device = device
        self._notify = notify
        self._dataset: bc.Dataset | None = None

    def unit(self, algo: str, level: int, chunk: int, tracks: Sequence[Track]) -> None:
        """Train one chunk of a level, unless it is finished or another process finishes it."""
        spec, store = self._spec, self._store
        unit = Unit(algo, level, chunk)
        what = f"{algo} level {level}, density {spec.density(level):.1%}"
        while not store.has(unit):
            with store.claim(unit) as mine:
                if mine and not store.has(unit):
                    if algo == "bc" and self._dataset is None:
                        self._dataset = self._demonstrations()
                    population, key = cell_population(spec, store, algo, level, tracks)
                    result = train_population(
                        spec,
                        algo,
                        population,
                        key,
                        level,
                        tracks,
                        self._dataset,
                        on_iteration=lambda steps: self._notify(what, steps),
                    )
                    self._write(unit, tracks, population, result)
                    return
            self._notify(f"{what}: waiting for another process", 0)
            time.sleep(_POLL_S)
        self._notify(what, len(tracks) * spec.train_steps(level))

    def _demonstrations(self) -> bc.Dataset:
        """The experts' data set, from the store or made now."""
        spec, store = self._spec, self._store
        while (stored := read_data(store, "demonstrations")) is None:
            with store.claim(_EXPERTS) as mine:
                if mine:
                    experts = make_experts(
                        spec, on_iteration=lambda steps: self._notify("bc experts", steps)
                    )
                    write_data(store, "experts", experts._asdict())
                    dataset = bc.demonstrations(
                        experts, spec.env, expert_arena(spec), spec.ppo.steps
                    )
                    write_data(store, "demonstrations", dataset._asdict())
                    return dataset
            self._notify("bc experts: waiting for another process", 0)
            time.sleep(_POLL_S)
        return bc.Dataset(**stored)

    def _write(
        self,
        unit: Unit,
        tracks: Sequence[Track],
        population: Population,
        result: Result,
    ) -> None:
        spec, algo, level = self._spec, unit.algo, unit.level
        if result.rewind is not None:
            write_data(self._store, f"{unit.name}-rewind", result.rewind._asdict())
        mask = population.parameters.mask
        links = connectivity(mask, population.arena)
        kept = spec.kept(algo, level)
        initial_key = torch.tensor([spec.initial_key(track.seed) for track in tracks])
        initial = initialise(population.arena, initial_key, spec.init)
        rewind = result.initial if result.rewind is None else result.rewind.weight
        environment = spec.env_spec
        rows, tickets = [], []
        for index, track in enumerate(tracks):
            origin = {
                "env": spec.env,
                "algo": algo,
                "seed": track.seed,
                "condition": track.condition,
                "controls": track.controls,
                "level": level,
            }
            rows.append(
                origin
                | {
                    "density": kept / population.arena.prunable,
                    "effective_density": float(links.effective_density[index]),
                    "has_path": bool(links.has_path[index]),
                    "dead_inputs": int(links.dead_inputs[index]),
                    "dead_units": int(links.dead_units[index]),
                    "reachable_actions": int(links.reachable_actions[index]),
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
                }
            )
            tickets.append(
                Ticket.of(
                    population.arena,
                    **origin,
                    mask=mask[index],
                    initial=initial[index],
                    rewind=rewind[index],
                    final=result.final[index],
                    best=result.best[index],
                    offset=tuple(environment.offset),
                    scale=tuple(environment.scale),
                )
            )
        self._store.write(unit, rows, tickets)


def expert_arena(spec: Sweep) -> Arena:
    """The experts' layout: an actor and a critic, never pruned."""
    return replace(spec, prune_critic=False).arena("ppo")


def make_experts(
    spec: Sweep, on_iteration: Callable[[int], None] | None = None, device: str = "cpu"
) -> bc.Experts:
    """Train the experts that the sweep's students imitate."""
    settings = spec.bc
    budget = spec.ppo
    if settings.expert_steps is not None:
        budget = replace(budget, steps=settings.expert_steps)
    gate = spec.env_spec.solved if settings.expert_gate is None else settings.expert_gate
    # An expert is judged by its final weights alone.
    evaluation = Evaluation(1, 1, spec.evaluation.final_episodes)
    return bc.train_experts(
        settings,
        budget,
        spec.env,
        expert_arena(spec),
        gate,
        scheme=spec.init,
        evaluation=evaluation,
        on_iteration=on_iteration,
        device=device,
    )


def train_population(
    spec: Sweep,
    algo: str,
    population: Population,
    key: Tensor,
    level: int,
    tracks: Sequence[Track],
    dataset: bc.Dataset | None,
    on_iteration: Callable[[int], None] | None = None,
) -> Result:
    """Train one level of some tracks by the sweep's settings; levels above 0 start rewound."""
    first = 0 if level == 0 else spec.rewind_iteration
    rewind = spec.rewind_iteration if level == 0 and spec.rewind_step else None
    if algo == "ppo":
        return ppo.train(
            spec.ppo,
            spec.env,
            population,
            key,
            evaluation=spec.evaluation,
            first_iteration=first,
            rewind_iteration=rewind,
            on_iteration=on_iteration,
        )
    if dataset is None:
        raise ValueError("dataset must be given to train by behavioural cloning, got None")
    assignment = torch.tensor([track.seed % spec.bc.experts for track in tracks])
    return bc.train(
        spec.ppo,
        spec.env,
        population,
        key,
        dataset,
        assignment,
        evaluation=spec.evaluation,
        first_iteration=first,
        rewind_iteration=rewind,
        on_iteration=on_iteration,
    )


def cell_population(
    spec: Sweep, store: Store, algo: str, level: int, tracks: Sequence[Track]
) -> tuple[Population, Tensor]:
    """The population some cells start training with, and its random keys ``[P]``."""
    arena = spec.arena(algo)
    key = torch.tensor([spec.key(algo, track, level) for track in tracks])
    if level == 0:
        initial_key = torch.tensor([spec.initial_key(track.seed) for track in tracks])
        return dense_population(arena, initial_key, spec.init), key
    # Random masks have no chain: any trained network will do, and level 0 is always there.
    sources = [(track.source, level - 1 if _chained(track) else 0) for track in tracks]
    previous = _finished(spec, store, algo, sources)
    trained = Trained(
        torch.stack([ticket.final[: arena.prunable] for ticket in previous]),
        torch.stack([ticket.mask for ticket in previous]),
    )
    population = next_population(
        arena,
        [track.condition for track in tracks],
        trained,
        _rewind_point(spec, store, algo, tracks),
        key,
        kept=spec.kept(algo, level),
        density=spec.density(level),
        criterion=spec.criterion,
        scheme=spec.init,
    )
    return population, key


def _chained(track: Track) -> bool:
    return find_condition(track.condition).chained


def _finished(
    spec: Sweep, store: Store, algo: str, cells: Sequence[tuple[Track, int]]
) -> list[Ticket]:
    """The tickets of finished (track, level) cells; waits while another process trains them."""
    units: dict[Unit, list[Ticket]] = {}
    tickets = []
    for track, level in cells:
        if level == 0:
            track = Track(track.seed, "dense", "shared")
        chunk, index = divmod(spec.tracks(level).index(track), spec.chunk)
        unit = Unit(algo, level, chunk)
        if unit not in units:
            while not store.has(unit):
                if store.claimed_by(unit) is None:
                    raise StoreError(
                        f"unit {unit.name} is needed but not finished: run the sweep again"
                    )
                time.sleep(_POLL_S)
            units[unit] = store.read_tickets(unit)
        tickets.append(units[unit][index])
    return tickets


def _rewind_point(spec: Sweep, store: Store, algo: str, tracks: Sequence[Track]) -> Parameters:
    """What level 0 of each track's seed is rewound to."""
    if spec.rewind_step == 0:
        tickets = _finished(spec, store, algo, [(track, 0) for track in tracks])
        weight = torch.stack([ticket.initial for ticket in tickets])
        zeros = torch.zeros_like(weight)
        mask = torch.stack([ticket.mask for ticket in tickets])
        step = torch.zeros(len(tracks), dtype=torch.int64)
        return Parameters(weight, mask, zeros, zeros.clone(), step)
    rows = []
    for track in tracks:
        chunk, index = divmod(track.seed, spec.chunk)
        name = f"{Unit(algo, 0, chunk).name}-rewind"
        stored = read_data(store, name)
        if stored is None:
            raise StoreError(
                f"{store.data / name}.safetensors is needed to rewind to step {spec.rewind_step}: "
                f"delete {Unit(algo, 0, chunk).name}.json in units/ and run the sweep again"
            )
        rows.append(Parameters(**{name: value[index] for name, value in stored.items()}))
    return Parameters(*(torch.stack(values) for values in zip(*rows, strict=True)))
