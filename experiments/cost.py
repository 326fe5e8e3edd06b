"""What does sparsity alone save in a PPO iteration, and where does the rest of the time go?

One iteration of PPO (rollout, advantages, update) of dense and of pruned populations in turn, at
three widths, with a dense critic and with one that is pruned too. Nothing is trained to the end.
What all experiments took is read from their tables, what others would from a stored benchmark::

    python -m experiments.cost [--quick]
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from functools import partial
from itertools import product

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import (
    NAMES,
    RESULTS,
    ROOT,
    Experiment,
    Finding,
    Place,
    effect,
    main,
    markdown,
)
from sparse_tickets import Population
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.envs import env_spec, open_env
from sparse_tickets.kernels.ppo import Batch, ppo_update_
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.returns import gae
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.population import initialise, policy_arena
from sparse_tickets.provenance import processor

ENV = "CartPole-v1"
WIDTHS = {64: 32, 256: 8, 512: 4}
"""Width of both hidden layers: tickets of the population, fewer where they are larger."""
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
SIZES = (1, 4, 16, 64)
ROUNDS = 21
STAGES = ("rollout", "advantages", "update")
HEADER = ("setting", "steps/s", *STAGES, "rollout gains", "update gains", "iteration gains")
CRITICS = {False: "dense critic", True: "critic pruned too"}
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu-amd-epyc-2c-2026-11-22-full.json"
OURS = "sparse_tickets"
PEERS = {"JAX PPO, vmap of w*mask": "JAX, two cores", "SB3 PPO (1 agent, 1 core)": "SB3, one core"}
DEEP = "cartpole-deep"
"""The sweep whose levels are told apart: all have as many tickets, trained together."""


class TimedTraining:
    """A population and its environment, to be advanced by one iteration at a time."""

    def __init__(self, width: int, tickets: int, density: float, prune_critic: bool) -> None:
        self.settings = PPO()
        arena = policy_arena(env_spec(ENV), (width, width), prune_critic=prune_critic)
        self.key = torch.arange(tickets)
        weight = initialise(arena, self.key)
        # By layer, since a ranking over layers of fresh weights is about their initialisation.
        mask = torch.ones(tickets, arena.prunable, dtype=torch.bool)
        if density < 1.0:
            for begin, out, inp in arena.prunable_layers():
                layer = slice(begin, begin + out * inp)
                kept = torch.full((tickets,), max(1, round(density * out * inp)))
                mask[:, layer] = prune(weight[:, layer].abs(), mask[:, layer], kept)
        self.population = Population.create(arena, weight, mask, density)
        with open_env(ENV, tickets, self.settings.copies) as env:
            self.env = env
        self.obs = self.env.reset(self.key)
        self.number = 0

    def iterate(self) -> dict[str, float]:
        """Seconds of each stage."""
        population, settings = self.population, self.settings
        arena, parameters, density = population.arena, population.parameters, population.density
        clock = [time.perf_counter()]
        seen, self.obs = rollout(
            parameters, arena, self.env, self.obs, self.key, settings.horizon, density=density
        )
        clock.append(time.perf_counter())
        advantage, target = gae(
            seen.reward,
            seen.value,
            seen.next_value,
            seen.terminated,
            seen.truncated,
            settings.gamma,
            settings.lam,
        )
        clock.append(time.perf_counter())
        flat = seen.flatten()
        batch = Batch(
            flat.obs, flat.action, flat.logp, flat.value, advantage.flatten(1), target.flatten(1)
        )
        rate = torch.full((len(population),), settings.learning_rate)
        ppo_update_(
            parameters,
            arena,
            batch,
            self.key,
            self.number,
            rate,
            settings.config(),
            density=density,
        )
        clock.append(time.perf_counter())
        self.number += 1
        return dict(zip(STAGES, np.diff(clock), strict=True))


def collect(place: Place) -> pl.DataFrame:
    rounds = 2 if place.quick else ROUNDS
    widths = {64: 2} if place.quick else WIDTHS
    groups = [
        [(width, tickets, density, critic) for density in DENSITIES]
        for (width, tickets), critic in product(widths.items(), CRITICS)
    ]
    groups.append([(64, tickets, 1.0, False) for tickets in (SIZES[:2] if place.quick else SIZES)])
    threads = torch.get_num_threads()
    timed = [
        place.once(
            f"cost-{index}", (group, rounds, threads, processor()), partial(measure, group, rounds)
        ).with_columns(varied=pl.lit("density" if group is not groups[-1] else "tickets"))
        for index, group in enumerate(groups)
    ]
    read = [peers(), stages(("cartpole", *NAMES)), by_level()]
    # Their time is another's.
    return pl.concat([*timed, *(each.with_columns(wall_s=0.0) for each in read)], how="diagonal")


def peers() -> pl.DataFrame:
    """Seconds an agent-step of dense PPO takes on CartPole, sixty tickets together or one agent."""
    stored = json.loads(BENCHMARK.read_text())
    (record,) = (
        each
        for each in stored["records"]
        if each["op"] == "PPO iteration"
        and each["shape"] == {"P": 60, "envs": 4, "steps": 128}
        and each["sparsity"] == 0
    )
    seconds = {name: found["wall"]["median"] for name, found in record["contenders"].items()}
    named = {OURS: OURS} | PEERS
    return pl.DataFrame(
        {
            "varied": "peer",
            "name": list(named.values()),
            "seconds": [seconds[name] for name in named],
            "hardware": stored["hardware"],
        }
    )


def stages(names: Iterable[str]) -> pl.DataFrame:
    """What each table's own cells took; cells that an earlier one has are known by their time."""
    seen = pl.Series("wall_s", [], pl.Float64)
    rows = []
    for name in names:
        file = RESULTS / f"{name}.parquet"
        if name == "cost" or not file.exists():
            continue
        cells = pl.read_parquet(file).filter(pl.col("wall_s").is_not_null())
        own = cells.filter(~pl.col("wall_s").is_in(seen.to_list()))
        seen = pl.concat([seen, own["wall_s"]])
        ppo = own.filter(pl.col("env").str.starts_with(ENV))
        if "algo" in own.columns:
            ppo = ppo.filter(pl.col("algo") == "ppo")
        rows.append((name, len(own), float(own["wall_s"].sum()), int(ppo["train_steps"].sum())))
    schema = ("name", "trainings", "seconds", "ppo_steps")
    return pl.DataFrame(rows, schema, orient="row").with_columns(varied=pl.lit("stage"))


def by_level() -> pl.DataFrame:
    """Seconds of each level's training, evaluation apart, of one sweep's tickets."""
    cells = pl.read_parquet(RESULTS / "bc_vs_rl.parquet")
    return (
        cells.filter(pl.col("source").str.starts_with(DEEP))
        .group_by("algo", "level")
        .agg(
            seconds=pl.col("train_s").sum(),
            density=pl.col("density").first(),
            tickets=pl.len().cast(pl.Int64),
        )
        .sort("algo", "level")
        .with_columns(varied=pl.lit("level"))
    )


def measure(group: list[tuple[int, int, float, bool]], rounds: int) -> pl.DataFrame:
    """Time the members of a group in turn, round after round, the first to warm up."""
    trainings = [TimedTraining(*each) for each in group]
    rows = []
    for turn in range(rounds + 1):
        for (width, tickets, density, critic), training in zip(group, trainings, strict=True):
            seconds = training.iterate()
            if turn:
                rows.append(
                    {
                        "width": width,
                        "tickets": tickets,
                        "density": density,
                        "prune_critic": critic,
                        "round": turn,
                        **seconds,
                        "steps": tickets * training.settings.batch,
                        "threads": torch.get_num_threads(),
                        "wall_s": sum(seconds.values()),
                    }
                )
    return pl.DataFrame(rows)


def gains(cells: pl.DataFrame, width: int, critic: bool, stage: str = "wall_s") -> np.ndarray:
    """Dense over pruned within each round, ``[rounds, densities]``."""
    here = cells.filter(
        (pl.col("width") == width)
        & (pl.col("prune_critic") == critic)
        & (pl.col("varied") == "density")
    ).sort("round", "density", descending=True)
    seconds = here[stage].to_numpy().reshape(-1, len(DENSITIES))
    return seconds[:, :1] / seconds


def conclude(everything: pl.DataFrame) -> Finding:
    cells = everything.filter(pl.col("varied").is_in(["density", "tickets"]))
    at = DENSITIES.index(0.1)
    shown = "; ".join(
        f"width {width}: {_ratio(gains(cells, width, False)[:, at])}, "
        f"critic pruned too {_ratio(gains(cells, width, True)[:, at])}"
        for width in sorted(cells["width"].unique())
    )
    _, low, high = effect(gains(cells, 64, False)[:, at])
    widths = ", ".join(map(str, cells["width"].unique().sort()))
    return Finding(
        ran=f"one PPO iteration on {ENV}, widths {widths}, "
        f"{cells['round'].max()} rounds in turn, {cells['threads'].max()} threads, "
        f"{cells['processor'][0]}",
        effect=f"dense over 90% pruned, whole iteration: {shown}",
        verdict="agrees" if low <= 1.3 <= high else f"{'more' if low > 1.3 else 'less'} than 1.3x",
        text="\n\n".join([text(cells), study(everything)]),
        figures={"cost": partial(draw, cells)},
    )


def _ratio(values: np.ndarray) -> str:
    middle, low, high = effect(values)
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def text(cells: pl.DataFrame) -> str:
    rows = []
    for width, critic in product(sorted(cells["width"].unique()), CRITICS):
        here = cells.filter(
            (pl.col("width") == width)
            & (pl.col("prune_critic") == critic)
            & (pl.col("varied") == "density")
        )
        for density in (1.0, 0.1):
            part = here.filter(pl.col("density") == density)
            share = [part[stage].median() / part["wall_s"].median() for stage in STAGES]
            at = DENSITIES.index(density)
            rows.append(
                [
                    f"{width}, {CRITICS[critic]}, {density:.0%} kept",
                    f"{(part['steps'] / part['wall_s']).median():,.0f}",
                    *(f"{value:.0%}" for value in share),
                    *(
                        _ratio(gains(cells, width, critic, stage)[:, at])
                        for stage in ("rollout", "update", "wall_s")
                    ),
                ]
            )
    growing = (
        cells.filter(pl.col("varied") == "tickets")
        .group_by("tickets")
        .agg(speed=(pl.col("steps") / pl.col("wall_s")).median())
    )
    growth = [[f"{tickets}", f"{speed:,.0f}"] for tickets, speed in growing.sort("tickets").rows()]
    return f"""Ratios are dense over pruned within a round: mean over rounds, 95% bootstrap
interval. What stays dense, the critic and the environment, bounds what a sparse actor can save.

{markdown(HEADER, rows)}

Dense policies of width 64, by the number of tickets trained together:

{markdown(["tickets", "agent-steps/s"], growth)}"""


def study(cells: pl.DataFrame) -> str:
    """What all experiments took, what others would, and what a level takes."""
    parts = {kind: cells.filter(pl.col("varied") == kind) for kind in ("peer", "stage", "level")}
    rates = dict(parts["peer"].select("name", "seconds").rows())
    rows, totals = [], np.zeros(3)
    for name, trainings, seconds, steps in (
        parts["stage"].select("name", "trainings", "seconds", "ppo_steps").rows()
    ):
        totals += (trainings, seconds, steps)
        rows.append(_stage(name, trainings, seconds, steps, rates))
    rows.append(_stage("all", totals[0], totals[1], totals[2], rates))
    speeds = ", ".join(f"{1 / seconds:,.0f} ({name})" for name, seconds in rates.items())
    return f"""**The whole study**, by the table that has the cells first: wall time as stored, one
thread on a shared machine, evaluation included, experts not. What others would need is
**extrapolated**: the agent-steps of PPO on CartPole alone, at the rates that `benchmarks` measured
for dense PPO there on {parts["peer"]["hardware"][0]}, in agent-steps/s: {speeds}. JAX is sixty
agents under `vmap`, whose masks save nothing; evaluation is not counted, nor what inputs of noise
and wider networks cost more.

{markdown(STAGES_HEADER, rows)}

A level of 15 tickets of CartPole trains for so many seconds (`{DEEP}`). Beside the dense level's,
levels from the second on take {_saved(parts["level"])}; the first compiled PPO's kernels too.

{markdown(("density", *_LEVEL_NAMES.values()), _levels(parts["level"]))}"""


def _saved(cells: pl.DataFrame) -> str:
    """By how much pruned levels are faster than the dense one, on average."""
    found = []
    for algo, name in _LEVEL_NAMES.items():
        seconds = cells.filter(pl.col("algo") == algo).sort("level")["seconds"].to_numpy()
        found.append(f"1/{seconds[0] / seconds[2:].mean():.1f} ({name.partition(',')[0]})")
    return " and ".join(found)


STAGES_HEADER = (
    "table", "trainings", "minutes", "million steps of PPO on CartPole",
    *(f"{name}, hours (extrapolated)" for name in PEERS.values()),
)  # fmt: skip
_LEVEL_NAMES = {"ppo": "PPO, seconds", "bc": "cloning, seconds"}


def _stage(
    name: str, trainings: float, seconds: float, steps: float, rates: dict[str, float]
) -> list[str]:
    return [
        name,
        f"{trainings:,.0f}",
        f"{seconds / 60:,.1f}",
        f"{steps / 1e6:,.0f}",
        *(f"{steps * rates[peer] / 3600:,.1f}" for peer in PEERS.values()),
    ]


def _levels(cells: pl.DataFrame) -> list[list[str]]:
    table = cells.pivot(on="algo", index=["level", "density"], values="seconds").sort("level")
    return [
        [f"{row['density']:.2%}", *(f"{row[algo]:.1f}" for algo in _LEVEL_NAMES)]
        for row in table.iter_rows(named=True)
    ]


def draw(cells: pl.DataFrame) -> Figure:
    x = 100 * np.array(DENSITIES)
    panels = {
        title: [
            Line(f"width {width}", x, gains(cells, width, critic))
            for width in sorted(cells["width"].unique())
        ]
        for critic, title in CRITICS.items()
    }
    return line_figure(
        panels,
        "What sparsity alone saves in a PPO iteration",
        f"{cells['round'].max()} rounds in turn, mean and 95% interval",
        "density",
        "dense over pruned,\ntime of an iteration",
        ratios=True,
    )


EXPERIMENT = Experiment(
    name="cost",
    question="What does sparsity alone save?",
    claim="90% sparsity gains PPO 1.3x, since acting and the critic stay dense (our own statement)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
