"""Does pruning find the inputs that matter among pure noise?

CartPole with standard normals among its inputs, half to nineteen of twenty of them: which inputs
tickets of PPO keep their weights on, and what they earn, beside random masks and networks that
become sparse while they train::

    python -m experiments.noise [--quick]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.during_training import STUDIES
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import cuts
from experiments.sweeps import TICKET, cartpole, levels, tickets
from sparse_tickets import Sweep, Ticket, load_results
from sparse_tickets.envs import env_spec
from sparse_tickets.envs.noise import Noise
from sparse_tickets.sweep.store import Store

RANDOM = "random/re-init"
COUNTS = (4, 16, 76)
METHODS = {
    TICKET: "tickets",
    "gradual": "gradual pruning",
    "set": "SET",
    "rigl": "RigL",
    "static": "static random (ERK)",
    RANDOM: "static random (global)",
}
JUDGED = (TICKET, "gradual", "set", "rigl")
SPARSE = ("gradual", "set", "rigl", "static")
DURING = (76,)
"""Among how much noise networks are made sparse while they train, too."""
APART = 2
"""Levels of the tickets between two densities of theirs."""


def collect(place: Place) -> pl.DataFrame:
    found = []
    for count in COUNTS[-1:] if place.quick else COUNTS:
        spec = replace(
            cartpole.spec(place),
            env=f"CartPole-v1+noise={count}",
            algos=("ppo",),
            conditions=(TICKET, RANDOM),
            controls=("own",),
        )
        if not place.quick:
            spec = replace(spec, rate=0.488, levels=7, seeds=6)
        found.append(_ranked(place, f"noise-{count}", count, spec))
        for method in SPARSE[: 1 if place.quick else None] if count in DURING else ():
            during = replace(
                spec,
                conditions=(TICKET,),
                rate=1 - (1 - spec.rate) ** APART,
                levels=(spec.levels - 1) // APART + 1,
                during=method,
                during_every=1 if place.quick else STUDIES["ppo"].every,
            )
            found.append(_ranked(place, f"noise-{count}-{method}", count, during))
    return pl.concat([cells for cells in found if cells is not None], how="diagonal")


def _ranked(place: Place, name: str, count: int, spec: Sweep) -> pl.DataFrame | None:
    """A sweep's cells with ranks, stored together, since tables have no masks."""

    def compute() -> pl.DataFrame:
        cells = _with_ranks(count, spec, place.sweep(name, spec))
        if spec.during == "none":
            return cells
        # By the tickets' levels, which have the dense policies too.
        return cells.filter(pl.col("level") > 0).with_columns(level=APART * pl.col("level"))

    return place.once_wanted(name, spec, compute)


def _with_ranks(count: int, spec: Sweep, store: Store) -> pl.DataFrame:
    known = env_spec("CartPole-v1").observation_dim
    real = np.array(Noise(count).source(known)) < known
    pruned = spec.conditions if spec.during == "none" else (spec.during,)
    rows = [
        {"seed": ticket.seed, "level": level, "condition": condition, "rank": _rank(ticket, real)}
        for level in levels(store, "ppo")
        for condition in (pruned if level else ("dense",))
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
    """``[seeds, densities]`` of a condition, pruned levels alone."""
    rows = cells.filter(pl.col("condition") == condition).sort("seed", "level")
    return rows[column].to_numpy().reshape(rows["seed"].n_unique(), -1)


def by_noise(cells: pl.DataFrame) -> dict[int, pl.DataFrame]:
    return {count: part for (count,), part in cells.group_by("noise", maintain_order=True)}


def _share(part: pl.DataFrame) -> str:
    noise, real = part["noise"][0], part["real"][0]
    return f"{noise / (noise + real):.0%} noise"


def conclude(cells: pl.DataFrame) -> Finding:
    found, directions = [], {}
    parts = list(by_noise(cells).values())
    for name in methods(cells, JUDGED):
        ranks = {
            _share(part): matrix(part, name, "rank")[:, -1]
            for part in parts
            if name in set(part["condition"])
        }
        shown = (f"{share} {_text(effect(values))}" for share, values in ranks.items())
        found.append(f"{METHODS[name]}: {', '.join(shown)}")
        directions[name] = [direction(values - 0.5) for values in ranks.values()]
    gains = [f"{_share(part)} {signed(*effect(gain(part)), digits=0)}" for part in parts]
    density = cells["density"].min()
    steps = cells["train_steps"].max()
    sparse = methods(cells, SPARSE)
    among = "among most noise only"
    cut = (
        f"networks that train sparse {among}" if sparse else "none that becomes sparse in training"
    )
    return Finding(
        ran=f"CartPole-v1 with {', '.join(map(str, by_noise(cells)))} inputs of noise, PPO, "
        f"{cells['seed'].n_unique()} seeds, densities down to {density:.1%}, {steps:,} steps, "
        f"{', '.join(METHODS[name] for name in methods(cells))}, {len(cells)} trainings "
        f"(cut: {cuts(cells)}, {cut})",
        effect=f"chance that a real input keeps more weights than noise, at {density:.1%}: "
        + f"{'; '.join(found)}; final return, tickets minus dense: {', '.join(gains)}",
        verdict="; ".join(f"{METHODS[name]}: {verdict(d)}" for name, d in directions.items()),
        text=text(cells),
        figures={"noise": partial(draw, cells)},
    )


def gain(part: pl.DataFrame) -> np.ndarray:
    """Final return of each seed's sparsest ticket minus that of its dense policy."""
    dense = matrix(part, "dense", "return_final")[:, 0]
    return matrix(part, TICKET, "return_final")[:, -1] - dense


def methods(cells: pl.DataFrame, among: Iterable[str] = METHODS) -> list[str]:
    there = set(cells["condition"])
    return [name for name in among if name in there]


def verdict(directions: list[int]) -> str:
    if -1 in directions:
        return "disagrees"
    above = directions.count(1)
    if above == len(directions):
        return "agrees"
    return f"agrees in {above} of {len(directions)}, the rest undecided" if above else "undecided"


def _text(values: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def text(cells: pl.DataFrame) -> str:
    paragraphs = [
        """Noise is drawn anew at every step and says nothing. The rank is the chance that one of
the environment's own inputs keeps more of its weights than an input of noise: 0.5 is chance, 1 is
every real input before all noise. Each field has the rank, mean over seeds with its bootstrap
interval, and after it the final return. "Global" random masks are drawn over all layers."""
    ]
    for part in by_noise(cells).values():
        dense = part.filter(pl.col("level") == 0)["return_final"].mean()
        shown = densities(part)
        rows = [[METHODS[name], *fields(part, name)] for name in methods(part)]
        paragraphs += [
            f"**{_share(part).capitalize()}**, the dense return {dense:.0f}:",
            markdown(["method", *(f"{density:.1%}" for density in shown)], rows),
        ]
    return "\n\n".join(paragraphs)


def densities(part: pl.DataFrame) -> np.ndarray:
    """Every second density of the tickets: those at which all methods were run."""
    return matrix(part, TICKET, "density")[0, APART - 1 :: APART]


def fields(part: pl.DataFrame, name: str) -> list[str]:
    """Rank and return of a method at `densities`."""
    apart = slice(APART - 1, None, APART) if name in (TICKET, RANDOM) else slice(None)
    rank, final = (matrix(part, name, column)[:, apart] for column in ("rank", "return_final"))
    return [
        f"{_text(effect(rank[:, at]))}; {final[:, at].mean():.0f}" for at in range(rank.shape[1])
    ]


def draw(cells: pl.DataFrame) -> Figure:
    """Tickets by noise, then all methods where most is noise: a panel each."""
    panels: dict[str, list[Line]] = {}
    words = {"rank": "rank of real inputs", "return_final": "final return"}
    for column, word in words.items():
        panels[f"{word}, tickets"] = [
            Line(
                _share(part), 100 * matrix(part, TICKET, "density")[0], matrix(part, TICKET, column)
            )
            for part in by_noise(cells).values()
        ]
    most = list(by_noise(cells).values())[-1]
    for column, word in words.items():
        panels[f"{word}, {_share(most)}"] = [
            Line(METHODS[name], 100 * matrix(most, name, "density")[0], matrix(most, name, column))
            for name in methods(most)
        ]
    return line_figure(
        panels,
        "CartPole-v1 with inputs of pure noise, PPO",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
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
