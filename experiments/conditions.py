"""What makes a ticket: its mask, its initial values, or how many weights each layer keeps?

Contributions at every level under both kinds of controls, by three returns, since a final return
alone hides where training began and how fast it went::

    python -m experiments.conditions [--quick]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import left_out, setting, unsolved
from experiments.sweeps import (
    Extended,
    SharedSweep,
    acrobot,
    acrobot_whole,
    cartpole,
    dqn,
    dqn_squared,
    hopper,
    lunar_lander,
    maze_extended,
    mountain_car_extended,
    mountain_car_ppo,
    pendulum_extended,
    pendulum_sac_extended,
)
from sparse_tickets.analysis import frame as results
from sparse_tickets.analysis.contributions import CONTRIBUTIONS
from sparse_tickets.analysis.figures import contribution_figure, return_figure
from sparse_tickets.analysis.style import DPI, GREY, INK, PALE, head, styled

METRICS = {
    "return_initial": "before training",
    "return_auc": "learning curve",
    "return_final": "final return",
}
ALGORITHMS = {"ppo": "PPO", "dqn": "DQN", "sac": "SAC", "bc": "cloning"}
PAIRED = "ticket"
"""The controls that change one thing at a time."""


def collect(place: Place) -> pl.DataFrame:
    sweeps: dict[str, SharedSweep | Extended] = {"CartPole": cartpole, "CartPole, DQN": dqn_squared}
    if place.quick:
        sweeps["Acrobot"] = acrobot
    else:
        sweeps |= {
            "CartPole, DQN, Huber's loss": dqn,
            "Acrobot": acrobot_whole,
            "Acrobot, a smaller budget": acrobot,
            "Pendulum": pendulum_extended,
            "Pendulum, SAC": pendulum_sac_extended,
            "MountainCar": mountain_car_extended,
            "MountainCar, PPO": mountain_car_ppo,
            "Maze": maze_extended,
            "LunarLander": lunar_lander,
            "Hopper": hopper,
        }
    return pl.concat(
        [_study(name, sweep, place) for name, sweep in sweeps.items() if sweep.wanted(place)],
        how="diagonal",
    )


def _study(name: str, sweep: SharedSweep | Extended, place: Place) -> pl.DataFrame:
    cells = sweep.cells(place).with_columns(study=pl.lit(name))
    # Beside these, another study of the task clones the same experts, with more levels or seeds.
    return cells.filter(pl.col("algo") != "bc") if name in _ALONE else cells


_ALONE = ("CartPole, DQN", "CartPole, DQN, Huber's loss", "MountainCar, PPO")


def studies(cells: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [(name, part) for (name,), part in cells.group_by("study", maintain_order=True)]


def algorithms(cells: pl.DataFrame) -> dict[str, str]:
    """Those that were run, with their names here."""
    return {algo: name for algo, name in ALGORITHMS.items() if algo in set(cells["algo"])}


def named(study: str, algo: str) -> str:
    """An algorithm in a study; of clones whom they imitate where that is not PPO."""
    task, *notes = study.split(", ")
    name = ALGORITHMS[algo]
    if notes and notes[0] in ALGORITHMS.values():
        other = notes.pop(0)
        name += f" {other}" if algo == "bc" else ""
    return f"{task}, {name}" + "".join(f" ({note})" for note in notes)


def _has(cells: pl.DataFrame, algo: str, contribution: str) -> bool:
    run = set(cells.filter(pl.col("algo") == algo)["condition"])
    return run.issuperset(CONTRIBUTIONS[contribution])


def by_seed(
    cells: pl.DataFrame, algo: str, kind: str, contribution: str, metric: str
) -> np.ndarray:
    """Each seed's contribution, averaged over the pruned levels, as a share of random to dense."""
    env = cells["env"][0]
    having, lacking = (
        results.tracks(cells, env, algo, condition, kind, metric)
        for condition in CONTRIBUTIONS[contribution]
    )
    final = results.tracks(cells, env, algo, results.DENSE, "shared", "return_final")
    scale = final.dense_median - final.random
    return np.nanmean((having.values - lacking.values)[:, 1:], axis=1) / scale


def paired(cells: pl.DataFrame) -> pl.DataFrame:
    """Without the shuffled policies that prune by their own training."""
    shuffled = pl.col("condition").is_in(["mask/permuted", "permuted/permuted"])
    return cells.filter(~(shuffled & (pl.col("controls") == "own")))


def conclude(cells: pl.DataFrame) -> Finding:
    gaps = {
        (study, algo, metric): by_seed(part, algo, PAIRED, "mask", metric)
        - by_seed(part, algo, PAIRED, "initialisation", metric)
        for study, part in studies(cells)
        for metric in METRICS
        for algo in algorithms(part)
    }
    shown = [
        f"{METRICS[metric]}: "
        + ", ".join(
            f"{named(study, algo)} {signed(*effect(gap), digits=2)}"
            for (study, algo, other), gap in gaps.items()
            if other == metric
        )
        for metric in ("return_initial", "return_final")
    ]
    trained = [gap for (*_, metric), gap in gaps.items() if metric != "return_initial"]
    before = [gap for (*_, metric), gap in gaps.items() if metric == "return_initial"]
    figures: dict[str, Callable[[], Figure]] = {"conditions": partial(draw, cells)}
    for study, part in studies(cells):
        name = "_".join(["conditions", *re.findall(r"\w+", study.lower())])
        returns = ("return_final", "return_auc", "return_initial")
        title = ": ".join([part["env"][0], *study.split(", ", 1)[1:]])
        figures[f"{name}_returns"] = partial(
            return_figure, part, controls=PAIRED, metric=returns, title=title
        )
        figures[name] = partial(
            contribution_figure, paired(part), metric=tuple(METRICS), title=title
        )
    return Finding(
        ran="; ".join(
            setting(part) + unsolved(part) + left_out(part) for _, part in studies(cells)
        ),
        effect=f"mask minus values, of the dense return; {'; '.join(shown)}",
        verdict=f"once trained: {verdict(trained)}; before: {verdict(before)}",
        text=text(cells),
        figures=figures,
    )


def verdict(gaps: list[np.ndarray]) -> str:
    """Whether the mask gives more than the values under it, in every algorithm and return."""
    found = [direction(gap) for gap in gaps]
    agree, disagree = found.count(1), found.count(-1)
    if agree and disagree:
        return "depends on algorithm or return"
    for word, clear in (("agrees", agree), ("disagrees", disagree)):
        if clear:
            rest = "" if clear == len(gaps) else f" in {clear} of {len(gaps)}, the rest undecided"
            return f"{word}{rest}"
    return "undecided"


def text(cells: pl.DataFrame) -> str:
    paragraphs = [
        """Neighbouring conditions differ in one thing: their difference, within a seed and averaged
over the pruned levels, is what that thing contributes, here as a share of the range from the random
policy to the dense one. `ticket` controls take masks and values from the same seed's ticket; under
`own` a shuffled policy prunes by its own training, so its mask differs too."""
    ]
    for _, part in studies(cells):
        rows = [
            [
                f"{contribution}, {ALGORITHMS[algo]}, {kind}",
                *(
                    signed(*effect(by_seed(part, algo, kind, contribution, metric)), digits=2)
                    for metric in METRICS
                ),
            ]
            for contribution, algo in product(CONTRIBUTIONS, algorithms(part))
            if _has(part, algo, contribution)
            for kind in results.controls_kinds(part.filter(pl.col("algo") == algo))
        ]
        paragraphs += [
            f"{setting(part)}{unsolved(part)}{left_out(part)}.",
            markdown(["contribution, algorithm, controls", *METRICS.values()], rows),
        ]
    return "\n\n".join(paragraphs)


# Filled and hollow, one above the other: colour is not needed to tell them apart.
_LOOKS = {
    "mask": (0.16, {"color": "#0072B2", "marker": "o"}),
    "initialisation": (-0.16, {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"}),
}


@styled
def draw(cells: pl.DataFrame) -> Figure:
    """Mask and values by return: a panel for each return, a row for each task and algorithm."""
    rows = [(study, part, algo) for study, part in studies(cells) for algo in algorithms(part)]
    figure = Figure(figsize=(9.2, 1.0 + 0.3 * len(rows)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        panel.axvline(0, color=GREY, linewidth=0.8)
        for place, (_, part, algo) in enumerate(rows):
            for contribution, (shift, look) in _LOOKS.items():
                if _has(part, algo, contribution):
                    middle, low, high = effect(by_seed(part, algo, PAIRED, contribution, metric))
                    height = shift - place
                    panel.plot([low, high], [height] * 2, color=look["color"], linewidth=1.2)
                    panel.plot([middle], [height], linestyle="", markersize=4.5, **look)
        panel.set_title(title)
        panel.set_xlabel("share of random to dense")
        panel.grid(axis="x", color=PALE, linewidth=0.4)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines["left"].set_visible(False)
    panels[0].set_yticks(
        [-place for place in range(len(rows))],
        [named(study, algo) for study, _, algo in rows],
    )
    panels[0].set_ylim(0.5 - len(rows), 0.5)
    detail = (
        "mean over seeds and pruned levels, 95% interval, ticket controls; "
        "filled: the mask, hollow: the initial values"
    )
    head(figure, "What mask and initial values contribute", detail, None)
    return figure


EXPERIMENT = Experiment(
    name="conditions",
    question="Is it the mask, the initial values or the share of each layer?",
    claim="Most of a ticket's effect is its mask, not its initial values (Vischer et al. 2022)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
