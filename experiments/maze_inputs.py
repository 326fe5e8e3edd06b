"""Is a maze's picture pruned to where things can be?

A maze with an enemy on patrol, seen as four pictures of 49 cells: which cells of each picture
tickets of PPO keep, against the cells that ever show anything::

    python -m experiments.maze_inputs [--quick]
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown
from experiments.remarks import setting
from experiments.sweeps import TICKET, first_maze, levels, quickly, tickets
from experiments.training import kept_inputs
from sparse_tickets import load_results
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.analysis.style import DPI, INK, PALE, head, styled
from sparse_tickets.kernels.dynamics.maze import CELLS, LAYOUTS, SIZE

CHANNELS = ("walls", "agent", "goal", "enemy")
ENEMY = "enemy"
AFTERWARDS = "density that was chosen after all had been looked at"
SHOWN = 3
"""Levels that are drawn as pictures, the last one among them."""


def collect(place: Place) -> pl.DataFrame:
    spec = replace(
        first_maze(),
        algos=("ppo",),
        conditions=(TICKET,),
        seeds=6,
        levels=7,
        rate=0.488,
        evaluation=Evaluation(points=10, episodes=16, final_episodes=50),
    )
    store = place.sweep("maze", quickly(spec) if place.quick else spec)
    found = []
    for level in levels(store, "ppo"):
        for ticket in tickets(store, "ppo", level):
            weights = ticket.arena.actor.weight(ticket.mask[None], 0)[0].sum(0)
            found.append(
                {
                    "seed": ticket.seed,
                    "level": level,
                    "weights": weights.tolist(),
                    "inputs": kept_inputs(ticket),
                }
            )
    return load_results(store.path).join(pl.DataFrame(found), on=["seed", "level"])


def possible() -> dict[str, np.ndarray]:
    """Of each picture, the cells ``[49]`` in which anything is ever seen."""
    cells = {
        "walls": {cell for each in LAYOUTS for cell in each.walls},
        "agent": {
            cell
            for each in LAYOUTS
            for cell in range(CELLS)
            if cell not in each.walls and cell != each.goal
        },
        "goal": {each.goal for each in LAYOUTS},
        "enemy": {cell for each in LAYOUTS for cell in each.patrol},
    }
    return {name: np.isin(np.arange(CELLS), list(there)) for name, there in cells.items()}


def pictures(cells: pl.DataFrame, column: str) -> np.ndarray:
    """``[seeds, levels, channels, 49]``."""
    rows = cells.sort("seed", "level")
    values = np.array(rows[column].to_list(), dtype=float)
    return values.reshape(rows["seed"].n_unique(), -1, len(CHANNELS), CELLS)


def ranks(cells: pl.DataFrame, channel: str) -> np.ndarray:
    """Chance that a cell that can show something keeps more weights than one that never does.

    ``[seeds, levels]``; ties count half, 0.5 is chance.
    """
    kept = pictures(cells, "weights")[:, :, CHANNELS.index(channel)]
    there = possible()[channel]
    seen, unseen = kept[..., there][..., :, None], kept[..., ~there][..., None, :]
    return ((seen > unseen) + 0.5 * (seen == unseen)).mean((-2, -1))


def judged() -> list[str]:
    """The channels that have cells of both kinds."""
    return [name for name, there in possible().items() if there.any() and not there.all()]


def paths(cells: pl.DataFrame, channel: str, level: int) -> tuple[float, float]:
    """Share of inputs that lead to an action: of cells that can show something, and that cannot."""
    kept = pictures(cells, "inputs")[:, level, CHANNELS.index(channel)]
    there = possible()[channel]
    return float(kept[:, there].mean()), float(kept[:, ~there].mean())


def densities(cells: pl.DataFrame) -> np.ndarray:
    return cells["density"].unique().sort(descending=True).to_numpy()


def intact(cells: pl.DataFrame) -> int:
    """The sparsest level whose tickets keep 95% of the dense return, from random, in the mean."""
    finals = returns(cells)
    random = cells["random_return"][0]
    kept = np.flatnonzero(finals - random >= 0.95 * (finals[0] - random))
    return int(kept[-1]) if len(kept) else 0


def returns(cells: pl.DataFrame) -> np.ndarray:
    """``[levels]``, the mean over seeds."""
    finals = cells.sort("seed", "level")["return_final"].to_numpy()
    return finals.reshape(cells["seed"].n_unique(), -1).mean(0)


def conclude(cells: pl.DataFrame) -> Finding:
    level = intact(cells)
    rank = ranks(cells, ENEMY)[:, level]
    kept, useless = paths(cells, ENEMY, level)
    middle, low, high = effect(rank)
    found, at_last = (_word(ranks(cells, ENEMY)[:, each]) for each in (level, -1))
    return Finding(
        ran=f"{setting(cells)}; judged at a {AFTERWARDS}, by the last the verdict was {at_last}",
        effect=f"at {densities(cells)[level]:.1%}, the sparsest at which tickets keep 95% of the "
        f"dense return, {kept:.0%} of the inputs where the enemy can be lead to an action, and "
        f"{useless:.0%} of those where it never is; chance that one of the former keeps more "
        f"weights: {middle:.2f} [{low:.2f}, {high:.2f}]",
        verdict=found + ("" if useless < 0.05 else ", yet inputs that show nothing stay"),
        text=text(cells),
        figures={
            "maze_inputs": partial(draw, cells),
            "maze_inputs_ranks": partial(draw_ranks, cells),
        },
    )


def _word(rank: np.ndarray) -> str:
    return {1: "agrees", 0: "undecided", -1: "disagrees"}[direction(rank - 0.5)]


def text(cells: pl.DataFrame) -> str:
    rows = []
    finals = returns(cells)
    for level, density in enumerate(densities(cells)):
        row = [f"{density:.1%}", f"{finals[level]:.2f}"]
        for channel in judged():
            rank, low, high = effect(ranks(cells, channel)[:, level])
            kept, useless = paths(cells, channel, level)
            row.append(f"{rank:.2f} [{low:.2f}, {high:.2f}]; {kept:.0%}, {useless:.0%}")
        rows.append(row)
    counts = ", ".join(f"{name} {there.sum()}" for name, there in possible().items())
    return f"""{setting(cells)}.

The {len(LAYOUTS)} layouts show something in these numbers of {CELLS} cells: {counts}. An input that
is always zero teaches nothing: its weights stay what they were drawn as, and go when trained ones
are larger. Each field has the chance that a cell where something can be keeps more weights than one
where nothing ever is (0.5 where pruning does not care), and then the shares of both that still lead
to an action. The verdict goes by the sparsest tickets that still do what dense policies do: masks
of those that fail do not show what the task needs. It is a {AFTERWARDS}: at first it went by the
last.

""" + markdown(["density", "return", *judged()], rows)


@styled
def draw(cells: pl.DataFrame) -> Figure:
    """Levels below one another, the four pictures beside one another."""
    last = max(cells["level"])
    chosen = np.unique(np.linspace(1, last, SHOWN).round().astype(int))
    share = pictures(cells, "inputs").mean(0)
    figure = Figure(figsize=(6.0, 0.8 + 1.45 * len(chosen)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(chosen), len(CHANNELS), squeeze=False)
    for row, level in zip(grid, chosen, strict=True):
        for panel, channel in zip(row, CHANNELS, strict=True):
            picture = share[level, CHANNELS.index(channel)].reshape(SIZE, SIZE)
            panel.imshow(picture, cmap="Greys", vmin=0, vmax=1.25)
            panel.set_xticks([])
            panel.set_yticks([])
            for cell in np.flatnonzero(possible()[channel]):
                corner = (cell % SIZE - 0.5, cell // SIZE - 0.5)
                panel.add_patch(
                    Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.1)
                )
            panel.spines[:].set_visible(True)
            panel.spines[:].set_color(PALE)
            if level == chosen[0]:
                panel.set_title(channel)
        row[0].set_ylabel(f"{densities(cells)[level]:.1%} kept", color=INK)
    seeds = cells["seed"].n_unique()
    head(
        figure,
        "Maze: inputs that tickets of PPO keep, cell by cell",
        f"{seeds} seeds; dark: kept by all, white: by none; framed: cells that ever show anything",
        None,
    )
    return figure


def draw_ranks(cells: pl.DataFrame) -> Figure:
    x = 100 * densities(cells)
    rank = "rank of cells that show something"
    panels = {
        rank: [Line(channel, x, ranks(cells, channel)) for channel in judged()],
    }
    return line_figure(
        panels,
        "Maze: cells that show something",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval; 0.5 is chance",
        "density",
        "",
    )


EXPERIMENT = Experiment(
    name="maze_inputs",
    question="Is a maze's picture pruned to where things can be?",
    claim="The mask of the input layer shows what the task needs: the enemy's channel is pruned to "
    "where the enemy can be (Vischer et al. 2022; our own maze)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
