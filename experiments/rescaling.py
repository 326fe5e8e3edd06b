"""What does the initialisation decide: which layers keep weights, which inputs stay, the return?

Tickets of PPO from each named initialisation and from `rescaled`, in which every layer draws from
one distribution, so that no layer is favoured by a ranking of magnitudes::

    python -m experiments.rescaling [--quick]
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import per_level, setting
from experiments.sweeps import INPUTS, TICKET, cartpole, levels, tickets
from experiments.training import kept_inputs
from sparse_tickets import Sweep, load_results
from sparse_tickets.analysis.statistics import restricted_levels, sign_flip
from sparse_tickets.population import INITIALISATIONS
from sparse_tickets.sweep.store import Store

PLAIN, OURS = "lecun", "rescaled"
VERDICTS = {
    -1: "agrees: whole inputs go earlier",
    0: "undecided",
    1: "disagrees: whole inputs go later",
}
LAYERS = ("input", "hidden", "head")


SPARSEST = 8
"""The last level of other initialisations than the sweep's own."""


def collect(place: Place) -> pl.DataFrame:
    found = []
    for init in INITIALISATIONS:
        spec = cartpole.spec(place)
        if init != PLAIN:
            spec = replace(
                spec,
                init=init,
                algos=("ppo",),
                conditions=(TICKET,),
                controls=("own",),
                levels=min(spec.levels, SPARSEST + 1),
            )
        trained = partial(_trained, place, init, spec)
        found.append(place.once_wanted(f"rescaling-{init}", spec, trained))
    return pl.concat([cells for cells in found if cells is not None], how="diagonal")


def _trained(place: Place, init: str, spec: Sweep) -> pl.DataFrame:
    """An initialisation's tickets with layers and inputs, of which tables have no masks."""
    name = cartpole.name if init == PLAIN else f"cartpole-{init}"
    return _with_layers(init, spec, place.sweep(name, spec))


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


def initialisations(cells: pl.DataFrame) -> list[str]:
    """Those that were run, in the library's order."""
    there = set(cells["init"])
    return [init for init in INITIALISATIONS if init in there]


def conclude(cells: pl.DataFrame) -> Finding:
    ours, plain = matrix(cells, OURS, INPUTS_KEPT), matrix(cells, PLAIN, INPUTS_KEPT)
    last = min(ours.shape[1], plain.shape[1]) - 1
    kept = (ours[:, : last + 1] - plain[:, : last + 1]).mean(1)
    agree = [f"{agreeing(cells, init, last)} ({init})" for init in (OURS, PLAIN)]
    share = effect(_input_layer(cells, OURS)[:, last] - _input_layer(cells, PLAIN)[:, last])
    levels = _degradation(cells)
    later = effect(levels[OURS] - levels[PLAIN])
    density = matrix(cells, OURS, "density")[0, last]
    return Finding(
        ran=f"PPO tickets of {', '.join(initialisations(cells))}; {setting(cells)}; all but "
        f"{PLAIN} down to {density:.1%} only",
        effect=f"{OURS} minus {PLAIN}: {signed(*effect(kept), digits=2)} inputs kept, mean over "
        f"levels (p = {sign_flip(kept):.2f}); "
        f"{signed(*share, digits=0)} points of the input layer at {density:.1%}, where seeds of "
        f"the commonest set of inputs are {' and '.join(agree)}; degrades {signed(*later)} levels "
        "later",
        verdict=VERDICTS[direction(kept)],
        text=text(cells, levels, last),
        figures={"rescaling": partial(draw, cells)},
    )


def agreeing(cells: pl.DataFrame, init: str, level: int) -> str:
    """How many seeds keep the set of inputs that most keep."""
    kept = cells.filter((pl.col("init") == init) & (pl.col("level") == level))["inputs"].to_list()
    sets = [tuple(each) for each in kept]
    return f"{max(map(sets.count, sets))} of {len(sets)}"


def _input_layer(cells: pl.DataFrame, init: str) -> np.ndarray:
    """Percent of the input layer that is kept, ``[seeds, levels]``."""
    return matrix(cells, init, 100 * pl.col("layers").list.first())


def _degradation(cells: pl.DataFrame) -> dict[str, np.ndarray]:
    """Degradation level of each seed in the protocol's levels, cut at the horizon of all."""
    names = [init for init in initialisations(cells) if matrix(cells, init, "level").shape[1] > 2]
    judged = []
    for name in names:
        values = matrix(cells, name, "return_final")
        random = cells["random_return"].mean()
        judged.append((values - random) / (np.median(values[:, 0]) - random))
    levels, _, _ = restricted_levels(*judged)
    return {name: per_level(cells) * each for name, each in zip(names, levels, strict=True)}


def text(cells: pl.DataFrame, levels: dict[str, np.ndarray], last: int) -> str:
    rows = []
    for init in initialisations(cells):
        here = cells.filter(pl.col("init") == init)
        end = min(last, max(here["level"]))
        dense, low, high = effect(matrix(cells, init, "return_final")[:, 0])
        degraded = "-"
        if init in levels:
            level, first, final = effect(levels[init])
            degraded = f"{level:.1f} [{first:.1f}, {final:.1f}]"
        rows.append(
            [
                f"{init}, at {matrix(cells, init, 'density')[0, end]:.1%}",
                f"{dense:.0f} [{low:.0f}, {high:.0f}]",
                degraded,
                *(f"{value:.1%}" for value in _mean_of(here, "layers", end)),
                *(f"{value:.0%}" for value in _mean_of(here, "inputs", end)),
            ]
        )
    return f"""{setting(cells)}.

The dense return; the level at which the tickets degrade (the protocol's levels; a track that does
not counts as the last; left out where too few levels were run); and at the density in the first
column the share of each layer that is kept, and how many seeds keep a path from each input.

""" + markdown(
        ["initialisation", "dense", "degrades at", *LAYERS, *INPUTS[cells["env"][0]]],
        rows,
    )


def _mean_of(cells: pl.DataFrame, column: str, level: int) -> np.ndarray:
    return np.array(cells.filter(pl.col("level") == level)[column].to_list()).mean(0)


def draw(cells: pl.DataFrame) -> Figure:
    seen = {
        "percent of the input layer kept": 100 * pl.col("layers").list.first(),
        f"inputs kept, of {len(INPUTS[cells['env'][0]])}": INPUTS_KEPT,
        "final return": pl.col("return_final"),
    }
    panels = {
        title: [
            Line(init, 100 * matrix(cells, init, "density")[0], matrix(cells, init, value))
            for init in initialisations(cells)
        ]
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
