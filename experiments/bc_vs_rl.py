"""Do cloned policies keep their return to sparser levels than reinforcement-learned ones?

PPO and cloning of PPO experts, from the same initial weights, pruned until tickets degrade; every
condition, judged by greedy and by sampled returns::

    python -m experiments.bc_vs_rl [--quick]
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.frame import Experiment, Finding, Place, main, markdown, signed
from experiments.sweeps import cartpole, per_level, setting
from sparse_tickets import load_results
from sparse_tickets.analysis.frame import CONDITIONS
from sparse_tickets.analysis.style import DPI, GREY, INK, PALE, head, styled
from sparse_tickets.analysis.table import compare, degradation

METRICS = {"return_final": "greedy", "return_final_sampled": "sampled"}
TICKET = "mask/weights"
HEADER = (
    "condition, controls, actions",
    "PPO degrades at",
    "cloning at",
    "difference",
    "p",
    "Holm",
)


def collect(place: Place) -> pl.DataFrame:
    return load_results(cartpole(place)[1].path)


def differences(cells: pl.DataFrame) -> pl.DataFrame:
    """Cloning's degradation level minus PPO's, paired by seed, in levels of the protocol."""
    found = [
        compare(cells, metric=metric).with_columns(pl.lit(metric).alias("metric"))
        for metric in METRICS
    ]
    levels = ("first", "second", "difference", "low", "high", "horizon")
    return pl.concat(found).with_columns(pl.col(levels) * per_level(cells))


def conclude(cells: pl.DataFrame) -> Finding:
    table = differences(cells)
    tickets = {
        row["metric"]: row for row in table.iter_rows(named=True) if row["condition"] == TICKET
    }
    effect = "; ".join(
        f"tickets, {METRICS[metric]}: {signed(row['difference'], row['low'], row['high'])} levels"
        for metric, row in tickets.items()
    )
    return Finding(
        ran=setting(cells),
        effect=effect or "no dense policy beat the random one",
        verdict=verdict(tickets.values()),
        text=text(cells, table),
        figures={"bc_vs_rl": draw(table, cells)},
    )


def verdict(tickets: Iterable[dict]) -> str:
    """What the intervals of the tickets' differences support."""
    tickets = list(tickets)
    if all(row["first_censored"] + row["second_censored"] == 2 * row["pairs"] for row in tickets):
        return "undecided: no ticket degraded"
    signs = {
        1 if row["low"] > 0 else -1 if row["high"] < 0 else 0
        for row in tickets
        if row["low"] is not None
    }
    if signs == {1}:
        return "agrees with v4: cloning lasts longer"
    if signs == {-1}:
        return "against v4: PPO lasts longer"
    if {1, -1} <= signs:
        return "depends on the metric"
    if signs in ({0, 1}, {0, -1}):
        return "by one metric only"
    return "undecided"


def text(cells: pl.DataFrame, table: pl.DataFrame) -> str:
    rows = []
    levels = {metric: _levels(cells, metric) for metric in METRICS}
    for row in table.iter_rows(named=True):
        ppo, bc = (
            levels[row["metric"]].get((algo, row["controls"], row["condition"]), "-")
            for algo in ("ppo", "bc")
        )
        rows.append(
            [
                f"{row['condition']}, {row['controls']}, {METRICS[row['metric']]}",
                ppo,
                bc,
                signed(row["difference"], row["low"], row["high"]),
                f"{row['p_value']:.3f}",
                f"{row['p_holm']:.3f}",
            ]
        )
    pairs = table["pairs"].max() or 0
    least = 2 / 2**pairs if pairs else 1.0
    return f"""{setting(cells)}.

A policy degrades at the first of two successive levels whose normalised return is below 0.95.
A level is a fifth of the remaining weights, as in the protocol, and >= marks means of which some
seeds had not degraded at the last level. The difference is cloning's minus PPO's, paired by seed,
with its bootstrap interval, the exact sign-flip p and Holm's over the conditions of a metric.
{pairs} pairs give no p below {least:.3f}.

""" + markdown(
        [
            "condition, controls, actions",
            "PPO degrades at",
            "cloning at",
            "difference",
            "p",
            "Holm",
        ],
        rows,
    )


def _levels(cells: pl.DataFrame, metric: str) -> dict[tuple[str, str, str], str]:
    scale = per_level(cells)
    return {
        (row["algo"], row["controls"], row["condition"]): (
            f"{'>= ' if row['censored'] else ''}{row['level'] * scale:.1f} ({row['density']:.1%})"
        )
        for row in degradation(cells, metric).iter_rows(named=True)
    }


@styled
def draw(table: pl.DataFrame, cells: pl.DataFrame) -> Figure:
    """Differences with intervals, a row for each condition and kind of controls."""
    places = [
        (condition, kind)
        for condition in CONDITIONS
        for kind in ("own", "ticket")
        if not table.filter(
            (pl.col("condition") == condition) & (pl.col("controls") == kind)
        ).is_empty()
    ]
    figure = Figure(figsize=(4.6, 0.9 + 0.34 * max(len(places), 2)), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    panel.axvline(0, color=GREY, linewidth=0.8)
    # Filled and hollow, one above the other: colour is not needed to tell them apart.
    looks = {
        "return_final": (0.14, {"color": "#0072B2", "marker": "o"}),
        "return_final_sampled": (
            -0.14,
            {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
        ),
    }
    named = set()
    for row in table.iter_rows(named=True):
        height = -places.index((row["condition"], row["controls"]))
        shift, look = looks[row["metric"]]
        low, high = (np.nan if row[side] is None else row[side] for side in ("low", "high"))
        panel.plot([low, high], [height + shift] * 2, color=look["color"], linewidth=1.2)
        panel.plot([row["difference"]], [height + shift], linestyle="", markersize=4.5, **look)
        if row["metric"] not in named:
            named.add(row["metric"])
            panel.annotate(
                f"{METRICS[row['metric']]} actions",
                (max(high, row["difference"]), height + shift),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                color=look["color"],
            )
    shared = {c for c, _ in places if sum(other == c for other, _ in places) == 1}
    panel.set_yticks(
        [-place for place in range(len(places))],
        [c if c in shared else f"{c}\n{kind} controls" for c, kind in places],
    )
    panel.set_ylim(-len(places) + 0.5, 0.5)
    panel.grid(axis="x", color=PALE, linewidth=0.4)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("levels by which cloning outlasts PPO")
    pairs = table["pairs"].max() or 0
    head(
        figure,
        cells["env"][0],
        f"difference of degradation levels, {pairs} pairs of seeds, 95%",
        None,
    )
    return figure


EXPERIMENT = Experiment(
    name="bc_vs_rl",
    question="Do cloned tickets outlast those of reinforcement learning?",
    claim="Cloning reaches the same sparsity as reinforcement learning (Vischer et al. 2022, v1, "
    "v2), or a higher one (v4)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
