"""Is a ticket better than a network that becomes sparse while it trains?

PPO pruned gradually, once, by SET, by RigL or from the start, to densities at which tickets and
random masks of the same seeds were trained; equal steps, the same initial weights::

    python -m experiments.during_training [--quick]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import (
    Experiment,
    Finding,
    Place,
    direction,
    effect,
    main,
    markdown,
    signed,
)
from experiments.sweeps import TICKET, cartpole, cartpole_spec, cuts, levels
from sparse_tickets import load_results

METHODS = {
    "gradual": "gradual pruning",
    "one-shot": "one-shot pruning",
    "rigl": "RigL",
    "set": "SET",
    "static": "static random (ERK)",
}
TICKETS, GLOBAL = "ticket", "static random (global)"
APART = 3
"""Levels of the sweep between two densities here."""
EVERY = 250
"""Gradient steps between two updates of the masks: the published thousands are most of a run."""
METRICS = {"return_auc": "learning curve", "return_final": "final return"}


def collect(place: Place) -> pl.DataFrame:
    spec, store = cartpole(place)
    apart = 1 if place.quick else APART
    last = max(levels(store, "ppo")) // apart * apart
    stored = (
        load_results(store.path)
        .filter((pl.col("algo") == "ppo") & pl.col("level").is_in(range(0, last + 1, apart)))
        .with_columns(
            level=pl.col("level") // apart,
            method=pl.col("condition").replace_strict(
                {TICKET: TICKETS, "random/re-init": GLOBAL, "dense": "dense"}, default=None
            ),
        )
        .drop_nulls("method")
    )
    found = [stored]
    for method in list(METHODS)[: 2 if place.quick else None]:
        name = f"during-{method}"
        if place.partial and not place.begun(name):
            continue
        during = replace(
            cartpole_spec(place.quick),
            algos=("ppo",),
            conditions=(TICKET,),
            controls=("own",),
            rate=1 - (1 - spec.rate) ** apart,
            levels=last // apart + 1,
            during=method,
            during_every=1 if place.quick else EVERY,
        )
        trained = place.sweep(name, during)
        if len(levels(trained, "ppo")) < during.levels:
            continue
        cells = load_results(trained.path).filter(pl.col("level") > 0)
        found.append(cells.with_columns(method=pl.lit(METHODS[method])))
    return pl.concat(found, how="diagonal")


def matrix(cells: pl.DataFrame, method: str, metric: str) -> np.ndarray:
    """``[seeds, levels]`` of a method, dense first, as a share of random to dense."""
    random = cells["random_return"].mean()
    dense = cells.filter(pl.col("method") == "dense")["return_final"].median()
    rows = cells.filter(pl.col("method").is_in(["dense", method])).sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def methods(cells: pl.DataFrame) -> list[str]:
    there = set(cells["method"])
    return [name for name in (TICKETS, *METHODS.values(), GLOBAL) if name in there]


def densities(cells: pl.DataFrame) -> np.ndarray:
    return cells.filter(pl.col("method").is_in(["dense", TICKETS])).group_by("level").agg(
        pl.col("density").max()
    ).sort("level")["density"].to_numpy()  # fmt: skip


def conclude(cells: pl.DataFrame) -> Finding:
    density = densities(cells)
    at = len(density) - 2 if len(density) > 2 else len(density) - 1
    gradual = METHODS["gradual"]
    above = {}
    for name in (TICKETS, gradual):
        values = matrix(cells, name, "return_final")
        above[name] = values[:, at] - values[:, 0]
    shown = "; ".join(f"{name} {signed(*effect(gap), digits=2)}" for name, gap in above.items())
    words = {1: "better than dense", 0: "not told from dense", -1: "worse than dense"}
    return Finding(
        ran=f"{', '.join(methods(cells))}; "
        f"{cells['env'][0]}, PPO, {cells['seed'].n_unique()} seeds at "
        f"{', '.join(f'{each:.1%}' for each in density[1:])} of the weights, "
        f"{cells['train_steps'].max():,} steps, masks updated every {EVERY} gradient steps, "
        f"{len(cells)} trainings (cut: {cuts(cells)}, no DQN, no wider networks)",
        effect=f"final return minus dense at {density[at]:.1%}, of the dense return: {shown}",
        verdict="; ".join(f"{name}: {words[direction(gap)]}" for name, gap in above.items()),
        text=text(cells, density),
        figures={"during_training": draw(cells, density)},
    )


def text(cells: pl.DataFrame, density: np.ndarray) -> str:
    rows = []
    for name in methods(cells):
        row = [name]
        for metric in METRICS:
            values, own = matrix(cells, name, metric), matrix(cells, TICKETS, metric)
            for level in range(1, len(density)):
                middle = values[:, level].mean()
                gap = signed(*effect(values[:, level] - own[:, level]), digits=2)
                row.append(f"{middle:.2f}" if name == TICKETS else f"{middle:.2f}: {gap}")
        rows.append(row)
    header = [
        "method",
        *(f"{name}, {each:.1%}" for name in METRICS.values() for each in density[1:]),
    ]
    return """Shares of the range from the random policy to the dense one, mean over seeds, and
after the colon the difference from the ticket of the same seed. A ticket has been trained several
times to find its mask, the others train once; what is pruned gradually is dense at first, its curve
too. Masks that change share a density out by ERK, as published.

""" + markdown(header, rows)


def draw(cells: pl.DataFrame, density: np.ndarray) -> Figure:
    panels = {
        title: [Line(name, 100 * density, matrix(cells, name, metric)) for name in methods(cells)]
        for metric, title in METRICS.items()
    }
    return line_figure(
        panels,
        f"{cells['env'][0]}, PPO: sparse while it trains",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "share of the dense return",
    )


EXPERIMENT = Experiment(
    name="during_training",
    question="Is a ticket better than pruning while it trains?",
    claim="For PPO gradual pruning changes nothing, and lottery tickets do worse than dense "
    "(Obando-Ceron et al. 2024)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
