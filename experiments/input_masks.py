"""Which inputs does pruning keep, and which does the task need?

The inputs that tickets keep at every level, of raw observations and of scaled ones, beside dense
policies trained on every subset of the inputs: what the task needs, by exhaustion. On other tasks
what tickets keep beside what their masks keep once shuffled within each layer::

    python -m experiments.input_masks [--quick]
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import polars as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
from experiments.remarks import cuts
from experiments.sweeps import (
    INPUTS,
    TICKET,
    SharedSweep,
    acrobot,
    cartpole,
    hopper,
    levels,
    lunar_lander,
    mountain_car,
    pendulum,
    pendulum_sac,
    scaled,
    tickets,
)
from experiments.training import kept_inputs, train
from sparse_tickets import load_results
from sparse_tickets.analysis.style import DPI, GREY, INK, head, styled
from sparse_tickets.analysis.transfer import input_mask
from sparse_tickets.sweep.store import Store

ALGORITHMS = {
    "ppo": "PPO",
    "dqn": "DQN",
    "sac": "SAC",
    "bc": "cloning",
    "scaled": "PPO, scaled observations",
}
SEEDS = 3
SUBSETS = "subsets"
SHUFFLED = "permuted/permuted"
TASKS: dict[SharedSweep, tuple[str, ...]] = {
    acrobot: ("ppo", "bc"),
    pendulum: ("ppo", "bc"),
    pendulum_sac: ("sac",),
    mountain_car: ("dqn", "bc"),
    lunar_lander: ("ppo", "bc"),
    hopper: ("ppo",),
}
"""Sweeps of other tasks than CartPole, and whose tickets of theirs are looked at."""


def collect(place: Place) -> pl.DataFrame:
    """Rows of tickets, with the inputs they keep, and of dense policies on a subset of inputs."""
    spec, store = cartpole(place)
    stored = [_kept(store, {"ppo": "ppo", "bc": "bc"})]
    if not place.quick:
        if place.wants(scaled.name):
            stored.append(_kept(scaled(place)[1], {"ppo": "scaled"}))
        for sweep, algos in TASKS.items():
            if place.wants(sweep.name):
                of_task = sweep(place)[1]
                same = {algo: algo for algo in algos}
                stored += [_kept(of_task, same), _kept(of_task, same, SHUFFLED, "ticket")]
    arena, names = spec.arena("ppo"), INPUTS[spec.env]
    choices = [bits for bits in product([False, True], repeat=len(names)) if any(bits)]
    seeds = min(SEEDS, spec.seeds)
    dense = torch.stack([ticket.initial for ticket in tickets(store, "ppo", 0)])[:seeds]

    def compute() -> pl.DataFrame:
        mask = input_mask(torch.tensor(choices), arena)
        masks = mask.repeat_interleave(seeds, 0)
        rows = dense.repeat(len(choices), 1)
        cells = train(
            spec, store, "ppo", 0, masks, rows, list(range(seeds)) * len(choices), SUBSETS
        ).rows
        return cells.with_columns(
            inputs=pl.Series([list(bits) for bits in choices for _ in range(seeds)])
        )

    trained = place.once("input-subsets", spec, compute).with_columns(
        condition=pl.lit(SUBSETS), algo=pl.lit("ppo"), weighted=pl.col("inputs")
    )
    columns = [
        "env", "algo", "condition", "seed", "level", "density", "inputs", "weighted",
        "return_final", "return_auc", "random_return", "train_steps", "wall_s", "commit",
        "processor",
    ]  # fmt: skip
    return pl.concat([each.select(columns) for each in (*stored, trained)])


def _kept(
    store: Store, names: dict[str, str], condition: str = TICKET, controls: str = "own"
) -> pl.DataFrame:
    """Rows of a sweep's tickets with the inputs they keep; algorithms by the names given.

    Dense ones are counted to the tickets alone.
    """
    rows = load_results(store.path).filter(
        (pl.col("condition") == condition) & (pl.col("controls") == controls)
        | (pl.col("condition") == "dense") & (condition == TICKET)
    )
    kept = [
        {
            "algo": algo,
            "seed": ticket.seed,
            "level": level,
            "inputs": kept_inputs(ticket),
            "weighted": ticket.arena.actor.weight(ticket.mask[None], 0)[0].any(0).tolist(),
        }
        for algo in names
        for level in levels(store, algo)
        for ticket in tickets(store, algo, level, condition, controls)
    ]
    joined = rows.join(pl.DataFrame(kept), on=["algo", "seed", "level"])
    return joined.with_columns(pl.col("algo").replace(names))


def algorithms(cells: pl.DataFrame) -> dict[str, str]:
    return {algo: name for algo, name in ALGORITHMS.items() if algo in set(cells["algo"])}


def tickets_of(cells: pl.DataFrame, algo: str) -> pl.DataFrame:
    """An algorithm's tickets with the dense policies that they begin as."""
    return cells.filter((pl.col("algo") == algo) & pl.col("condition").is_in([TICKET, "dense"]))


def survival(cells: pl.DataFrame, algo: str) -> tuple[np.ndarray, np.ndarray]:
    """Densities, and the share of seeds ``[inputs, levels]`` that keep each input."""
    rows = tickets_of(cells, algo)
    density = rows.group_by("level").agg(pl.col("density").max()).sort("level")["density"]
    kept = [
        np.array(rows.filter(pl.col("level") == level)["inputs"].to_list()).mean(0)
        for level in range(len(density))
    ]
    return density.to_numpy(), np.array(kept).T


def needed(cells: pl.DataFrame) -> pl.DataFrame:
    """Final return of dense policies by the inputs they see."""
    subsets = cells.filter(pl.col("condition") == SUBSETS)
    names = INPUTS[cells["env"][0]]
    rows = []
    best = cells["return_final"].max()
    for (inputs,), group in subsets.group_by("inputs", maintain_order=True):
        values = group["return_final"]
        rows.append(
            {
                "sees": ", ".join(n for n, there in zip(names, inputs, strict=True) if there),
                "count": sum(inputs),
                "mean": values.mean(),
                "worst": values.min(),
                "solved": int((values >= 0.95 * best).sum()),
                "seeds": len(values),
            }
        )
    return pl.DataFrame(rows).sort("count", "mean", descending=[False, True])


def order(cells: pl.DataFrame, algo: str) -> dict[str, tuple[float, float, float]]:
    """Levels until each input is gone, mean over seeds; the last level where it never is."""
    rows = tickets_of(cells, algo)
    names = INPUTS[cells["env"][0]]
    seeds = sorted(rows["seed"].unique())
    gone = np.array(
        [
            np.array(rows.filter(pl.col("seed") == seed).sort("level")["inputs"].to_list()).sum(0)
            for seed in seeds
        ]
    )
    return {name: effect(gone[:, place]) for place, name in enumerate(names)}


def collapsed(cells: pl.DataFrame, algo: str) -> dict[int, tuple[int, int]]:
    """Tickets below half of the best return, and all, of those that see enough or do not.

    Enough is a set of inputs that every dense seed solves the task with, or more.
    """
    seen = np.array(cells.filter(pl.col("condition") == SUBSETS)["inputs"].to_list())
    returns = cells.filter(pl.col("condition") == SUBSETS)["return_final"].to_numpy()
    best = cells["return_final"].max()
    solving = [
        chosen
        for chosen in np.unique(seen, axis=0)
        if (returns[(seen == chosen).all(1)] >= 0.95 * best).all()
    ]
    tickets = cells.filter((pl.col("algo") == algo) & (pl.col("condition") == TICKET))
    enough = np.array(
        [any((~need | kept).all() for need in solving) for kept in tickets["inputs"].to_numpy()],
        dtype=bool,
    )
    low = tickets["return_final"].to_numpy() < 0.5 * best
    return {each: (int(low[enough == each].sum()), int((enough == each).sum())) for each in (0, 1)}


def tasks(cells: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The tasks that stand beside CartPole."""
    others = cells.filter(~pl.col("env").str.starts_with("CartPole"))
    return {env: part for (env,), part in others.group_by("env", maintain_order=True)}


def removed(cells: pl.DataFrame) -> list[tuple[str, str, float, np.ndarray]]:
    """By task and algorithm, how many inputs have weights at the last level.

    Of tickets the mean; of shuffled masks each seed's surplus. Those lose paths elsewhere, so that
    paths would not tell what becomes of the input layer.
    """
    found = []
    for env, part in tasks(cells).items():
        for algo in algorithms(part):
            last = part.filter((pl.col("algo") == algo) & (pl.col("level") == part["level"].max()))
            ticket, shuffled = (
                np.array(
                    last.filter(pl.col("condition") == kind).sort("seed")["weighted"].to_list()
                ).sum(1)
                for kind in (TICKET, SHUFFLED)
            )
            found.append((env, algo, float(ticket.mean()), shuffled - ticket))
    return found


def conclude(cells: pl.DataFrame) -> Finding:
    cartpole_alone = cells.filter(pl.col("env").str.starts_with("CartPole"))
    table = needed(cartpole_alone)
    solving = table.filter(pl.col("solved") == pl.col("seeds"))
    fewest = solving.sort("count").head(1)
    kept = {
        algo: float(
            np.mean(
                [
                    sum(inputs)
                    for inputs in tickets_of(cartpole_alone, algo)
                    .filter(pl.col("level") == cartpole_alone["level"].max())["inputs"]
                    .to_list()
                ]
            )
        )
        for algo in algorithms(cartpole_alone)
    }
    inputs = len(INPUTS["CartPole-v1"])
    need = fewest["sees"][0] if len(fewest) else "all and more"
    left = " and ".join(f"{value:.1f} ({ALGORITHMS[algo]})" for algo, value in kept.items())
    goes = any(value < inputs - 0.5 for value in kept.values())
    words = "agrees: whole inputs go" if goes else "disagrees: inputs stay"
    figures = {"input_masks": partial(draw, cartpole_alone)}
    ran = (
        f"{cartpole_alone['env'][0]}, the tickets of bc_vs_rl; dense PPO on all {len(table)} "
        f"subsets of the inputs, {table['seeds'].max()} seeds each, "
        f"{cartpole_alone['train_steps'].max():,} steps "
        f"(cut: {cuts(cartpole_alone)}{'' if 'scaled' in kept else ', no scaled observations'})"
    )
    beside = removed(cells)
    if beside:
        counts = {env: part["seed"].n_unique() for env, part in tasks(cells).items()}
        named = ", ".join(f"{env} ({seeds} seeds)" for env, seeds in counts.items())
        ran += f"; tickets of conditions on {named}"
        fewer = sum(direction(more) == 1 for *_, more in beside)
        words += f"; more than by chance in {fewer} of {len(beside)} on other tasks"
        figures["input_masks_tasks"] = partial(draw_tasks, cells)
    return Finding(
        ran=ran,
        effect=f"{left} of {inputs} inputs left at {cartpole_alone['density'].min():.2%} of the "
        f"weights; the smallest set that every dense seed solves the task with: {need}",
        verdict=words,
        text="\n\n".join([text(cartpole_alone, table), *text_of_tasks(beside, cells)]),
        figures=figures,
    )


def text_of_tasks(
    beside: list[tuple[str, str, float, np.ndarray]], cells: pl.DataFrame
) -> list[str]:
    """What is said of tasks beside CartPole; nothing where there are none."""
    if not beside:
        return []
    rows = []
    for env, algo, kept, more in beside:
        part = tasks(cells)[env]
        density, share = survival(part, algo)
        names = INPUTS[env]
        gone = [name for name, there in zip(names, share[:, -1], strict=True) if there <= 0.5]
        rows.append(
            [
                f"{env}, {ALGORITHMS[algo]}",
                f"{density[-1]:.1%}",
                f"{share[:, -1].sum():.1f} of {len(names)}",
                f"{kept:.1f}",
                signed(*effect(more)),
                ", ".join(gone) or "-",
            ]
        )
    return [
        """On other tasks, at the last level: inputs that tickets keep, inputs with any weight at
all, and how many more of these there are once the masks are shuffled within each layer, which
leaves as many weights in it. Gone are those that half of the seeds or more do not keep.""",
        markdown(
            ["tickets", "density", "inputs kept", "with weights", "more, shuffled", "gone"], rows
        ),
    ]


def text(cells: pl.DataFrame, table: pl.DataFrame) -> str:
    rows = [
        [sees, f"{middle:.0f}", f"{worst:.0f}", f"{solved}/{seeds}"]
        for sees, _, middle, worst, solved, seeds in table.iter_rows()
    ]
    gone = [
        [name, *(f"{m:.1f} [{low:.1f}, {high:.1f}]" for m, low, high in values)]
        for name, values in (
            (name, [order(cells, algo)[name] for algo in algorithms(cells)])
            for name in INPUTS[cells["env"][0]]
        )
    ]
    lost = [
        [name, *("{} of {}".format(*pair) for pair in collapsed(cells, algo).values())]
        for algo, name in algorithms(cells).items()
    ]
    return f"""Raw observations, as the environment gives them, unless they are called scaled: to
unit variance, by `pilot.py`. An input is kept while a path leads from it to an action. Levels it is
kept for, of {cells["level"].max() + 1}, over seeds:

{markdown(["input", *algorithms(cells).values()], gone)}

Dense policies of PPO that see only some of the raw inputs, everything else as in the sweep. Solved
is within 5% of the best return.

{markdown(["inputs seen", "mean return", "worst seed", "solved"], rows)}

Tickets of all levels that end below half of the best return, by whether paths lead from a set of
inputs that every dense seed solves the task with:

{markdown(["tickets", "without such a set", "with one"], lost)}"""


@styled
def draw(cells: pl.DataFrame) -> Figure:
    """Shares of seeds by input and density, a row of pictures."""
    names = INPUTS[cells["env"][0]]
    shown = algorithms(cells)
    size = (1.0 + 2.4 * len(shown), 0.9 + 0.34 * len(names))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (algo, title) in zip(panels, shown.items(), strict=True):
        picture(panel, cells, algo)
        panel.set_title(title)
        panel.set_xlabel("density")
    panels[0].set_yticks(range(len(names)), names)
    seeds = cells.filter(pl.col("condition") == TICKET)["seed"].n_unique()
    head(figure, f"{cells['env'][0]}: inputs that tickets keep", f"{seeds} seeds, {_LEGEND}", None)
    return figure


_LEGEND = "mask/weights; dark: kept by all, white: by none, else percent of seeds"


@styled
def draw_tasks(cells: pl.DataFrame) -> Figure:
    """A row of pictures for each task, as high as it has inputs."""
    parts = tasks(cells)
    columns = max(len(algorithms(part)) for part in parts.values())
    counts = [len(INPUTS[env]) for env in parts]
    figure = Figure(
        figsize=(1.5 + 1.9 * columns, 0.6 + 0.75 * len(parts) + 0.19 * sum(counts)),
        dpi=DPI,
        layout="constrained",
    )
    grid = figure.subplots(len(parts), columns, squeeze=False, height_ratios=counts)
    for row, (env, part) in zip(grid, parts.items(), strict=True):
        for panel, algo in zip(row, algorithms(part), strict=False):
            picture(panel, part, algo)
            seeds = tickets_of(part, algo)["seed"].n_unique()
            panel.set_title(f"{env.partition('-v')[0]}, {ALGORITHMS[algo]}, {seeds} seeds")
            panel.set_yticks(range(len(INPUTS[env])), INPUTS[env])
        for panel in row[1:]:
            panel.set_yticks([])
        for panel in row[len(algorithms(part)) :]:
            panel.set_axis_off()
    head(figure, "Inputs that tickets keep, by density", _LEGEND, None)
    return figure


def picture(panel: Axes, cells: pl.DataFrame, algo: str) -> None:
    """Shares of seeds that keep an input, by density."""
    density, share = survival(cells, algo)
    panel.imshow(share, cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
    for row, column in np.ndindex(*share.shape):
        value = share[row, column]
        if 0 < value < 1:
            panel.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color="white" if value > 0.6 else INK,
            )  # fmt: skip
    ticks = range(0, len(density), -(-len(density) // 5))
    panel.set_xticks(list(ticks), [f"{density[k]:.{int(density[k] < 0.1)}%}" for k in ticks])
    panel.tick_params(length=0)
    panel.spines[["left", "bottom"]].set_color(GREY)


EXPERIMENT = Experiment(
    name="input_masks",
    question="Which inputs survive, and which are needed?",
    claim="The mask of the input layer removes whole inputs that the task does not need "
    "(Vischer et al. 2022)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
