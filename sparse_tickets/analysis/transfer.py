"""Masks of one run trained by another: other algorithms, other tasks of the same shape.

A mask that cloning found, trained by PPO, and the reverse; a mask of another task; or only the
inputs that a mask leaves a path from, with every other weight there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars
import torch
from torch import Tensor

from sparse_tickets.algos.evaluation import Result
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.connectivity import live_inputs
from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.population import Population, initialise
from sparse_tickets.provenance import commit, processor
from sparse_tickets.sweep.cells import DIVERGED, find_rewind_point, initial_keys
from sparse_tickets.sweep.experts import stored_demonstrations
from sparse_tickets.sweep.run import find_device, train_population, zero_off
from sparse_tickets.sweep.spec import TICKET, Sweep, Track
from sparse_tickets.sweep.store import Store
from sparse_tickets.ticket import Ticket, save_tickets

__all__ = [
    "KEEPS",
    "Transferred",
    "input_mask",
    "rows_of",
    "stored_tickets",
    "transfer",
    "transfer_into",
]

KEEPS = ("mask", "inputs")


class Transferred(NamedTuple):
    """What training under another's masks gave.

    Attributes:
        rows: a row per seed, with the returns of a run's table.
        tickets: by seed, with the masks, initial and trained weights.
    """

    rows: polars.DataFrame
    tickets: list[Ticket]


def transfer(
    run: str | Path,
    algo: str,
    level: int,
    *,
    masks: str | Path | None = None,
    found_by: str | None = None,
    condition: str = TICKET,
    controls: str = "own",
    keep: str = "mask",
    shift: int = 0,
    device: str = "cpu",
    on_iteration: Callable[[int], None] | None = None,
) -> Transferred:
    """Train a run's own dense starts under masks that others found.

    Seed s starts from its own initial values, or from what the run rewinds to, under the mask that
    seed s of the other run ended the level with, and is trained and evaluated by this run's
    settings; a run of cloning imitates its own experts. Nothing is written.

    Args:
        run: folder of the run whose initial values and settings are used; level 0 of the algorithm
            must be finished.
        algo: what trains, one of the run's algorithms.
        level: of the masks.
        masks: folder of the run that found the masks; default: the same. Its policies need the same
            layers, of whatever task.
        found_by: the algorithm that found them; default: the one that trains.
        condition: of the track they are from.
        controls: of that track.
        keep: ``mask``, or ``inputs``: all weights but those of inputs that the mask leaves no path
            from to an action, trained dense.
        shift: seed s takes the mask of the seed so many further on, the first after the last.
        device: where to train.
        on_iteration: called after each iteration with the agent-steps taken in it.

    Raises:
        ValueError: an algorithm, level, condition or keep that is not there, masks of other layers,
            or a run that prunes its critics or while it trains.
        StoreError: no run, or one that has not got so far.
    """
    store = Store(run)
    spec = Sweep.from_dict(store.spec)
    source = store if masks is None else Store(masks)
    source_spec = Sweep.from_dict(source.spec)
    found_by = algo if found_by is None else found_by
    _check(spec, source_spec, algo, level, found_by, keep)
    found = stored_tickets(source, found_by, level, condition, controls)
    if len(found) < spec.seeds:
        raise StoreError(
            f"{source.path} has {len(found)} masks of {found_by}, {condition} ({controls}), at "
            f"level {level}, where {spec.seeds} seeds need one each"
        )
    seeds = range(spec.first_seed, spec.first_seed + spec.seeds)
    chosen = [found[(at + shift) % spec.seeds] for at in range(spec.seeds)]
    for ticket in chosen:
        if DIVERGED in ticket.metadata:
            raise ValueError(f"the mask of seed {ticket.seed} is of a training that diverged")
    arena = spec.arena(algo)
    if chosen[0].arena.actor != arena.actor:
        raise ValueError(
            f"masks must be of layers {arena.actor.sizes}, {arena.actor.architecture}, as those "
            f"that {algo} trains in {store.path}, got {chosen[0].arena.actor.sizes}, "
            f"{chosen[0].architecture}"
        )
    mask = torch.stack([ticket.mask for ticket in chosen])
    density = source_spec.density(level)
    if keep == "inputs":
        mask, density = input_mask(live_inputs(mask, chosen[0].arena), arena), 1.0
    tracks = [Track(seed, condition, controls) for seed in seeds]
    names = ("transfer", source_spec.env, found_by, condition, controls, keep, shift)
    keys = [derive_key(*names, spec.key(algo, track, level)) for track in tracks]
    where = find_device(device)
    start = find_rewind_point(spec, store, algo, tracks)
    population = _started(arena, start, mask, density).to(where)
    dataset = stored_demonstrations(spec, store, algo) if algo in spec.imitating else None
    key = torch.tensor(keys, dtype=torch.int64, device=where)
    # Level 0 of a rewound run would go on to be rewound to; everything above starts there.
    result = train_population(
        spec, algo, population, key, max(level, 1), tracks, dataset, on_iteration
    )
    rows = rows_of(spec, algo, level, seeds, mask, result).with_columns(
        polars.lit(source_spec.env).alias("masks_env"),
        polars.lit(found_by).alias("masks_algo"),
        polars.lit(condition).alias("condition"),
        polars.lit(controls).alias("controls"),
        polars.Series("masks_seed", [ticket.seed for ticket in chosen]),
        polars.lit(keep).alias("keep"),
        polars.lit(commit(), dtype=polars.String).alias("commit"),
        polars.lit(processor()).alias("processor"),
    )
    about = {"masks": str(source.path), "masks_algo": found_by, "keep": keep}
    return Transferred(rows, _tickets(spec, algo, level, tracks, mask, result, about))


def transfer_into(
    out: str | Path, run: str | Path, algo: str, levels: Sequence[int], **settings: Any
) -> polars.DataFrame:
    """`transfer` at several levels, each written as soon as it is there; resumable.

    Args:
        out: folder of ``level-05.parquet``, its rows, and ``level-05.safetensors``, its tickets.
        run: as of `transfer`.
        algo: likewise.
        levels: of the masks.
        **settings: what else `transfer` takes.

    Returns:
        The rows of these levels.

    Raises:
        ValueError: no levels, or what `transfer` refuses.
        StoreError: the folder holds masks transferred otherwise, or what `transfer` raises.
    """
    if not levels:
        raise ValueError("levels must be at least one, got none")
    out = Path(out)
    masks = settings.get("masks") or run
    asked: dict[str, Any] = {
        "run": Store(run).spec_hash,
        "algo": algo,
        "masks": Store(masks).spec_hash,
    }
    for name in ("found_by", "condition", "controls", "keep", "shift"):
        asked[name] = settings.get(name)
    asked_file, content = out / "transfer.json", json.dumps(asked, indent=2) + "\n"
    if asked_file.exists() and asked_file.read_text() != content:
        raise StoreError(
            f"{out} holds masks transferred otherwise ({asked_file} says how): choose another --out"
        )
    found = []
    for level in levels:
        file = out / f"level-{level:02d}.parquet"
        if not file.exists():
            rows, tickets = transfer(run, algo, level, **settings)
            # Not before: what is refused would keep the folder from the command mended.
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(asked_file, content.encode())
            save_tickets(file.with_suffix(".safetensors"), tickets)
            write_parquet(file, rows)
        found.append(polars.read_parquet(file))
    return polars.concat(found)


def input_mask(inputs: Tensor, arena: Arena) -> Tensor:
    """Masks ``[P, N]`` of dense policies that see some inputs alone.

    Args:
        inputs: ``[P, features]`` bool, which they see.
        arena: the layout.
    """
    size = (len(inputs), arena.prunable)
    mask = torch.ones(size, dtype=torch.bool, device=inputs.device)
    arena.actor.weight(mask, 0).logical_and_(inputs[:, None, :])
    return mask


def stored_tickets(
    store: Store, algo: str, level: int, condition: str = TICKET, controls: str = "own"
) -> list[Ticket]:
    """A run's finished tickets of a level, by seed; level 0 has the dense ones."""
    found = [
        ticket
        for unit in store.units()
        if (unit.algo, unit.level) == (algo, level) and store.has(unit)
        for ticket in store.read_tickets(unit)
        if level == 0 or (ticket.condition, ticket.controls) == (condition, controls)
    ]
    return sorted(found, key=lambda ticket: ticket.seed)


def rows_of(
    spec: Sweep, algo: str, level: int, seeds: Sequence[int], mask: Tensor, result: Result
) -> polars.DataFrame:
    """A row per policy with the returns of a run's table."""
    return polars.DataFrame(
        {
            "env": spec.env,
            "algo": algo,
            "seed": list(seeds),
            "level": [level] * len(seeds),
            "density": mask.double().mean(1).tolist(),
            "return_initial": result.return_initial.tolist(),
            "return_auc": result.curve.mean(1).tolist(),
            "return_final": result.return_final.tolist(),
            "return_final_sampled": result.return_final_sampled.tolist(),
            "return_initial_sampled": result.return_initial_sampled.tolist(),
            "curve": result.curve.tolist(),
            "curve_sampled": result.curve_sampled.tolist(),
            "train_steps": [result.train_steps] * len(seeds),
            "random_return": spec.env_spec.random_return,
            "wall_s": result.wall_s / len(seeds),
        }
    )


def _check(spec: Sweep, source: Sweep, algo: str, level: int, found_by: str, keep: str) -> None:
    for name, given, allowed in (
        ("algo", algo, spec.algos),
        ("found_by", found_by, source.algos),
        ("keep", keep, KEEPS),
    ):
        if given not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
    if not 1 <= level < source.levels:
        raise ValueError(f"level must be in [1, {source.levels}), as the masks' run, got {level}")
    if spec.during != "none":
        raise ValueError(
            f"run must keep its masks while it trains, got one with during={spec.during!r}"
        )
    if spec.prune_critic or source.prune_critic:
        raise ValueError("masks must be of actors alone, got a run with prune_critic")


def _tickets(
    spec: Sweep,
    algo: str,
    level: int,
    tracks: Sequence[Track],
    mask: Tensor,
    result: Result,
    about: dict[str, Any],
) -> list[Ticket]:
    arena = spec.arena(algo)
    initial = initialise(arena, initial_keys(spec, tracks), spec.init, spec.log_std)
    return [
        Ticket.of(
            arena,
            env=spec.env,
            algo=algo,
            seed=track.seed,
            condition=track.condition,
            controls=track.controls,
            level=level,
            mask=mask[index],
            initial=initial[index],
            rewind=result.initial[index],
            final=zero_off(result.final[index].cpu(), mask[index]),
            best=zero_off(result.best[index].cpu(), mask[index]),
            offset=tuple(spec.env_spec.offset),
            scale=tuple(spec.env_spec.scale),
            metadata=about,
        )
        for index, track in enumerate(tracks)
    ]


def _started(arena: Arena, start: Parameters, mask: Tensor, density: float) -> Population:
    """The starts under the masks; moments and step counts as at the rewind point."""
    population = Population.create(arena, start.weight, mask, density)
    parameters = population.parameters
    for moment, stored in ((parameters.m, start.m), (parameters.v, start.v)):
        moment.copy_(stored)
        moment[:, : arena.prunable].masked_fill_(~mask, 0.0)
    parameters.step.copy_(start.step)
    return population
