"""Would other keys, another learning rate, another budget or a small dense network say the same?

Dense policies of PPO and DQN trained again with other keys, tickets of PPO with a third and three
times the learning rate and with half and twice the steps, and dense networks as small as those::

    python -m experiments.sanity [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.sweeps import TICKET, cartpole, cuts, dqn, levels_of, tickets, train
from sparse_tickets import Sweep
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.population import initialise
from sparse_tickets.sweep.store import Store

LEVELS = (0, 4, 6, 8)
AGAIN = 3
"""Trainings of each dense policy with other keys, beside the sweep's own."""
ALGORITHMS = {"ppo": "PPO", "dqn": "DQN"}
AS_IS, NARROW, OTHER_KEY, SWEEP = "as it is", "narrow dense", "other keys", "the sweep"
Change = Callable[[PPO], PPO]
SETTINGS: dict[str, Change] = {
    AS_IS: lambda ppo: ppo,
    "learning rate x 1/3": lambda ppo: replace(ppo, learning_rate=ppo.learning_rate / 3),
    "learning rate x 3": lambda ppo: replace(ppo, learning_rate=ppo.learning_rate * 3),
    "steps x 1/2": lambda ppo: replace(ppo, steps=ppo.steps // 2),
    "steps x 2": lambda ppo: replace(ppo, steps=ppo.steps * 2),
}
METRICS = {"return_auc": "learning curve", "return_final": "final return"}


def collect(place: Place) -> pl.DataFrame:
    spec, swept = cartpole.spec(place), cartpole.cells(place)
    there = levels_of(swept, "ppo")
    chosen = there[:2] if place.quick else [level for level in LEVELS if level in there]
    jobs: dict[str, Callable[[], pl.DataFrame]] = {
        name: lambda change=change: changed(*cartpole(place), chosen, change)  # type: ignore[misc]
        for name, change in SETTINGS.items()
    }
    jobs[OTHER_KEY] = partial(again, spec, "ppo")
    jobs[NARROW] = partial(narrow, spec, chosen[1:])
    found = [
        place.once(f"sanity-{_file(name)}", (spec, chosen, AGAIN), compute).with_columns(
            variant=pl.lit(name)
        )
        for name, compute in jobs.items()
    ]
    stored = swept.filter(
        (pl.col("algo") == "ppo")
        & pl.col("level").is_in(chosen)
        & pl.col("condition").is_in(["dense", TICKET])
    )
    found.append(stored.with_columns(variant=pl.lit(SWEEP)))
    if not place.quick and dqn.wanted(place):
        found += _dqn(place)
    columns = [name for name in found[0].columns if all(name in each.columns for each in found)]
    return pl.concat([each.select(columns) for each in found])


def _dqn(place: Place) -> list[pl.DataFrame]:
    """Dense policies of DQN: the sweep's, and trained again."""
    spec = dqn.spec(place)
    floor = place.once("sanity-other-keys-dqn", (spec, AGAIN), partial(again, spec, "dqn"))
    dense = dqn.cells(place).filter(pl.col("level") == 0)
    return [
        floor.with_columns(variant=pl.lit(OTHER_KEY)),
        dense.with_columns(variant=pl.lit(SWEEP)),
    ]


def _file(name: str) -> str:
    return name.replace(" ", "-").replace("/", "")


def changed(spec: Sweep, store: Store, chosen: list[int], change: Change) -> pl.DataFrame:
    """The sweep's tickets trained with other settings; keys are the same for all settings."""
    other = replace(spec, ppo=change(spec.ppo))
    found = []
    for level in chosen:
        mine = tickets(store, "ppo", level)
        masks, initial = (torch.stack(rows) for rows in ([t.mask for t in mine], _initial(mine)))
        seeds = [ticket.seed for ticket in mine]
        found.append(train(other, store, "ppo", level, masks, initial, seeds, "sanity"))
    return pl.concat(found)


def _initial(mine: list) -> list[torch.Tensor]:
    return [ticket.initial for ticket in mine]


def again(spec: Sweep, algo: str) -> pl.DataFrame:
    """Each seed's dense policy from the same values with other training keys."""
    seeds = [*range(spec.seeds)] * AGAIN
    return train(spec, None, algo, 0, *_dense(spec, algo, seeds), seeds, "again")


def _dense(spec: Sweep, algo: str, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks that keep all, and what the sweep's dense policies start from."""
    arena = spec.arena(algo)
    keys = torch.tensor([spec.initial_key(seed) for seed in seeds])
    masks = torch.ones(len(seeds), arena.prunable, dtype=torch.bool)
    return masks, initialise(arena, keys, spec.init, spec.log_std)


def narrow(spec: Sweep, chosen: list[int]) -> pl.DataFrame:
    """Dense networks of two equal layers, with as near to a level's weights as widths allow."""
    ends = spec.arena("ppo").actor.sizes
    outer = ends[0] + ends[-1]
    seeds = list(range(spec.seeds))
    found = []
    for level in chosen:
        kept = spec.kept("ppo", level)
        width = max(1, round(math.sqrt(outer**2 / 4 + kept) - outer / 2))
        small = replace(spec, hidden=(width, width))
        masks, initial = _dense(small, "ppo", seeds)
        cells = train(small, None, "ppo", 0, masks, initial, seeds, f"narrow {width}")
        share = masks.shape[1] / spec.arena("ppo").prunable
        found.append(cells.with_columns(level=pl.lit(level, pl.Int64), density=pl.lit(share)))
    return pl.concat(found)


def matrix(cells: pl.DataFrame, variant: str, metric: str, algo: str = "ppo") -> np.ndarray:
    """``[seeds, levels]``, as a share of random to the sweep's dense."""
    cells = cells.filter(pl.col("algo") == algo)
    random = cells["random_return"][0]
    whole = cells.filter((pl.col("variant") == SWEEP) & (pl.col("level") == 0))
    dense = whole["return_final"].median()
    rows = cells.filter(pl.col("variant") == variant).sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def densities(cells: pl.DataFrame, variant: str = AS_IS) -> np.ndarray:
    rows = cells.filter(pl.col("variant") == variant)
    return rows.group_by("level").agg(pl.col("density").max()).sort("level")["density"].to_numpy()


def conclude(cells: pl.DataFrame) -> Finding:
    own = {metric: matrix(cells, AS_IS, metric)[:, 1:] for metric in METRICS}
    small = {metric: (own[metric] - matrix(cells, NARROW, metric)).mean(1) for metric in METRICS}
    shown = "; ".join(
        f"{METRICS[metric]} {signed(*effect(gap), digits=2)}" for metric, gap in small.items()
    )
    change = {
        name: (matrix(cells, name, "return_final")[:, 1:] - own["return_final"]).mean(1)
        for name in SETTINGS
        if name != AS_IS
    }
    moved = ", ".join(
        f"{name} {'better' if found > 0 else 'worse'}"
        for name, gap in change.items()
        if (found := direction(gap))
    )
    word = {1: "above", 0: "not told from", -1: "below"}[direction(small["return_final"])]
    floors = {algo: matrix(cells, OTHER_KEY, "return_final", algo) for algo in _there(cells)}
    again = ", ".join(
        f"{(floor < 0.95).mean():.0%} of {floor.size} ({ALGORITHMS[algo]})"
        for algo, floor in floors.items()
    )
    missing = "no tickets of DQN" if "dqn" in floors else "no DQN"
    return Finding(
        ran=f"{cells['env'][0]}, PPO, {cells['seed'].n_unique()} seeds at "
        f"{', '.join(f'{d:.1%}' for d in densities(cells))} of the weights, "
        f"{len(cells.filter(pl.col('variant') != SWEEP))} trainings (cut: "
        f"{cuts(cells.filter(pl.col('variant') == SWEEP))}, {missing}, no Acrobot)",
        effect=f"tickets minus dense networks as small, of the dense return: {shown}; "
        f"dense policies trained again that end below 0.95: {again}",
        verdict=f"tickets {word} small dense networks; by settings: {moved or 'none told apart'}",
        text=text(cells, change),
        figures={"sanity": partial(draw, cells)},
    )


def _there(cells: pl.DataFrame) -> list[str]:
    return [algo for algo in ALGORITHMS if algo in set(cells["algo"])]


def text(cells: pl.DataFrame, change: dict[str, np.ndarray]) -> str:
    shown = densities(cells)
    rows = []
    for name in (*SETTINGS, NARROW):
        for metric, word in METRICS.items():
            values = matrix(cells, name, metric)
            fields = [f"{value:.2f}" for value in values.mean(0)]
            gap = signed(*effect(change[name]), digits=2) if name in change else "-"
            first = ["-"] if name == NARROW else []
            rows.append(
                [f"{name}, {word}", *first, *fields, gap if metric == "return_final" else "-"]
            )
    header = ["variant", *(f"{each:.1%}" for each in shown), "final change, pruned"]
    floors = " ".join(_floor(cells, algo) for algo in _there(cells))
    return f"""Shares of the range from the random policy to the median dense one. **Noise floor**:
dense policies trained again from the same values with other keys. {floors} One level below 0.95 is
no degradation, two in a row are.

Tickets keep their masks; keys are the same in all rows but the last two, whose networks are dense
with two equal hidden layers and as near to a ticket's number of weights as that allows:
{", ".join(f"{each:.1%}" for each in densities(cells, NARROW))}.

""" + markdown(header, rows)


def _floor(cells: pl.DataFrame, algo: str) -> str:
    floor = matrix(cells, OTHER_KEY, "return_final", algo)
    return f"""{ALGORITHMS[algo]}'s end at {floor.mean():.3f} on average, the worst of {floor.size}
at {floor.min():.2f}, {(floor < 0.95).mean():.0%} below the 0.95 that counts as degraded; the
standard deviation is {floor.mean(1).std():.3f} between seeds and {floor.std(1).mean():.3f} between
keys of a seed."""


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for metric, title in METRICS.items():
        lines = [
            Line(name, 100 * densities(cells), matrix(cells, name, metric)) for name in SETTINGS
        ]
        small = Line(NARROW, 100 * densities(cells, NARROW), matrix(cells, NARROW, metric))
        panels[title] = [*lines, small]
    return line_figure(
        panels,
        f"{cells['env'][0]}: tickets of PPO under other settings",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "share of the dense return",
    )


EXPERIMENT = Experiment(
    name="sanity",
    question="Do keys, learning rate, budget or width explain it?",
    claim="What tickets do is not the doing of their learning rate or budget, nor what a dense "
    "network as small would do (our own premise)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
