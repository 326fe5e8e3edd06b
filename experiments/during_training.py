"""Is a ticket better than a network that becomes sparse while it trains?

PPO, DQN and SAC pruned gradually, once, by SET, by RigL or from the start, to densities at which
tickets and, on CartPole, random masks of the same seeds were trained; equal steps, the same initial
weights. Networks of PPO and DQN twice as wide, and of PPO four times, are pruned to as many::

    python -m experiments.during_training [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
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
from experiments.remarks import budgets, cuts, levels_of
from experiments.sweeps import TICKET, SharedSweep, cartpole, dqn, dqn_squared, pendulum_sac
from experiments.training import train
from sparse_tickets import Sweep
from sparse_tickets.analysis.statistics import sign_flip
from sparse_tickets.population import initialise

METHODS = {
    "gradual": "gradual pruning",
    "one-shot": "one-shot pruning",
    "rigl": "RigL",
    "set": "SET",
    "static": "static random (ERK)",
}
WIDENED = ("gradual", "static")
"""The methods that prune wider networks, too."""
TIMES = {2: "twice", 4: "four times"}
DENSE, TICKETS, GLOBAL = "dense", "ticket", "static random (global)"


@dataclass(frozen=True)
class Study:
    """What is trained on a task by one algorithm.

    Attributes:
        title: what tables call it.
        algo: what trains.
        sweep: whose dense policies, tickets and settings these are.
        every: gradient steps between two updates of the masks.
        levels: of the sweep, the dense one first.
        wider: how many times as wide networks are trained, too.
    """

    title: str
    algo: str
    sweep: SharedSweep
    every: int
    levels: tuple[int, ...]
    wider: tuple[int, ...] = ()


# A training has 6,400 gradient steps of PPO, 50,000 of DQN and 12,000 of SAC; PPO's sweep has the
# finest levels.
STUDIES = {
    "ppo": Study("PPO", "ppo", cartpole, 250, (0, 3, 6, 9), (2, 4)),
    "dqn": Study("DQN", "dqn", dqn_squared, 1000, (0, 2, 3, 4)),
    "huber": Study("DQN with Huber's loss", "dqn", dqn, 1000, (0, 2, 3, 4), (2,)),
    "sac": Study("SAC on Pendulum", "sac", pendulum_sac, 300, (0, 2, 4)),
}
METRICS = {"return_auc": "learning curve", "return_final": "final return"}


def collect(place: Place) -> pl.DataFrame:
    found = []
    for key, study in STUDIES.items():
        # Every algorithm and width compiles kernels of its own.
        if place.quick and key != "ppo":
            continue
        jobs = [("gradual", 1)] if place.quick else _jobs(study)
        if not study.sweep.wanted(place):
            continue
        spec, swept = study.sweep.spec(place), study.sweep.cells(place)
        every = 1 if place.quick else study.every
        there = levels_of(swept, study.algo)
        chosen = there if place.quick else [level for level in study.levels if level in there]
        mine = [stored(swept, study.algo, chosen)]
        for method, width in jobs:
            at = _levels(method, width, chosen)
            job = f"during-{study.algo}-{method}-{width}", (spec, at, every)
            cells = place.once_wanted(*job, _trainer(spec, study.algo, method, width, at, every))
            if cells is None:
                continue
            name = METHODS.get(method, method)
            mine.append(cells.with_columns(method=pl.lit(name), width=pl.lit(width, pl.Int64)))
        if len(mine) > 1:  # else there is nothing to compare tickets with
            found += [cells.with_columns(study=pl.lit(key)) for cells in mine]
    return pl.concat(found, how="diagonal")


def _jobs(study: Study) -> list[tuple[str, int]]:
    """Methods with the widths of networks that they prune."""
    wider = [(method, width) for width in study.wider for method in (DENSE, *WIDENED)]
    return [*((method, 1) for method in METHODS), *wider]


def _levels(method: str, width: int, chosen: list[int]) -> list[int]:
    """A wider network can be pruned to the weights that an ordinary one has when it is dense."""
    if method == DENSE:
        return [0]
    return chosen if width > 1 else chosen[1:]


def stored(cells: pl.DataFrame, algo: str, chosen: list[int]) -> pl.DataFrame:
    """Dense policies, tickets and random masks of a sweep."""
    names = {TICKET: TICKETS, "random/re-init": GLOBAL, "dense": DENSE}
    return (
        cells.filter((pl.col("algo") == algo) & pl.col("level").is_in(chosen))
        .with_columns(
            method=pl.col("condition").replace_strict(names, default=None),
            width=pl.lit(1, pl.Int64),
        )
        .drop_nulls("method")
    )


def _trainer(
    spec: Sweep, algo: str, method: str, width: int, chosen: list[int], every: int
) -> Callable[[], pl.DataFrame]:
    def compute() -> pl.DataFrame:
        return pl.concat(trained(spec, algo, method, width, level, every) for level in chosen)

    return compute


def trained(
    spec: Sweep, algo: str, method: str, width: int, level: int, every: int
) -> pl.DataFrame:
    """Policies of some width, pruned while they train to as many weights as a level keeps."""
    other = replace(spec, hidden=tuple(width * units for units in spec.hidden))
    arena, kept = other.arena(algo), spec.kept(algo, level)
    seeds = list(range(spec.seeds))
    keys = torch.tensor([spec.initial_key(seed) for seed in seeds])
    initial = initialise(arena, keys, spec.init, spec.log_std)
    mask = torch.ones(len(seeds), arena.prunable, dtype=torch.bool)
    what = f"{method} x{width} {kept}"
    if method == DENSE:
        return train(other, None, algo, 0, mask, initial, seeds, what).rows
    # A sweep whose first level keeps so many.
    rate = 1 - kept / arena.prunable
    other = replace(other, rate=rate, during=method, during_every=every)
    cells = train(other, None, algo, 1, mask, initial, seeds, what).rows
    return cells.with_columns(level=pl.lit(level, pl.Int64))


def studies(cells: pl.DataFrame) -> dict[str, str]:
    """Those that were run, with their titles."""
    there = set(cells["study"])
    return {key: study.title for key, study in STUDIES.items() if key in there}


def of(cells: pl.DataFrame, key: str) -> pl.DataFrame:
    return cells.filter(pl.col("study") == key)


def matrix(cells: pl.DataFrame, key: str, method: str, metric: str, width: int = 1) -> np.ndarray:
    """``[seeds, levels]`` of a method, as a share of random to dense.

    What is as wide as the sweep's networks begins with the dense ones.
    """
    rows = of(cells, key)
    random = rows["random_return"].mean()
    ordinary = pl.col("width") == 1
    dense = rows.filter(ordinary & (pl.col("method") == DENSE))["return_final"].median()
    own = [DENSE, method] if width == 1 else [method]
    rows = rows.filter((pl.col("width") == width) & pl.col("method").is_in(own))
    rows = rows.sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def methods(cells: pl.DataFrame, width: int = 1, key: str | None = None) -> list[str]:
    """Of a study, or of any."""
    rows = cells if key is None else of(cells, key)
    there = set(rows.filter(pl.col("width") == width)["method"])
    return [name for name in (TICKETS, *METHODS.values(), GLOBAL) if name in there]


def widths(cells: pl.DataFrame, key: str | None = None) -> list[int]:
    """Of networks that are wider, a study's or any's."""
    rows = cells if key is None else of(cells, key)
    return rows.filter(pl.col("width") > 1)["width"].unique().sort().to_list()


def densities(cells: pl.DataFrame, key: str) -> np.ndarray:
    """Weights kept, of those that a dense network of the sweep has."""
    rows = of(cells, key).filter(pl.col("width") == 1)
    rows = rows.filter(pl.col("method").is_in([DENSE, TICKETS]))
    return rows.group_by("level").agg(pl.col("density").max()).sort("level")["density"].to_numpy()


def conclude(cells: pl.DataFrame) -> Finding:
    words = {1: "better than dense", 0: "not told from dense", -1: "worse than dense"}
    shown, verdicts = [], []
    for key, title in studies(cells).items():
        density = densities(cells, key)
        at = len(density) - 2 if len(density) > 2 else len(density) - 1
        above = {
            name: values[:, at] - values[:, 0]
            for name in (TICKETS, METHODS["gradual"])
            for values in [matrix(cells, key, name, "return_final")]
        }
        found = [f"{name} {signed(*effect(gap), digits=2)}" for name, gap in above.items()]
        shown.append(f"{title} at {density[at]:.1%}: {', '.join(found)}")
        told = [f"{name} {words[direction(gap)]}" for name, gap in above.items()]
        verdicts.append(f"{title}: {', '.join(told)}")
    names = [*methods(cells)]
    for width in widths(cells):
        names += [f"{name} of {TIMES[width]} the width" for name in methods(cells, width)]
    on = ", ".join(
        f"{title} at {', '.join(f'{each:.1%}' for each in densities(cells, key)[1:])}"
        for key, title in studies(cells).items()
    )
    every = " and ".join(f"{STUDIES[key].every:,} ({name})" for key, name in studies(cells).items())
    shortened = {name: cuts(of(cells, key)) for key, name in studies(cells).items()}
    cut = "; ".join(f"{name}: {how}" for name, how in shortened.items() if how)
    missing = [study.title for key, study in STUDIES.items() if key not in studies(cells)]
    for key, name in studies(cells).items():
        lacking = [TIMES[each] for each in TIMES if each not in widths(cells, key)]
        missing += [f"networks of {name} {' or '.join(lacking)} as wide"] if lacking else []
    figures = {"during_training": partial(draw, cells)}
    if widths(cells):
        figures["during_training_width"] = partial(draw_widths, cells)
    return Finding(
        ran=f"{', '.join(names)}; {cells['env'][0]}, {_seeds(cells)}, "
        f"{on} of the weights, "
        f"{budgets(cells)}, masks updated every {every} gradient steps, "
        f"{len(cells)} trainings (cut: {cut}; no {', no '.join(missing)})",
        effect=f"final return minus dense, of the dense return: {'; '.join(shown)}",
        verdict="; ".join(verdicts),
        text=text(cells),
        figures=figures,
    )


def _seeds(cells: pl.DataFrame) -> str:
    """``6 seeds``, or the fewest and the most."""
    counts = cells.group_by("study").agg(pl.col("seed").n_unique())["seed"].unique().sort()
    fewest, most = counts[0], counts[-1]
    return f"{fewest} seeds" if fewest == most else f"{fewest} to {most} seeds"


def text(cells: pl.DataFrame) -> str:
    paragraphs = [
        """Shares of the range from the random policy to the dense one, mean over seeds, and
after the colon the difference from the ticket of the same seed. A ticket has been trained several
times to find its mask, the others train once; what is pruned gradually is dense at first, its curve
too. Masks that change share a density out by ERK, as published."""
    ]
    for key, title in studies(cells).items():
        density = densities(cells, key)
        header = [
            f"{title}, method",
            *(f"{name}, {each:.1%}" for name in METRICS.values() for each in density[1:]),
        ]
        rows = [
            [name, *_fields(cells, key, name, len(density))] for name in methods(cells, key=key)
        ]
        paragraphs.append(markdown(header, rows))
    if not widths(cells):
        return "\n\n".join(paragraphs)
    paragraphs.append(
        """Wider networks, of as many weights in the end: a density is of the ordinary network's
weights, so that at 100% of them the wide one is sparse. After the colon the difference from the
ordinary network under the same method, dense at 100%."""
    )
    for key, title in studies(cells).items():
        shown = [f"{each:.1%}" for each in densities(cells, key)]
        for width in widths(cells, key):
            rows = [
                [name, *_wide_fields(cells, key, name, width)]
                for name in methods(cells, width, key)
            ]
            if rows:
                head = f"{title}, final return, {TIMES[width]} as wide"
                paragraphs.append(markdown([head, *shown], rows))
    paragraphs += _wide_dense(cells)
    return "\n\n".join(paragraphs)


def _fields(cells: pl.DataFrame, key: str, name: str, count: int) -> list[str]:
    fields = []
    for metric in METRICS:
        values, own = (matrix(cells, key, each, metric) for each in (name, TICKETS))
        for level in range(1, count):
            middle = values[:, level].mean()
            gap = signed(*effect(values[:, level] - own[:, level]), digits=2)
            fields.append(f"{middle:.2f}" if name == TICKETS else f"{middle:.2f}: {gap}")
    return fields


def _wide_fields(cells: pl.DataFrame, key: str, name: str, width: int) -> list[str]:
    values = matrix(cells, key, name, "return_final", width)
    gaps = values - matrix(cells, key, name, "return_final")
    return [
        f"{column.mean():.2f}: {signed(*effect(gap), digits=2)}"
        for column, gap in zip(values.T, gaps.T, strict=True)
    ]


def _wide_dense(cells: pl.DataFrame) -> list[str]:
    """What wide networks return dense, and by how much gradual pruning changes that."""
    found = []
    for key, title in studies(cells).items():
        for width in widths(cells, key):
            there = of(cells, key).filter(pl.col("width") == width)
            if not {DENSE, METHODS["gradual"]} <= set(there["method"]):
                continue
            dense, gradual = (
                matrix(cells, key, name, "return_final", width)[:, 0]
                for name in (DENSE, METHODS["gradual"])
            )
            gap = signed(*effect(gradual - dense), digits=2)
            p = sign_flip(gradual - dense)
            found.append(f"{dense.mean():.2f}, pruned {gap} (p {p:.2f}) ({title}, x{width})")
    if not found:
        return []
    return [
        "Dense, and by how much that changes where they are pruned gradually to as many weights as "
        f"an ordinary dense network has, wide networks end at: {'; '.join(found)}."
    ]


def draw(cells: pl.DataFrame) -> Figure:
    panels = {
        f"{title}, {word}": [
            Line(name, 100 * densities(cells, key), matrix(cells, key, name, metric))
            for name in methods(cells, key=key)
        ]
        for key, title in studies(cells).items()
        for metric, word in METRICS.items()
    }
    return line_figure(
        panels,
        "Sparse while it trains, on CartPole where no other task is named",
        f"mean of {_seeds(cells)}, 95% interval",
        "density",
        "share of the dense return",
    )


def draw_widths(cells: pl.DataFrame) -> Figure:
    panels = {
        title: [
            Line(
                f"{name}, x{width}",
                100 * densities(cells, key),
                matrix(cells, key, name, "return_final", width),
            )
            for name in [METHODS[each] for each in WIDENED]
            for width in (1, *widths(cells, key))
            if name in methods(cells, width, key)
        ]
        for key, title in studies(cells).items()
        if widths(cells, key)
    }
    return line_figure(
        panels,
        f"{cells['env'][0]}: as many weights in wider networks",
        f"mean of {_seeds(cells.filter(pl.col('width') > 1))}, 95% interval",
        "weights, of the ordinary dense network's",
        "final return, of the dense one",
    )


EXPERIMENT = Experiment(
    name="during_training",
    question="Is a ticket better than pruning while it trains?",
    claim="Gradual pruning at 95% helps DQN and changes nothing for PPO; lottery tickets do worse "
    "than dense (Obando-Ceron et al. 2024, in networks widened three to five times)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
