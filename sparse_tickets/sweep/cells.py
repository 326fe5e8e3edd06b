"""What the cells of a level start training from: masks, weights, random keys, and who made them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.population import Population
from sparse_tickets.prune import has_scores
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store, StoreError
from sparse_tickets.sweep.unit import Unit
from sparse_tickets.ticket import Ticket

__all__ = [
    "DIVERGED",
    "cell_population",
    "find_rewind_point",
    "initial_keys",
    "lost_cells",
    "masks_before",
    "units_before",
]

DIVERGED = "diverged"
"""In a ticket's metadata: why its training has no result."""


def lost_cells(
    spec: Sweep, store: Store, algo: str, level: int, tracks: Sequence[Track]
) -> dict[Track, str]:
    """Cells that have nothing to start from, with why: their track diverged at a level before.

    A network that diverged ranks no weights, nor do scores that are not numbers; every track
    begins with its seed's dense network, random masks too.
    """
    if level == 0 or spec.during != "none":
        return {}
    lost: dict[Track, str] = {}
    parents = dict(zip(tracks, _parents(spec, store, algo, level, tracks), strict=True))
    for track, parent in parents.items():
        reason = parent.metadata.get(DIVERGED)
        if reason is not None:
            lost[track] = f"diverged at level {parent.level}: {reason}"
    rest = [track for track in tracks if track not in lost]
    if not rest:
        return lost
    arena = spec.arena(algo)
    rewind_point = find_rewind_point(spec, store, algo, rest).weight
    valid = rewind_point.isfinite().all(1)
    scored = has_scores(
        spec.criterion,
        _ranked([parents[track] for track in rest], spec),
        rewind_point[:, : arena.prunable],
        torch.stack([parents[track].mask for track in rest]),
        spec.kept(algo, level),
        arena,
    )
    for index, track in enumerate(rest):
        if not valid[index]:
            lost[track] = "what it is rewound to is not finite"
        elif not scored[index]:
            lost[track] = f"criterion {spec.criterion!r} gave a score that is not a number"
    return lost


def _parents(
    spec: Sweep, store: Store, algo: str, level: int, tracks: Sequence[Track]
) -> list[Ticket]:
    """The trained networks that a level's masks come from."""
    return _finished(spec, store, algo, _parent_cells(spec, level, tracks))


def _ranked(parents: Sequence[Ticket], spec: Sweep) -> Tensor:
    """The trained values ``[P, prunable]`` that a level's masks are chosen by."""
    return torch.stack([each.row(spec.prune_by)[: len(each.mask)] for each in parents])


def _parent_cells(spec: Sweep, level: int, tracks: Sequence[Track]) -> list[tuple[Track, int]]:
    # Random masks have no chain: any trained network will do, and level 0 is always there.
    return [(track.source, level - 1 if spec.chained(track.condition) else 0) for track in tracks]


def units_before(spec: Sweep, unit: Unit, tracks: Sequence[Track]) -> list[Unit]:
    """The units that a unit of these tracks is trained from."""
    if unit.level == 0 or spec.during != "none":
        return []
    cells = _parent_cells(spec, unit.level, tracks) + [(track, 0) for track in tracks]
    if unit.level > 1:
        # The masks of the level before are drawn again, to be compared.
        cells += _parent_cells(spec, unit.level - 1, tracks)
    return sorted({_place(spec, unit.algo, track, level)[0] for track, level in cells})


def masks_before(
    spec: Sweep, store: Store, algo: str, level: int, tracks: Sequence[Track]
) -> Tensor:
    """The masks ``[P, N]`` that some tracks trained with at the level before."""
    return cell_population(spec, store, algo, level - 1, tracks)[0].parameters.mask


def _place(spec: Sweep, algo: str, track: Track, level: int) -> tuple[Unit, int]:
    """The unit of a cell, and its place in it."""
    if level == 0:
        track = Track(track.seed, "dense", "shared")
    chunk, index = spec.place(track, level)
    return Unit(algo, level, chunk), index


def cell_population(
    spec: Sweep,
    store: Store,
    algo: str,
    level: int,
    tracks: Sequence[Track],
    device: torch.device | str = "cpu",
) -> tuple[Population, Tensor]:
    """The population some cells start training with, and its random keys ``[P]``.

    They are the same bit for bit on every device: initial values are drawn on the host.
    """
    arena = spec.arena(algo)
    keys = [spec.key(algo, track, level) for track in tracks]
    key = torch.tensor(keys, dtype=torch.int64, device=device)
    if level == 0 or spec.during != "none":
        initial_key = initial_keys(spec, tracks)
        dense = dense_population(arena, initial_key, spec.init, spec.log_std)
        return dense.to(device), key
    previous = _parents(spec, store, algo, level, tracks)
    trained = Trained(
        _ranked(previous, spec).to(device),
        torch.stack([ticket.mask for ticket in previous]).to(device),
    )
    rewind_point = find_rewind_point(spec, store, algo, tracks)
    population = next_population(
        arena,
        [track.condition for track in tracks],
        trained,
        Parameters(*(rows.to(device) for rows in rewind_point)),
        key,
        kept=spec.kept(algo, level),
        density=spec.density(level),
        criterion=spec.criterion,
        scheme=spec.init,
    )
    return population, key


def initial_keys(spec: Sweep, tracks: Sequence[Track]) -> Tensor:
    keys = [spec.initial_key(track.seed) for track in tracks]
    return torch.tensor(keys, dtype=torch.int64, device="cpu")


def _finished(
    spec: Sweep, store: Store, algo: str, cells: Sequence[tuple[Track, int]]
) -> list[Ticket]:
    """The tickets of finished (track, level) cells."""
    units: dict[Unit, list[Ticket]] = {}
    tickets = []
    for track, level in cells:
        unit, index = _place(spec, algo, track, level)
        if unit not in units:
            units[unit] = store.read_tickets(unit)
        tickets.append(units[unit][index])
    return tickets


def find_rewind_point(spec: Sweep, store: Store, algo: str, tracks: Sequence[Track]) -> Parameters:
    """What level 0 of each track's seed is rewound to."""
    if spec.rewind_step == 0:
        tickets = _finished(spec, store, algo, [(track, 0) for track in tracks])
        weight = torch.stack([ticket.initial for ticket in tickets])
        zeros = torch.zeros_like(weight)
        mask = torch.stack([ticket.mask for ticket in tickets])
        step = torch.zeros(len(tracks), dtype=torch.int64, device="cpu")
        return Parameters(weight, mask, zeros, zeros.clone(), step)
    units: dict[Unit, dict[str, Tensor]] = {}
    rows = []
    for track in tracks:
        chunk, index = spec.place(Track(track.seed, "dense", "shared"), 0)
        unit = Unit(algo, 0, chunk)
        if unit not in units:
            stored = store.read_rewind(unit)
            if stored is None:
                raise StoreError(
                    f"{store.path} lacks what {unit.name} is rewound to: run the sweep again"
                )
            units[unit] = stored
        rows.append(Parameters(**{name: value[index] for name, value in units[unit].items()}))
    return Parameters(*(torch.stack(values) for values in zip(*rows, strict=True)))
