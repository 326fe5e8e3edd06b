"""What does the initialisation decide: which layers keep weights, which inputs stay, the return?

Tickets of PPO from each named initialisation and from `rescaled`, in which every layer draws from
one distribution, so that no layer is favoured by a ranking of magnitudes::

    python -m experiments.rescaling [--quick]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, effect, main, markdown, signed
from experiments.sweeps import (
    INPUTS,
    TICKET,
    cartpole,
    cartpole_spec,
    kept_inputs,
    levels,
    per_level,
    setting,
    tickets,
)
from sparse_tickets import Sweep, load_results
from sparse_tickets.analysis.statistics import restricted_levels
from sparse_tickets.population import INITIALISATIONS
from sparse_tickets.sweep.store import Store

PLAIN, OURS = "lecun", "rescaled"
LAYERS = ("input", "hidden", "head")


def collect(place: Place) -> pl.DataFrame:
    spec, store = cartpole(place)
    found = {PLAIN: (spec, store)}
    for init in INITIALISATIONS:
        if init != PLAIN:
            other = replace(
                cartpole_spec(place.quick),
                init=init,
                algos=("ppo",),
                conditions=(TICKET,),
                controls=("own",),
            )
            found[init] = other, place.sweep(f"cartpole-{init}", other)
    return pl.concat([_with_layers(init, *found[init]) for init in INITIALISATIONS])


def _with_layers(init: str, spec: Sweep, store: Store) -> pl.DataFrame:
    rows = []
    for level in levels(store, "ppo"):
        for ticket in tickets(store, "ppo", level):
            actor, mask = ticket.arena.actor, ticket.mask[None]
            shares = [
                actor.weight(mask, layer).double().mean().item() for layer in range(actor.depth)
            ]
            rows.append(
                {
                    "seed": ticket.seed,
                    "level": level,
                    "layers": shares,
                    "inputs": kept_inputs(ticket),
                }
            )
    cells = load_results(store.path).filter(
        (pl.col("algo") == "ppo") & pl.col("condition").is_in(["dense", TICKET])
    )
    return cells.join(pl.DataFrame(rows), on=["seed", "level"]).with_columns(init=pl.lit(init))


def matrix(cells: pl.DataFrame, init: str, value: str | pl.Expr) -> np.ndarray:
    """``[seeds, levels]``."""
    rows = cells.filter(pl.col("init") == init).sort("seed", "level")
    column = rows.select(value).to_series().cast(pl.Float64).to_numpy()
    return column.reshape(rows["seed"].n_unique(), -1)


INPUTS_KEPT = pl.col("inputs").list.eval(pl.element().cast(pl.Int64)).list.sum()


def conclude(cells: pl.DataFrame) -> Finding:
    kept = effect(
        matrix(cells, OURS, INPUTS_KEPT)[:, -1] - matrix(cells, PLAIN, INPUTS_KEPT)[:, -1]
    )
    later = effect(_degradation(cells, OURS) - _degradation(cells, PLAIN))
    return Finding(
        ran=f"PPO tickets of {len(INITIALISATIONS)} initialisations; each: {setting(cells)}",
        effect=f"{OURS} minus {PLAIN}: {signed(*kept)} inputs at {cells['density'].min():.2%}; "
        f"degrades {signed(*later)} levels later",
        verdict=verdict(kept),
        text=text(cells),
        figures={"rescaling": draw(cells)},
    )


def verdict(kept: tuple[float, float, float]) -> str:
    _, low, high = kept
    if high < 0:
        return "agrees: more inputs go"
    return "disagrees: fewer inputs go" if low > 0 else "undecided"


def _degradation(cells: pl.DataFrame, init: str) -> np.ndarray:
    """Degradation level of each seed, in the protocol's levels, cut at the horizon of all."""
    judged = []
    for name in INITIALISATIONS:
        values = matrix(cells, name, "return_final")
        random = cells["random_return"].mean()
        judged.append((values - random) / (np.median(values[:, 0]) - random))
    levels, _, _ = restricted_levels(*judged)
    return per_level(cells) * levels[INITIALISATIONS.index(init)]


def text(cells: pl.DataFrame) -> str:
    names = INPUTS[cells["env"][0]]
    rows = []
    for init in INITIALISATIONS:
        middle = matrix(cells, init, "density").shape[1] // 2
        last = cells.filter((pl.col("init") == init) & (pl.col("level") == cells["level"].max()))
        layers = cells.filter((pl.col("init") == init) & (pl.col("level") == middle))["layers"]
        share = np.array(layers.to_list()).mean(0)
        survive = np.array(last["inputs"].to_list()).mean(0)
        dense, low, high = effect(matrix(cells, init, "return_final")[:, 0])
        level, first, final = effect(_degradation(cells, init))
        rows.append(
            [
                init,
                f"{dense:.0f} [{low:.0f}, {high:.0f}]",
                f"{level:.1f} [{first:.1f}, {final:.1f}]",
                *(f"{value:.1%}" for value in share),
                *(f"{value:.0%}" for value in survive),
            ]
        )
    middle = cells["level"].max() // 2 + cells["level"].max() % 2
    at = cells.filter(pl.col("level") == middle)["density"].max()
    return f"""Each: {setting(cells)}.

The dense return, the level at which the tickets degrade (the protocol's levels; a track that does
not counts as the last), the share of each layer that is kept at {at:.1%} of all weights, and at
{cells["density"].min():.2%} how many seeds keep a path from each input.

""" + markdown(
        ["init", "dense", "degrades at", *LAYERS, *names],
        rows,
    )


def draw(cells: pl.DataFrame) -> Figure:
    x = 100 * matrix(cells, PLAIN, "density")[0]
    seen = {
        "share of the input layer kept": 100 * pl.col("layers").list.first(),
        f"inputs kept, of {len(INPUTS[cells['env'][0]])}": INPUTS_KEPT,
        "final return": pl.col("return_final"),
    }
    panels = {
        title: [Line(init, x, matrix(cells, init, value)) for init in INITIALISATIONS]
        for title, value in seen.items()
    }
    seeds = cells["seed"].n_unique()
    return line_figure(
        panels,
        f"{cells['env'][0]}, PPO tickets by initialisation",
        f"mean of {seeds} seeds, 95% interval",
        "density",
        "",
        share_y=False,
    )


EXPERIMENT = Experiment(
    name="rescaling",
    question="What does the initialisation decide?",
    claim="Rescaling the initialisation makes pruning remove whole inputs in low-dimensional tasks "
    "(Vischer et al. 2022; their formula was not to be had, ours is `rescaled`)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
