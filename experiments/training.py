"""Policies that no condition of a sweep describes, trained as the sweep's are; what masks keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from experiments.sweeps import TICKET
from sparse_tickets import Population, Sweep, Ticket
from sparse_tickets.analysis.transfer import rows_of
from sparse_tickets.connectivity import live_inputs
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.sweep.experts import stored_demonstrations
from sparse_tickets.sweep.run import train_population
from sparse_tickets.sweep.spec import Track
from sparse_tickets.sweep.store import Store

__all__ = ["TrainedRows", "kept_inputs", "train"]


def kept_inputs(ticket: Ticket) -> list[bool]:
    """Which inputs have a path to an action."""
    return live_inputs(ticket.mask[None], ticket.arena)[0].tolist()


class TrainedRows(NamedTuple):
    """What training gave.

    Attributes:
        rows: a row per policy with the returns of a sweep's rows.
        final: the final weights ``[P, size]``.
    """

    rows: pl.DataFrame
    final: Tensor


def train(
    spec: Sweep,
    store: Store | None,
    algo: str,
    level: int,
    mask: Tensor,
    initial: Tensor,
    seeds: Sequence[int],
    what: str,
) -> TrainedRows:
    """Train policies that no condition of a sweep describes, by the sweep's settings.

    Where the sweep prunes while it trains they are pruned to the level's density on the way.

    Args:
        spec: the sweep.
        store: where it has its experts' demonstrations, if the algorithm imitates any.
        algo: what trains them.
        level: whose nominal density they have.
        mask: ``[P, N]``.
        initial: ``[P, size]``.
        seeds: ``[P]``, whose experts they imitate.
        what: makes their random keys.
    """
    begins = spec.density(level) if spec.during == "none" else 1.0
    population = Population.create(spec.arena(algo), initial, mask, begins)
    names = [
        derive_key("experiment", what, spec.env, algo, seed, level, i)
        for i, seed in enumerate(seeds)
    ]
    dataset = None
    if store is not None and algo in spec.imitating:
        dataset = stored_demonstrations(spec, store, algo)
    tracks = [Track(seed, TICKET, "own") for seed in seeds]
    key = torch.tensor(names, dtype=torch.int64, device="cpu")
    result = train_population(spec, algo, population, key, level, tracks, dataset)
    rows = rows_of(spec, algo, level, seeds, population.parameters.mask, result)
    return TrainedRows(rows, result.final)
