"""Does a fresh critic make PPO unlearn what a rewound ticket can do already?

A ticket balances before any training, yet some tickets of PPO end worse than the same mask with
shuffled values. Tickets are trained again with fresh keys for the first fifth of the protocol's
schedule, as they are and with one suspected cause removed at a time::

    python -m experiments.failing_ticket [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import cuts, levels_of
from experiments.sweeps import cartpole, tickets
from sparse_tickets import Population, Sweep, Ticket
from sparse_tickets.algos.evaluation import Evaluator, Result
from sparse_tickets.algos.ppo import PPO, Iteration
from sparse_tickets.envs import open_env
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.sweep.protocols import protocol

LEVELS = (1, 2, 3, 4)
KEYS = 2
FIRST = 0.2
"""Share of the protocol's steps, on its schedule."""
BALANCES = 475.0
AS_IS = "as it is"
HEADER = (
    "variant", "unlearned", "before training", "on the way", "change", "at the end",
    "entropy", "KL", "clipped", "value loss",
)  # fmt: skip
STATISTICS = ("entropy", "approx_kl", "clip_fraction", "value_loss")


def _same(row: Tensor, ticket: Ticket, dense: Ticket) -> Tensor:
    return row


def _shuffled(row: Tensor, ticket: Ticket, dense: Ticket) -> Tensor:
    """The surviving values of each layer in another order."""
    generator = torch.Generator().manual_seed(
        derive_key("shuffled", ticket.seed, ticket.level) >> 1
    )
    for begin, out, inp in ticket.arena.prunable_layers():
        kept = begin + ticket.mask[begin : begin + out * inp].nonzero().flatten()
        row[kept] = row[kept[torch.randperm(len(kept), generator=generator)]]
    return row


def _trained_critic(row: Tensor, ticket: Ticket, dense: Ticket) -> Tensor:
    """The critic that its dense network ended with."""
    _, critic = ticket.arena.nets
    for old, new in zip(critic.layers(row[None]), critic.layers(dense.final[None]), strict=True):
        for mine, trained in zip(old, new, strict=True):
            mine.copy_(trained)
    return row


def _timid_head(row: Tensor, ticket: Ticket, dense: Ticket) -> Tensor:
    """The same greedy policy, but near to indifferent."""
    actor = ticket.arena.actor
    actor.weight(row[None], actor.depth - 1).mul_(0.1)
    return row


Change = Callable[[Tensor, Ticket, Ticket], Tensor]
VARIANTS: dict[str, tuple[Change, dict]] = {
    AS_IS: (_same, {}),
    "values shuffled": (_shuffled, {}),
    "trained critic": (_trained_critic, {}),
    "head x 0.1": (_timid_head, {}),
    "no value clipping": (_same, {"clip_value": False}),
}


def collect(place: Place) -> pl.DataFrame:
    spec = cartpole.spec(place)
    budget = spec.ppo if place.quick else protocol(spec.env).ppo
    chosen = sorted(set(levels_of(cartpole.cells(place), "ppo")) & set(LEVELS))
    return pl.concat(
        place.once(
            f"failing-{name.replace(' ', '-')}",
            (spec, budget, chosen, KEYS, FIRST),
            partial(train, place, budget, chosen, name),
        )
        for name in VARIANTS
    )


def train(place: Place, budget: PPO, chosen: list[int], name: str) -> pl.DataFrame:
    spec, store = cartpole(place)
    change, settings = VARIANTS[name]
    dense = {ticket.seed: ticket for ticket in tickets(store, "ppo", 0)}
    found = []
    for level in chosen:
        level_tickets = tickets(store, "ppo", level)
        rows = [change(t.initial.clone(), t, dense[t.seed]) for t in level_tickets] * KEYS
        population = Population.create(
            spec.arena("ppo"),
            torch.stack(rows),
            torch.stack([ticket.mask for ticket in level_tickets] * KEYS),
            spec.density(level),
        )
        # Alike in all variants, so that they differ in nothing else.
        keys = [
            derive_key("failing", ticket.seed, level, again)
            for again in range(KEYS)
            for ticket in level_tickets
        ]
        result, statistics = _trained(
            replace(budget, **settings), spec, population, torch.tensor(keys)
        )
        found.append(
            pl.DataFrame(
                {
                    "env": spec.env,
                    "variant": name,
                    "seed": [ticket.seed for ticket in level_tickets] * KEYS,
                    "key": [again for again in range(KEYS) for _ in level_tickets],
                    "level": [level] * len(keys),
                    "density": population.parameters.mask.double().mean(1).tolist(),
                    "return_initial": result.return_initial.tolist(),
                    "return_final": result.return_final.tolist(),
                    "return_best": result.return_best.tolist(),
                    "curve": result.curve.tolist(),
                    **{each: statistics[:, :, i].tolist() for i, each in enumerate(STATISTICS)},
                    "train_steps": [result.train_steps] * len(keys),
                    "wall_s": [result.wall_s / len(keys)] * len(keys),
                }
            )
        )
    return pl.concat(found)


def _trained(
    settings: PPO, spec: Sweep, population: Population, key: Tensor
) -> tuple[Result, Tensor]:
    """The result, and `STATISTICS` of the updates ``[P, points, statistics]`` along the way."""
    points = spec.evaluation.points
    iterations = max(points, round(FIRST * settings.iterations))
    seen: list[list[Tensor]] = [[] for _ in range(points)]
    with (
        open_env(spec.env, len(population), settings.copies) as env,
        Evaluator(spec.evaluation, spec.env, population, key, 0, iterations) as evaluator,
    ):
        iterate = Iteration(settings, env, population, key, 0)
        for number in range(iterations):
            iterate.learning_rate.fill_(settings.learning_rate_at(number))
            stats = iterate()
            evaluator.after(number)
            seen[number * points // iterations].append(
                torch.stack([getattr(stats, name) for name in STATISTICS], 1)
            )
        result = evaluator.result(iterations * settings.batch)
    return result, torch.stack([torch.stack(each).mean(0) for each in seen], 1)


def variants(cells: pl.DataFrame) -> list[str]:
    """Those that were trained."""
    return [name for name in VARIANTS if name in set(cells["variant"])]


def curves(cells: pl.DataFrame, variant: str) -> np.ndarray:
    """Mean return on the way of each seed's trainings, ``[seeds]``."""
    on_the_way = pl.col("curve").list.mean().mean()
    rows = cells.filter(pl.col("variant") == variant).group_by("seed").agg(on_the_way).sort("seed")
    return rows["curve"].to_numpy()


def conclude(cells: pl.DataFrame) -> Finding:
    own = curves(cells, AS_IS)
    change = {name: curves(cells, name) - own for name in variants(cells) if name != AS_IS}
    suspect = change["trained critic"]
    here = cells.filter(pl.col("variant") == AS_IS)
    lost, balancing = unlearned(here)
    return Finding(
        ran=f"{cells['env'][0]}, PPO tickets of {cells['seed'].n_unique()} seeds at "
        f"{cells['level'].n_unique()} densities from {cells['density'].max():.0%} to "
        f"{cells['density'].min():.0%}, {KEYS} fresh keys each, the first "
        f"{cells['train_steps'].max():,} steps: {len(here)} trainings for each of "
        f"{len(variants(cells))} variants (cut: {cuts(here.with_columns(algo=pl.lit('ppo')))})",
        effect=f"{lost} of {balancing} tickets that balance at once unlearn it; with a trained "
        f"critic the return on the way changes by {signed(*effect(suspect), digits=0)}",
        verdict=verdict(lost, suspect),
        text=text(cells, change),
        figures={"failing_ticket": partial(draw, cells)},
    )


def unlearned(cells: pl.DataFrame) -> tuple[int, int]:
    """How many fall below half of their return on the way, of those that balance at once."""
    balancing = cells.filter(pl.col("return_initial") >= BALANCES)
    lost = balancing.filter(pl.col("curve").list.min() < 0.5 * pl.col("return_initial"))
    return len(lost), len(balancing)


def verdict(lost: int, suspect: np.ndarray) -> str:
    if not lost:
        return "not seen again"
    words = {1: "agrees: a trained critic helps", -1: "disagrees: a trained critic hurts"}
    return words.get(direction(suspect), "undecided")


def text(cells: pl.DataFrame, change: dict[str, np.ndarray]) -> str:
    rows = []
    for name in variants(cells):
        here = cells.filter(pl.col("variant") == name)
        lost, balancing = unlearned(here)
        early = {each: here[each].list.first().mean() for each in STATISTICS}
        rows.append(
            [
                name,
                f"{lost}/{balancing}",
                f"{here['return_initial'].mean():.0f}",
                f"{here['curve'].list.mean().mean():.0f}",
                "-" if name == AS_IS else signed(*effect(change[name]), digits=0),
                f"{here['curve'].list.last().mean():.0f}",
                f"{early['entropy']:.2f}",
                f"{early['approx_kl']:.4f}",
                f"{early['clip_fraction']:.3f}",
                f"{early['value_loss']:.1f}",
            ]
        )
    return f"""Keys, starts and draws are the same in all variants. Unlearned: of the tickets whose
greedy return before training is {BALANCES:g} or more, those that an evaluation on the way finds
below half of it. The change of the mean return on the way against "{AS_IS}" is paired by seed, with
its bootstrap interval. Entropy, KL, clipped share and value loss are those PPO reports over the
first of ten parts of the way. "Values shuffled" is mask/permuted by the ticket's own mask; "head x
0.1" makes the same greedy policy nearly indifferent. Whether what is unlearned stays so to the end
of the schedule was not run.

""" + markdown(HEADER, rows)


def draw(cells: pl.DataFrame) -> Figure:
    def over(name: str, column: str) -> np.ndarray:
        here = cells.filter(pl.col("variant") == name)
        values = np.array(here[column].to_list())
        seeds = here["seed"].to_numpy()
        return np.array([values[seeds == seed].mean(0) for seed in np.unique(seeds)])

    points = len(cells["curve"][0])
    x = max(cells["train_steps"]) * (1 + np.arange(points)) / points / 1000
    panels = {
        title: [Line(name, x, over(name, column)) for name in variants(cells)]
        for title, column in (("greedy return", "curve"), ("entropy of the policy", "entropy"))
    }
    return line_figure(
        panels,
        f"{cells['env'][0]}: tickets of PPO trained again",
        f"mean of {cells['seed'].n_unique()} seeds over levels and keys, 95% interval",
        "thousand steps",
        "",
        scale="linear",
        share_y=False,
    )


EXPERIMENT = Experiment(
    name="failing_ticket",
    question="Does PPO unlearn its tickets?",
    claim="A rewound ticket already balances; a fresh critic makes PPO unlearn it (our suspicion, "
    "from 12 of 135 failing cells)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
