"""Do two trainings of one ticket end in the same valley, and does rewinding later help?

Two children of each ticket, alike but for their training keys: return, and the policy's KL
divergence from the first child, in eleven points on the line between them, by density, rewind step
and algorithm::

    python -m experiments.stability [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import cuts
from experiments.sweeps import TICKET, cartpole, levels
from sparse_tickets import Population, Sweep
from sparse_tickets.algos.evaluation import Result
from sparse_tickets.envs import open_env
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import demonstrate, evaluate
from sparse_tickets.sweep.cells import cell_population
from sparse_tickets.sweep.experts import stored_demonstrations
from sparse_tickets.sweep.run import train_population
from sparse_tickets.sweep.spec import Track
from sparse_tickets.sweep.store import Store, Unit

ALGORITHMS = {"ppo": "PPO", "bc": "cloning"}
LEVELS = (0, 2, 4, 6, 8, 10)
LATER = 0.1
"""Share of the training that the later rewind point lies behind."""
MARGIN = 0.05
"""Of the dense return: the loss that counts as degraded, here of an interval's upper end."""
POINTS = 11
EPISODES, VISITED, COPIES = 50, 64, 8
"""Episodes that score a point; steps and copies of them that visit states for the KL divergence."""


def collect(place: Place) -> pl.DataFrame:
    found = []
    for share in (0.0, LATER):
        name, spec = _sweep(place, share)
        settings = (spec, POINTS, EPISODES, VISITED, COPIES)
        jobs = {
            (algo, level): f"stability-{share:g}-{algo}-{level:02d}"
            for algo in ALGORITHMS
            for level in LEVELS
            if level < spec.levels
        }
        there = {cell for cell, job in jobs.items() if place.kept(job, settings)}
        if len(there) < len(jobs) and place.wants(name, spec):
            store = place.sweep(name, spec)
            there |= {(algo, level) for algo in ALGORITHMS for level in levels(store, algo)}
        found += [
            place.once(job, settings, partial(siblings, place, share, *cell)).with_columns(
                rewind=pl.lit(share)
            )
            for cell, job in jobs.items()
            if cell in there
        ]
    return pl.concat(found)


def _sweep(place: Place, share: float) -> tuple[str, Sweep]:
    """The tickets of CartPole as they are, or the same rewound to a share of training."""
    spec = cartpole.spec(place)
    if not share:
        return cartpole.name, spec
    iterations = max(1, round(share * spec.ppo.iterations))
    return "stability", replace(
        spec,
        conditions=(TICKET,),
        controls=("own",),
        levels=min(spec.levels, max(LEVELS) + 1),
        rewind_step=iterations * spec.ppo.batch,
    )


def siblings(place: Place, share: float, algo: str, level: int) -> pl.DataFrame:
    """Train two children of each seed's ticket; a row per seed."""
    name, spec = _sweep(place, share)
    store = place.sweep(name, spec)
    tracks = [Track(seed, TICKET, "own") for seed in range(spec.seeds)]
    dataset = stored_demonstrations(spec, store, algo) if algo in spec.imitating else None
    results = []
    for child in range(2):
        population = _start(spec, store, algo, level, tracks)
        names = [derive_key("child", spec.env, algo, t.seed, level, child) for t in tracks]
        # A level above 0 goes on from the rewind point; what is dense does here, too.
        results.append(
            train_population(
                spec, algo, population, torch.tensor(names), max(level, 1), tracks, dataset
            )
        )
    returns, divergence = _between(spec, algo, population, results)
    return pl.DataFrame(
        {
            "env": spec.env,
            "algo": algo,
            "seed": [track.seed for track in tracks],
            "level": level,
            "density": spec.kept(algo, level) / spec.arena(algo).prunable,
            "line": returns.tolist(),
            "kl": divergence.tolist(),
            "distance": _distance(spec, algo, results).tolist(),
            "dormant": _of_both(results, lambda result: result.dormant_curve[:, -1]),
            "rank": _of_both(results, lambda result: result.effective_rank),
            "train_steps": results[0].train_steps,
            "random_return": spec.env_spec.random_return,
            "wall_s": sum(result.wall_s for result in results) / len(tracks),
        }
    )


def _start(spec: Sweep, store: Store, algo: str, level: int, tracks: list[Track]) -> Population:
    population, _ = cell_population(spec, store, algo, level, tracks)
    if level == 0 and spec.rewind_step:
        stored = store.read_rewind(Unit(algo, 0, 0))
        if stored is None:
            raise FileNotFoundError(f"{store.path} has no rewind points: run again to train them")
        return replace(population, parameters=Parameters(**stored))
    return population


def _of_both(results: list[Result], of: Callable[[Result], Tensor]) -> list[float]:
    return torch.stack([of(result).double() for result in results]).mean(0).tolist()


def _distance(spec: Sweep, algo: str, results: list[Result]) -> Tensor:
    """Of the children's actors, as a share of the way that each has come on average."""

    def actor(rows: Tensor) -> Tensor:
        layers = spec.arena(algo).actor.layers(rows)
        return torch.cat([part.flatten(1) for layer in layers for part in layer], 1)

    one, two = (actor(result.final) for result in results)
    begin = actor(results[0].initial)
    come = ((one - begin).norm(dim=1) + (two - begin).norm(dim=1)) / 2
    return (one - two).norm(dim=1) / come


@torch.no_grad()
def _between(
    spec: Sweep, algo: str, population: Population, results: list[Result]
) -> tuple[Tensor, Tensor]:
    """Greedy return and KL(first child || there), ``[seeds, points]`` each."""
    arena, density = population.arena, population.density
    first, second = (result.final for result in results)
    key = torch.tensor([derive_key("between", spec.env, algo, i) for i in range(len(first))])
    with open_env(spec.env, len(first), COPIES) as env:
        visited = [
            demonstrate(
                population.with_weight(rows), arena, env, env.reset(key), key, VISITED,
                density=density,
            )[0].flatten(1, 2)
            for rows in (first, second)
        ]  # fmt: skip
    obs = torch.cat(visited, 1)
    returns, logp = [], []
    with open_env(spec.env, len(first), EPISODES) as env:
        for point in range(POINTS):
            there = replace(
                population,
                parameters=population.with_weight(first.lerp(second, point / (POINTS - 1))),
            )
            episodes = evaluate(
                there.parameters, arena, env, key, index=0, greedy=True, density=density
            )
            returns.append(episodes.double().mean(1))
            logp.append(there.actor(obs).double().log_softmax(2))
    divergence = [(logp[0].exp() * (logp[0] - each)).sum(2).mean(1) for each in logp]
    return torch.stack(returns, 1), torch.stack(divergence, 1)


def barrier(cells: pl.DataFrame, algo: str, rewind: float) -> np.ndarray:
    """By how much the line dips below the straight one between its ends, ``[seeds, levels]``.

    As a share of the range from the random policy to the median dense child.
    """
    rows = cells.filter(pl.col("algo") == algo)
    random = rows["random_return"][0]
    dense = rows.filter(pl.col("level") == 0)["line"].list.first().median()
    lines = matrix(rows, algo, rewind, "line")
    straight = lines[..., :1] + (lines[..., -1:] - lines[..., :1]) * np.linspace(0, 1, POINTS)
    return (straight - lines).max(-1) / (dense - random)


def matrix(cells: pl.DataFrame, algo: str, rewind: float, column: str) -> np.ndarray:
    """``[seeds, levels]``, or ``[seeds, levels, points]``."""
    rows = cells.filter((pl.col("algo") == algo) & (pl.col("rewind") == rewind))
    rows = rows.sort("seed", "level")
    values = np.array(rows[column].to_list())
    return values.reshape(rows["seed"].n_unique(), rows["level"].n_unique(), *values.shape[1:])


def densities(cells: pl.DataFrame) -> np.ndarray:
    return cells["density"].unique().sort(descending=True).to_numpy()


def rewinds(cells: pl.DataFrame) -> list[float]:
    return cells["rewind"].unique().sort().to_list()


def conclude(cells: pl.DataFrame) -> Finding:
    dips = {(a, r): barrier(cells, a, r).mean(1) for a, r in product(ALGORITHMS, rewinds(cells))}
    shown = [f"{name} {_text(effect(dips[algo, 0.0]))}" for algo, name in ALGORITHMS.items()]
    found = "dip of the return between children, of the dense return: " + ", ".join(shown)
    which = {1: "PPO", 0: "neither", -1: "cloning"}
    closer = which[direction(dips["bc", 0.0] - dips["ppo", 0.0])]
    verdict = [f"{name}: {valley(cells, algo)}" for algo, name in ALGORITHMS.items()]
    verdict.append(f"smaller dips: {closer}")
    if LATER in rewinds(cells):
        later = {algo: dips[algo, LATER] - dips[algo, 0.0] for algo in ALGORITHMS}
        words = {1: "hurts", 0: "undecided", -1: "helps"}
        verdict += [
            f"{name}, rewinding later: {words[direction(later[algo])]}"
            for algo, name in ALGORITHMS.items()
        ]
        change = [
            f"{name} {signed(*effect(later[algo]), digits=3)}" for algo, name in ALGORITHMS.items()
        ]
        found += f"; after rewinding later: {', '.join(change)}"
    points = " and ".join(f"{share:.0%}" for share in rewinds(cells))
    apart = "" if LATER in rewinds(cells) else ", no later rewind point"
    return Finding(
        ran=f"{cells['env'][0]}, two children of {cells['seed'].n_unique()} seeds' tickets at "
        f"{', '.join(f'{d:.1%}' for d in densities(cells))} of the weights, rewound to {points} of "
        f"training, {cells['train_steps'].max():,} steps, {2 * len(cells)} trainings of children "
        f"(cut: {cuts(cells)}{apart})",
        effect=found,
        verdict="; ".join(verdict),
        text=text(cells),
        figures={"stability": partial(draw, cells), "stability_lines": partial(draw_lines, cells)},
    )


def valley(cells: pl.DataFrame, algo: str) -> str:
    """At how many densities the children of tickets as they are surely have no dip to speak of."""
    dips = barrier(cells, algo, 0.0)
    connected = sum(effect(column)[2] < MARGIN for column in dips.T)
    return f"one valley at {connected} of {dips.shape[1]} densities"


def _text(values: tuple[float, float, float]) -> str:
    middle, low, high = (f"{value:.3f}" for value in values)
    return f"{middle} [{low}, {high}]"


def text(cells: pl.DataFrame) -> str:
    rows = []
    for (algo, name), rewind in product(ALGORITHMS.items(), rewinds(cells)):
        dips = barrier(cells, algo, rewind)
        columns = {
            column: matrix(cells, algo, rewind, column)
            for column in ("line", "kl", "distance", "dormant", "rank")
        }
        for level, density in enumerate(densities(cells)):
            mean = {column: values[:, level].mean(0) for column, values in columns.items()}
            rows.append(
                [
                    f"{name}, rewound to {rewind:.0%}, {density:.1%} kept",
                    f"{(mean['line'][0] + mean['line'][-1]) / 2:.0f}",
                    _text(effect(dips[:, level])),
                    f"{mean['kl'][-1]:.4f}",
                    f"{mean['kl'][POINTS // 2]:.4f}",
                    f"{mean['distance']:.2f}",
                    f"{mean['dormant']:.0%}",
                    f"{mean['rank']:.1f}",
                ]
            )
    header = (
        "children", "return", "dip", "KL of the children", "KL half way", "distance",
        "dormant units", "effective rank",
    )  # fmt: skip
    later = (
        " Rewound later, tickets keep Adam's moments, and their masks were found that way."
        if LATER in rewinds(cells)
        else ""
    )
    return f"""Two children have a ticket's mask and values; their training keys differ.{later}

The dip is the most by which the greedy return on the line between them, in {POINTS} points, falls
below the straight line between their own, as a share of the range from the random policy to the
dense one: a dip near 0 says that both ended in one valley. KL is from the first child's policy, on
states that both visit: to the second child, and to the policy half way. The distance is that of the
children's actors over how far training moved them on average; two that went ways at right angles
are 1.4 apart.

""" + markdown(header, rows)


def draw(cells: pl.DataFrame) -> Figure:
    x = 100 * densities(cells)
    series = list(product(ALGORITHMS.items(), rewinds(cells)))
    named = {(algo, r): f"{name}, rewound to {r:.0%}" for (algo, name), r in series}
    panels = {
        "dip of the return": [Line(n, x, barrier(cells, *of)) for of, n in named.items()],
        "KL of the children": [
            Line(n, x, matrix(cells, *of, "kl")[..., -1]) for of, n in named.items()
        ],
    }
    return line_figure(
        panels,
        f"{cells['env'][0]}: two children of a ticket",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "",
        share_y=False,
    )


def draw_lines(cells: pl.DataFrame) -> Figure:
    x = np.linspace(0, 1, POINTS)
    panels = {
        f"{name}, rewound to {rewind:.0%}": [
            Line(f"{density:.1%}", x, matrix(cells, algo, rewind, "line")[:, level])
            for level, density in enumerate(densities(cells))
        ]
        for (algo, name), rewind in product(ALGORITHMS.items(), rewinds(cells))
    }
    return line_figure(
        panels,
        f"{cells['env'][0]}: on the line between two children of a ticket, by density",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "from the first child to the second",
        "greedy return",
        scale="linear",
    )


EXPERIMENT = Experiment(
    name="stability",
    question="Do two trainings of a ticket end in one valley?",
    claim="Sparse networks train to full accuracy where two trainings of them end in one linearly "
    "connected valley, which rewinding to later than the start gives (Frankle et al. 2020, on "
    "images)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
