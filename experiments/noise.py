"""Does pruning find the inputs that matter among pure noise?

CartPole with standard normals among its inputs, half to nineteen of twenty of them: which inputs
tickets of PPO keep their weights on, and what they earn, beside random masks::

    python -m experiments.noise [--quick]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown
from experiments.sweeps import TICKET, cartpole_spec, cuts, levels, tickets
from sparse_tickets import Sweep, Ticket, load_results
from sparse_tickets.envs import env_spec
from sparse_tickets.envs.noise import split_noise
from sparse_tickets.sweep.store import Store

RANDOM = "random/re-init"
COUNTS = (4, 16, 76)


def collect(place: Place) -> pl.DataFrame:
    found = []
    for count in COUNTS[:1] if place.quick else COUNTS:
        spec = replace(
            cartpole_spec(place.quick),
            env=f"CartPole-v1+noise={count}",
            algos=("ppo",),
            conditions=(TICKET, RANDOM),
            controls=("own",),
        )
        if not place.quick:
            spec = replace(spec, rate=0.488, levels=7, seeds=6)
        if place.partial and not place.begun(f"noise-{count}"):
            continue
        found.append(_with_ranks(count, spec, place.sweep(f"noise-{count}", spec)))
    return pl.concat(found, how="diagonal")


def _with_ranks(count: int, spec: Sweep, store: Store) -> pl.DataFrame:
    name, noise = split_noise(spec.env)
    known = env_spec(name).observation_dim
    real = np.array(noise.source(known)) < known
    rows = [
        {"seed": ticket.seed, "level": level, "condition": condition, "rank": _rank(ticket, real)}
        for level in levels(store, "ppo")
        for condition in ((TICKET, RANDOM) if level else ("dense",))
        for ticket in tickets(store, "ppo", level, condition)
    ]
    kept = pl.DataFrame(rows)
    return (
        load_results(store.path)
        .join(kept, on=["seed", "level", "condition"])
        .with_columns(noise=pl.lit(count), real=pl.lit(int(real.sum())))
    )


def _rank(ticket: Ticket, real: np.ndarray) -> float:
    """Chance that a real input keeps more weights than a noise input; ties count half."""
    kept = ticket.arena.actor.weight(ticket.mask[None], 0)[0].sum(0).numpy()
    more = kept[real][:, None] > kept[~real]
    equal = kept[real][:, None] == kept[~real]
    return float((more + 0.5 * equal).mean())


def matrix(cells: pl.DataFrame, condition: str, column: str) -> np.ndarray:
    """``[seeds, levels]``, dense first."""
    rows = cells.filter(pl.col("condition").is_in(["dense", condition])).sort("seed", "level")
    return rows[column].to_numpy().reshape(rows["seed"].n_unique(), -1)


def by_noise(cells: pl.DataFrame) -> dict[int, pl.DataFrame]:
    return {count: part for (count,), part in cells.group_by("noise", maintain_order=True)}


def _share(part: pl.DataFrame) -> str:
    noise, real = part["noise"][0], part["real"][0]
    return f"{noise / (noise + real):.0%} noise"


def conclude(cells: pl.DataFrame) -> Finding:
    found, directions = [], []
    for part in by_noise(cells).values():
        last = part["level"].max()
        ranks = matrix(part, TICKET, "rank")[:, last]
        directions.append(direction(ranks - 0.5))
        middle, low, high = effect(ranks)
        found.append(f"{_share(part)}: {middle:.2f} [{low:.2f}, {high:.2f}]")
    density = cells["density"].min()
    steps = cells["train_steps"].max()
    return Finding(
        ran=f"CartPole-v1 with {', '.join(map(str, by_noise(cells)))} inputs of noise, PPO, "
        f"{cells['seed'].n_unique()} seeds, {cells['level'].max() + 1} levels down to "
        f"{density:.1%}, {steps:,} steps, {len(cells)} trainings (cut: {cuts(cells)}, no "
        "training that prunes on the way)",
        effect=f"chance that a real input keeps more weights than noise, at {density:.1%}: "
        + "; ".join(found),
        verdict=verdict(directions),
        text=text(cells),
        figures={"noise": draw(cells)},
    )


def verdict(directions: list[int]) -> str:
    if -1 in directions:
        return "disagrees"
    above = directions.count(1)
    if above == len(directions):
        return "agrees"
    return f"agrees in {above} of {len(directions)}, the rest undecided" if above else "undecided"


def text(cells: pl.DataFrame) -> str:
    rows = []
    for part in by_noise(cells).values():
        density = matrix(part, TICKET, "density")[0]
        for level in range(len(density)):
            rank, low, high = effect(matrix(part, TICKET, "rank")[:, level])
            rows.append(
                [
                    f"{_share(part)}, {density[level]:.1%} kept",
                    f"{rank:.2f} [{low:.2f}, {high:.2f}]",
                    *(
                        f"{matrix(part, condition, 'return_final')[:, level].mean():.0f}"
                        for condition in (TICKET, RANDOM)
                    ),
                ]
            )
    return """Noise is drawn anew at every step and says nothing. The rank is the chance that one of
the environment's own inputs keeps more of its weights than an input of noise: 0.5 is chance, 1 is
every real input before all noise. Random masks are the static control, drawn over all layers.

""" + markdown(["inputs", "rank of real inputs", "return, tickets", "random masks"], rows)


def draw(cells: pl.DataFrame) -> Figure:
    panels: dict[str, list[Line]] = {"rank of real inputs": [], "final return, tickets": []}
    for part in by_noise(cells).values():
        x = 100 * matrix(part, TICKET, "density")[0]
        for title, column in zip(panels, ("rank", "return_final"), strict=True):
            panels[title].append(Line(_share(part), x, matrix(part, TICKET, column)))
    seeds = cells["seed"].n_unique()
    return line_figure(
        panels,
        "CartPole-v1 with inputs of pure noise, PPO",
        f"mean of {seeds} seeds, 95% interval",
        "density",
        "",
        share_y=False,
    )


EXPERIMENT = Experiment(
    name="noise",
    question="Does pruning find the inputs among noise?",
    claim="Sparse training finds the task's inputs among pure noise (Grooten et al. 2023, for "
    "dynamic sparsity)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
