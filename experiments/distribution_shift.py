"""Do tickets of cloning outlast those of PPO because their data stand still?

Cloning in three kinds of states: a frozen data set's; those that the student visits as it learns;
and those of PPO's own training, in their order, imitating the policies of that time: PPO's shift of
the distribution without its exploration. Experts, initial values and budget are the same::

    python -m experiments.distribution_shift [--quick]
"""

from __future__ import annotations

from itertools import product

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, main, markdown, signed
from experiments.sweeps import TICKET, cartpole, per_level, setting, taught
from sparse_tickets import load_results
from sparse_tickets.analysis import frame as results
from sparse_tickets.analysis.table import compare, degradation

RANDOM = "random/re-init"
CONDITIONS = {TICKET: "tickets", RANDOM: "random masks"}
METRICS = {"return_final": "greedy", "return_final_sampled": "sampled"}
TEACHING = {
    "ppo": "PPO",
    "bc": "frozen data set",
    "student": "student's states",
    "replay": "PPO's training replayed",
}
"""How tickets learn: PPO, or cloning in some states."""
PAIRS = (("bc", "ppo"), ("student", "bc"), ("replay", "bc"), ("replay", "ppo"))


def collect(place: Place) -> pl.DataFrame:
    shown = ("dense", *CONDITIONS)
    cells = load_results(cartpole(place)[1].path)
    found = [cells.filter(pl.col("condition").is_in(shown))]
    for states in ("student", "replay"):
        if place.partial and not place.begun(f"cartpole-{states}"):
            continue
        cells = load_results(taught(place, states)[1].path)
        found.append(cells.with_columns(algo=pl.lit(states)))
    return pl.concat(found, how="diagonal")


def ways(cells: pl.DataFrame) -> dict[str, str]:
    return {algo: name for algo, name in TEACHING.items() if algo in set(cells["algo"])}


def differences(cells: pl.DataFrame) -> pl.DataFrame:
    """Of degradation levels, paired by seed, in levels of the protocol; Holm over all rows."""
    there = ways(cells)
    found = [
        compare(cells, first, second, metric)
        .with_columns(pl.col("difference", "low", "high") * per_level(cells))
        .with_columns(one=pl.lit(first), other=pl.lit(second), metric=pl.lit(metric))
        for first, second in PAIRS
        if first in there and second in there
        for metric in METRICS
    ]
    return pl.concat(found)


def conclude(cells: pl.DataFrame) -> Finding:
    table = differences(cells)
    mine = table.filter(pl.col("condition") == TICKET)
    shown = [
        f"{METRICS[row['metric']]}, {TEACHING[row['one']]} minus {TEACHING[row['other']]} "
        f"{signed(row['difference'], row['low'], row['high'])}"
        for row in mine.iter_rows(named=True)
    ]
    return Finding(
        ran=setting(cells),
        effect=f"levels by which tickets last longer: {'; '.join(shown)}",
        verdict=verdict(mine),
        text=text(cells, table),
        figures={"distribution_shift": draw(cells)},
    )


def verdict(mine: pl.DataFrame) -> str:
    """Agrees where what shifts as PPO's data do degrades earlier than what stands still."""
    found = []
    for metric, word in METRICS.items():
        row = mine.filter(
            (pl.col("metric") == metric) & (pl.col("one") == "replay") & (pl.col("other") == "bc")
        )
        if row.is_empty():
            return "not run"
        clear = row["p_value"][0] is not None and row["p_value"][0] < 0.05
        told = "agrees" if row["difference"][0] < 0 else "disagrees"
        found.append(f"by {word} actions {told if clear else 'undecided'}")
    return ", ".join(found)


def text(cells: pl.DataFrame, table: pl.DataFrame) -> str:
    scale = per_level(cells)
    levels = {
        metric: {(row["algo"], row["condition"]): row for row in rows.iter_rows(named=True)}
        for metric in METRICS
        for rows in [degradation(cells, metric)]
    }
    degrades = [
        [
            f"{TEACHING[algo]}, {name}",
            *(_level(levels[metric].get((algo, condition)), scale) for metric in METRICS),
        ]
        for algo, (condition, name) in product(ways(cells), CONDITIONS.items())
    ]
    apart = [
        [
            f"{TEACHING[row['one']]} minus {TEACHING[row['other']]}, "
            f"{CONDITIONS[row['condition']]}, {METRICS[row['metric']]}",
            signed(row["difference"], row["low"], row["high"]),
            f"{row['p_value']:.3f}",
        ]
        for row in table.iter_rows(named=True)
    ]
    return f"""{setting(cells)}. Where a policy degrades is defined as above, each way against its
own dense policies; levels are the protocol's. Differences are paired by seed, with bootstrap
intervals and the exact sign-flip p.

{markdown(["trained by", "degrades at, greedy", "sampled"], degrades)}

{markdown(["difference of levels", "levels", "p"], apart)}"""


def _level(row: dict | None, scale: float) -> str:
    if row is None:
        return "-"
    return f"{'>= ' if row['censored'] else ''}{row['level'] * scale:.1f} ({row['density']:.1%})"


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for (condition, title), (metric, word) in product(CONDITIONS.items(), METRICS.items()):
        lines = []
        for algo, name in ways(cells).items():
            track = results.tracks(cells, cells["env"][0], algo, condition, "own", metric)
            there = np.isfinite(track.density)
            lines.append(Line(name, 100 * track.density[there], track.values[:, there]))
        panels[f"{title}, {word} actions"] = lines
    return line_figure(
        panels,
        f"{cells['env'][0]}: what tickets learn from",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "final return",
    )


EXPERIMENT = Experiment(
    name="distribution_shift",
    question="Is it the shift of the distribution?",
    claim="Cloning can be pruned further since its data stand still: the shift of RL's "
    "distribution needs more weights (Vischer et al. 2022)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
