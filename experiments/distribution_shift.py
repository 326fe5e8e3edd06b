"""Do tickets of cloning outlast those of PPO because their data stand still?

Cloning in three kinds of states: a frozen data set's; those that the student visits as it learns;
and those of PPO's own training, in their order, imitating the policies of that time: PPO's shift of
the distribution without its exploration. Experts, initial values and budget are the same::

    python -m experiments.distribution_shift [--quick]
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import per_level, setting
from experiments.sweeps import TICKET, cartpole, taught
from sparse_tickets.analysis import frame as results
from sparse_tickets.analysis.statistics import sign_flip
from sparse_tickets.analysis.table import degradation

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
    cells = cartpole.cells(place)
    found = [cells.filter(pl.col("condition").is_in(shown))]
    for states in ("student", "replay"):
        sweep = taught(states)
        if sweep.wanted(place):
            found.append(sweep.cells(place).with_columns(states=pl.lit(states)))
    return pl.concat(found, how="diagonal")


def ways(cells: pl.DataFrame) -> dict[str, str]:
    return {algo: name for algo, name in TEACHING.items() if algo in set(cells["algo"])}


def pairs(cells: pl.DataFrame) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if ways(cells).keys() >= set(pair)]


def retained(cells: pl.DataFrame, algo: str, condition: str, metric: str) -> np.ndarray:
    """Each seed's return, mean over the pruned levels, as a share of random to its way's dense."""
    track = results.tracks(cells, cells["env"][0], algo, condition, "own", metric)
    shares = (track.values - track.random) / (track.dense_median - track.random)
    return shares[:, 1:].mean(1)


def gap(cells: pl.DataFrame, one: str, other: str, condition: str, metric: str) -> np.ndarray:
    """What one way retains more than the other, by seed."""
    first, second = (retained(cells, algo, condition, metric) for algo in (one, other))
    return first - second


def conclude(cells: pl.DataFrame) -> Finding:
    # Clones in other states are told from the others by their states alone.
    cells = cells.with_columns(algo=pl.coalesce([*({"states"} & set(cells.columns)), "algo"]))
    shown = [
        f"{word}: "
        + ", ".join(
            f"{TEACHING[one]} minus {TEACHING[other]} "
            f"{signed(*effect(gap(cells, one, other, TICKET, metric)), digits=3)}"
            for one, other in pairs(cells)
        )
        for metric, word in METRICS.items()
    ]
    return Finding(
        ran=setting(cells),
        effect=f"return that tickets retain, mean over levels; {'; '.join(shown)}",
        verdict="; ".join(
            f"by {METRICS[metric]} actions {verdict(cells, metric)}" for metric in METRICS
        ),
        text=text(cells),
        figures={"distribution_shift": partial(draw, cells)},
    )


def verdict(cells: pl.DataFrame, metric: str) -> str:
    """Whether the shift alone costs cloned tickets return, and how much of PPO's loss it is."""
    if not {("replay", "bc"), ("bc", "ppo")} <= set(pairs(cells)):
        return "not run"
    whole = gap(cells, "bc", "ppo", TICKET, metric)
    shift = gap(cells, "bc", "replay", TICKET, metric)
    word = {1: "the shift costs return", 0: "undecided", -1: "the shift gains return"}
    found = word[direction(shift)]
    if direction(shift) == direction(whole) == 1:
        found += f", {shift.mean() / whole.mean():.0%} of what PPO loses against cloning"
    return found


def text(cells: pl.DataFrame) -> str:
    scale = per_level(cells)
    levels = {
        metric: {(row["algo"], row["condition"]): row for row in rows.iter_rows(named=True)}
        for metric in METRICS
        for rows in [degradation(cells, metric)]
    }
    ran = [
        [
            f"{TEACHING[algo]}, {name}",
            *(f"{retained(cells, algo, condition, metric).mean():.2f}" for metric in METRICS),
            *(_level(levels[metric].get((algo, condition)), scale) for metric in METRICS),
        ]
        for algo, (condition, name) in product(ways(cells), CONDITIONS.items())
    ]
    apart = [
        [
            f"{TEACHING[one]} minus {TEACHING[other]}, {name}",
            *(
                f"{signed(*effect(gaps), digits=3)} (p {sign_flip(gaps):.2f})"
                for metric in METRICS
                for gaps in [gap(cells, one, other, condition, metric)]
            ),
        ]
        for (one, other), (condition, name) in product(pairs(cells), CONDITIONS.items())
    ]
    return f"""{setting(cells)}. Retained is the return, mean over the pruned levels, as a share of
the range from the random policy to the way's own dense one. Where a policy degrades is defined as
above; levels are the protocol's.

{markdown(["trained by", "retained, greedy", "sampled", "degrades at, greedy", "sampled"], ran)}

Differences of what is retained, paired by seed, with bootstrap intervals and the exact sign-flip p.

{markdown(["difference", "greedy", "sampled"], apart)}"""


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
