"""Do cloned policies keep their return to sparser levels than reinforcement-learned ones?

PPO and cloning of PPO experts, from the same initial weights, pruned until tickets degrade; every
condition, judged by greedy and by sampled returns::

    python -m experiments.bc_vs_rl [--quick]
"""

from __future__ import annotations

from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.frame import RESULTS, Experiment, Finding, Place, main, markdown, signed
from experiments.remarks import left_out, per_level, setting, solved, unsolved
from experiments.sweeps import (
    Extended,
    SharedSweep,
    acrobot,
    acrobot_whole,
    cartpole,
    cartpole_deep,
    dqn,
    dqn_squared,
    lunar_lander,
    maze_extended,
    mountain_car_extended,
    mountain_car_ppo,
    pendulum_deep,
    pendulum_extended,
    pendulum_sac_extended,
)
from sparse_tickets.analysis import frame as results
from sparse_tickets.analysis.frame import CONDITIONS
from sparse_tickets.analysis.style import DPI, GREY, INK, PALE, head, styled
from sparse_tickets.analysis.table import compare, degradation

METRICS = {"return_final": "greedy", "return_final_sampled": "sampled"}
RIVALS = {"ppo": "PPO", "dqn": "DQN", "sac": "SAC"}
"""What learns by reinforcement, in the order of tables and panels."""
NAMES = RIVALS | {"bc": "cloning"}
TICKET = "mask/weights"
WHOLE = "the whole protocol"


def collect(place: Place) -> pl.DataFrame:
    """The protocol's own sweep from its table, its tickets deeper, brief ones of other tasks."""
    found = []
    sweeps: dict[str, SharedSweep | Extended] = {"a smaller budget": cartpole}
    if not place.quick:  # every task and algorithm compiles kernels of its own
        whole = pl.read_parquet(RESULTS / "cartpole.parquet")
        found.append(whole.with_columns(study=pl.lit(WHOLE), wall_s=pl.lit(None, pl.Float64)))
        sweeps = {
            "deeper, tickets alone": cartpole_deep,
            **sweeps,
            "learning values": dqn_squared,
            "learning values, Huber's loss": dqn,
            "Acrobot": acrobot_whole,
            "Acrobot, a smaller budget": acrobot,
            "Pendulum": pendulum_extended,
            "Pendulum, deeper, tickets alone": pendulum_deep,
            "Pendulum by SAC": pendulum_sac_extended,
            "MountainCar": mountain_car_extended,
            "MountainCar by PPO": mountain_car_ppo,
            "LunarLander": lunar_lander,
            "the maze": maze_extended,
        }
    for study, sweep in sweeps.items():
        if sweep.wanted(place):
            found.append(sweep.cells(place).with_columns(study=pl.lit(study)))
    return pl.concat(found, how="diagonal")


def studies(cells: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Those in which cloning has begun."""
    parts = cells.group_by("study", maintain_order=True)
    return {name: part for (name,), part in parts if "bc" in set(part["algo"])}


def contests(cells: pl.DataFrame) -> list[tuple[str, str]]:
    """Each study with each algorithm that cloning is compared with there."""
    return [
        (study, rival)
        for study, part in studies(cells).items()
        for rival in RIVALS
        if rival in set(part["algo"])
    ]


def differences(cells: pl.DataFrame) -> pl.DataFrame:
    """Cloning's degradation level minus the other's, paired by seed, in levels of the protocol."""
    parts = studies(cells)
    found = [
        compare(parts[study], second=rival, metric=metric)
        .with_columns(pl.col(_LEVELS) * per_level(parts[study]))
        .with_columns(study=pl.lit(study), rival=pl.lit(rival), metric=pl.lit(metric))
        for study, rival in contests(cells)
        for metric in METRICS
        if all(acts_by(parts[study], algo, metric) for algo in (rival, "bc"))
    ]
    return pl.concat(found)


def acts_by(cells: pl.DataFrame, algo: str, metric: str) -> bool:
    """Whether dense policies keep half of their greedy return by these actions."""
    dense = cells.filter((pl.col("algo") == algo) & (pl.col("level") == 0))
    random = dense["random_return"].to_numpy()
    here, greedy = (np.median(dense[name] - random) for name in (metric, "return_final"))
    return bool(here >= 0.5 * greedy)


_LEVELS = ("first", "second", "difference", "low", "high", "horizon")


def contest(table: pl.DataFrame, study: str, rival: str) -> pl.DataFrame:
    """Rows of one study and algorithm."""
    return table.filter((pl.col("study") == study) & (pl.col("rival") == rival))


def conclude(cells: pl.DataFrame) -> Finding:
    table = differences(cells)
    tickets = table.filter(pl.col("condition") == TICKET)
    effects = [
        f"{RIVALS[rival]}, {study}: "
        + ", ".join(
            f"{METRICS[row['metric']]} {signed(row['difference'], row['low'], row['high'])}"
            for row in contest(tickets, study, rival).iter_rows(named=True)
        )
        for study, rival in contests(cells)
    ]
    against = dict.fromkeys(rival for _, rival in contests(cells))
    return Finding(
        ran="; ".join(
            setting(part) + unsolved(part) + left_out(part) for part in studies(cells).values()
        ),
        effect="levels by which cloned tickets outlast others: " + "; ".join(effects),
        verdict="; ".join(f"{RIVALS[rival]}: {verdict(tickets, rival)}" for rival in against),
        text=text(cells, table),
        figures={
            name: partial(draw, table.filter(pl.col("study").is_in(list(part["study"]))), part)
            for name, part in pictured(cells).items()
        },
    )


def pictured(cells: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """What each figure shows: CartPole alone, and the other tasks."""
    cartpole_alone = pl.col("env") == "CartPole-v1"
    parts = {"bc_vs_rl": cartpole_alone, "bc_vs_rl_tasks": ~cartpole_alone}
    shown = {name: cells.filter(those) for name, those in parts.items()}
    return {name: part for name, part in shown.items() if contests(part)}


def verdict(tickets: pl.DataFrame, rival: str) -> str:
    """What the tests of the tickets' differences support, by Holm's p or else before Holm."""
    words = {(1.0,): "cloning lasts longer", (-1.0,): f"{RIVALS[rival]} does"}
    found = []
    for metric, actions in METRICS.items():
        rows = tickets.filter((pl.col("metric") == metric) & (pl.col("rival") == rival))
        word = "undecided"
        for p, how in (("p_holm", ""), ("p_value", " before Holm")):
            clear = rows.filter(pl.col(p) < 0.05)["difference"].sign().unique().to_list()
            if clear:
                word = words.get(tuple(clear), "depends on the study") + how
                break
        found.append(f"by {actions} actions {word}")
    return ", ".join(found)


def text(cells: pl.DataFrame, table: pl.DataFrame) -> str:
    paragraphs = [
        "A policy degrades at the first of two successive levels whose normalised return is below "
        "0.95. A level is a fifth of the remaining weights, as in the protocol, and >= marks means "
        "of which some seeds had not degraded at the last level. The difference is cloning's minus "
        "the other's, paired by seed and cut where both were observed, with its bootstrap "
        "interval, the exact sign-flip p and Holm's over the conditions of a metric; verdicts go "
        "by the last. DQN's values have no sampled policy of their own: sampled actions are those "
        "of softmax(Q). Actions by which dense policies do not keep half of their greedy return "
        "are not compared."
    ]
    for study, part in studies(cells).items():
        pairs = table.filter(pl.col("study") == study)["pairs"].max() or 0
        least = 2 / 2**pairs if pairs else 1.0
        name = study[0].upper() + study[1:]
        paragraphs.append(
            f"**{name}**: {setting(part)}. {budget(part)} {pairs} pairs give no p "
            f"below {least:.1g}."
        )
        paragraphs += [
            markdown(
                ("condition, controls, actions", f"{RIVALS[rival]} at", *HEADER),
                rows(part, contest(table, study, rival), rival),
            )
            for other, rival in contests(cells)
            if other == study
        ]
    return "\n\n".join(paragraphs)


HEADER = ("cloning at", "difference", "p", "Holm")


def budget(cells: pl.DataFrame) -> str:
    """The protocol's checks of dense policies: when they are there, and where they end.

    Budgets are adequate where they reach 95% of it by half; the line is for what is pruned.
    """
    first, ends = [], []
    for algo, name in NAMES.items():
        dense = cells.filter((pl.col("algo") == algo) & (pl.col("level") == 0))
        if dense.is_empty():
            continue
        curve = np.array(dense["curve"].to_list()).mean(0)
        random, final = dense["random_return"].mean(), dense["return_final"]
        reached = np.flatnonzero(curve - random >= 0.95 * (curve[-1] - random))
        when = f"{(reached[0] + 1) / len(curve):.0%}" if curve[-1] > random else "no point"
        first.append(f"{when} ({name})")
        below = (final - random < 0.95 * (final.median() - random)).sum()
        ends.append(f"{final.mean():.3g} ({name}, {below} of {len(final)} below 0.95)")
    enough = solved(cells["env"][0])
    return (
        f"Dense policies first come within 5% of their last return at {_listed(first)}; they end "
        f"at {_listed(ends)}, where {enough:g} counts as solved."
    )


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def rows(cells: pl.DataFrame, table: pl.DataFrame, rival: str) -> list[list[str]]:
    levels = {metric: _levels(cells, metric) for metric in METRICS}
    kinds = results.controls_kinds(cells)
    found = []
    for row in table.iter_rows(named=True):
        # Where one kind of controls was run, what is the same under both goes by its name there.
        kind = row["controls"] if row["controls"] in kinds else kinds[0]
        here = levels[row["metric"]]
        found.append(
            [
                f"{row['condition']}, {row['controls']}, {METRICS[row['metric']]}",
                *(here.get((algo, kind, row["condition"]), "-") for algo in (rival, "bc")),
                signed(row["difference"], row["low"], row["high"]),
                f"{row['p_value']:.3f}",
                f"{row['p_holm']:.3f}",
            ]
        )
    return found


def _levels(cells: pl.DataFrame, metric: str) -> dict[tuple[str, str, str], str]:
    """By algorithm, controls and condition, as the table of differences names them."""
    scale = per_level(cells)
    return {
        (row["algo"], row["controls"], row["condition"]): (
            f"{'>= ' if row['censored'] else ''}{row['level'] * scale:.1f} ({row['density']:.1%})"
        )
        for row in degradation(cells, metric).iter_rows(named=True)
    }


# Filled and hollow, one above the other: colour is not needed to tell them apart.
_LOOKS = {
    "return_final": (0.14, {"color": "#0072B2", "marker": "o"}),
    "return_final_sampled": (
        -0.14,
        {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    ),
}


@styled
def draw(table: pl.DataFrame, cells: pl.DataFrame) -> Figure:
    """Differences with intervals: a panel for each study, a row for each condition."""
    run = set(table.select("condition", "controls").rows())
    places = [(c, kind) for c in CONDITIONS for kind in ("own", "ticket") if (c, kind) in run]
    shown = contests(cells)
    columns = min(len(shown), 3)
    down = -(-len(shown) // columns)
    size = (1.6 + 2.6 * columns, 0.5 + down * (0.6 + 0.34 * max(len(places), 2)))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(down, columns, sharey=True, squeeze=False)
    for panel in grid.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (study, rival) in zip(grid.flat, shown, strict=False):
        here = contest(table, study, rival)
        panel.axvline(0, color=GREY, linewidth=0.8)
        for row in here.iter_rows(named=True):
            shift, look = _LOOKS[row["metric"]]
            height = shift - places.index((row["condition"], row["controls"]))
            low, high = (np.nan if row[end] is None else row[end] for end in ("low", "high"))
            panel.plot([low, high], [height] * 2, color=look["color"], linewidth=1.2)
            panel.plot([row["difference"]], [height], linestyle="", markersize=4.5, **look)
        panel.set_title(f"{study}, {here['pairs'].max() or 0} pairs")
        panel.set_xlabel(f"levels by which cloning outlasts {RIVALS[rival]}")
        panel.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        panel.grid(axis="x", color=PALE, linewidth=0.4)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines["left"].set_visible(False)
    single = {c for c, _ in places if sum(other == c for other, _ in places) == 1}
    grid[0, 0].set_yticks(
        [-place for place in range(len(places))],
        [c if c in single else f"{c}\n{kind} controls" for c, kind in places],
    )
    grid[0, 0].set_ylim(-len(places) + 0.5, 0.5)
    tasks = ", ".join(cells["env"].unique(maintain_order=True))
    detail = (
        "difference of degradation levels, 95% interval; filled: greedy actions, hollow: sampled"
    )
    head(figure, tasks, detail, None)
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
