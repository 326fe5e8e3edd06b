"""Do dense policies learn as CleanRL's own scripts make them learn?

PPO by the same settings and initialisation, and from the initialisation used elsewhere here; DQN by
the same settings, schedules and initialisation, with the script's loss and with Huber's. The
scripts' side is stored by `cleanrl_scripts.py`::

    python -m experiments.cleanrl [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.drawing import Line, line_figure
from experiments.frame import RESULTS, Experiment, Finding, Place, main, markdown, signed
from experiments.sweeps import quickly
from experiments.training import train
from sparse_tickets import Sweep
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.random import Stream, uniform
from sparse_tickets.population import initialise
from sparse_tickets.sweep.protocols import protocol

SEEDS = 5
THEIRS, HUBER = "CleanRL's script", "the script with Huber's loss"
SAME, LECUN, SAME_HUBER = "ours", "ours, LeCun", "ours with Huber's loss"
PAIRS = ((SAME, THEIRS), (LECUN, THEIRS), (SAME_HUBER, HUBER))
TITLES = {"ppo": "PPO", "dqn": "DQN"}
RESAMPLES = 10_000


class AsScripted(DQN):
    """Our DQN by the script's schedules: a constant rate, epsilon falls from the first step on."""

    def learning_rate_at(self, iteration: int) -> float:
        return self.learning_rate

    def epsilon_at(self, iteration: int) -> float:
        share = min(iteration * self.batch / (self.exploration * self.steps), 1.0)
        return 1.0 + share * (self.epsilon - 1.0)


def like_torch(arena: Arena, key: Tensor) -> Tensor:
    """Initial weights ``[P, size]`` as `torch.nn.Linear`'s: uniform, biases too."""
    weight = 2 * uniform(key, arena.size, stream=Stream.INIT, step=0) - 1
    for matrix, bias in arena.actor.layers(weight):
        for part in (matrix, bias):
            part.mul_(matrix.shape[-1] ** -0.5)
    return weight


def specs(quick: bool) -> Iterator[tuple[str, str, str, Sweep]]:
    """Algorithm, name, initialisation and settings of what is trained here."""
    spec = replace(
        protocol("CartPole-v1"),
        seeds=SEEDS,
        evaluation=Evaluation(points=20, episodes=32, final_episodes=100),
    )
    spec = replace(spec, ppo=replace(spec.ppo, steps=100_000))
    dqn = AsScripted(
        steps=100_000,
        copies=1,
        horizon=10,
        updates=1,
        minibatch=128,
        capacity=10_000,
        warmup=10_000,
        learning_rate=2.5e-4,
        target_interval=500,
        exploration=0.5,
        epsilon=0.05,
        loss="squared",
        max_norm=1e9,  # none
    )
    network = replace(spec, algos=("dqn",), hidden=(120, 84), activation="relu", dqn=dqn)
    for algo, name, start, each in (
        ("ppo", SAME, "orthogonal", replace(spec, init="orthogonal")),
        ("ppo", LECUN, "lecun", spec),
        ("dqn", SAME, "torch", network),
        ("dqn", SAME_HUBER, "torch", replace(network, dqn=replace(dqn, loss="huber"))),
    ):
        yield algo, name, start, quickly(each) if quick else each


def collect(place: Place) -> pl.DataFrame:
    scripts = pl.read_parquet(RESULTS / "cleanrl_scripts.parquet")
    plain = pl.col("change") == ""
    found = [scripts.with_columns(who=pl.when(plain).then(pl.lit(THEIRS)).otherwise(pl.lit(HUBER)))]
    for algo, name, start, spec in specs(place.quick):
        cells = place.once(
            f"cleanrl-{algo}-{start}", (algo, spec), partial(dense, algo, start, spec)
        )
        found.append(cells.with_columns(who=pl.lit(name)))
    return pl.concat(found, how="diagonal")


def dense(algo: str, start: str, spec: Sweep) -> pl.DataFrame:
    arena, seeds = spec.arena(algo), list(range(spec.seeds))
    keys = torch.tensor([spec.initial_key(seed) for seed in seeds])
    if start == "torch":
        initial = like_torch(arena, keys)
    else:
        initial = initialise(arena, keys, start, spec.log_std)
    mask = torch.ones(len(seeds), arena.prunable, dtype=torch.bool)
    return train(spec, None, algo, 0, mask, initial, seeds, f"cleanrl {start}")


def who(cells: pl.DataFrame, algo: str) -> list[str]:
    there = set(cells.filter(pl.col("algo") == algo)["who"])
    return [name for name in (THEIRS, HUBER, SAME, LECUN, SAME_HUBER) if name in there]


def finals(cells: pl.DataFrame, algo: str, name: str, metric: str) -> np.ndarray:
    rows = cells.filter((pl.col("algo") == algo) & (pl.col("who") == name))
    return rows.sort("seed")[metric].to_numpy()


def curves(cells: pl.DataFrame, algo: str, name: str) -> np.ndarray:
    """``[seeds, windows]``: the return in each window of the training.

    The scripts' are means of the episodes that end there. Ours lie between the evaluations at its
    two ends: by sampled actions for PPO, which acts so, by greedy ones for DQN.
    """
    rows = cells.filter((pl.col("algo") == algo) & (pl.col("who") == name)).sort("seed")
    if name in (THEIRS, HUBER):
        return np.array(rows["curve"].to_list())
    begin, points = {
        "ppo": ("return_initial_sampled", "curve_sampled"), "dqn": ("return_initial", "curve"),
    }[algo]  # fmt: skip
    at = np.hstack([rows[begin].to_numpy()[:, None], np.array(rows[points].to_list())])
    return (at[:, 1:] + at[:, :-1]) / 2


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Of the means of two groups of seeds, with its 95% bootstrap interval."""
    draw = np.random.default_rng(0)
    means = [
        group[draw.integers(len(group), size=(RESAMPLES, len(group)))].mean(1)
        for group in (ours, theirs)
    ]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return float(ours.mean() - theirs.mean()), float(low), float(high)


def permutation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact p of the difference of means: how many splits of all seeds are as far apart."""
    both = np.concatenate([ours, theirs])
    seen = abs(ours.mean() - theirs.mean())
    splits = np.array(list(combinations(range(len(both)), len(ours))))
    first = both[splits].sum(1)
    apart = np.abs(first / len(ours) - (both.sum() - first) / len(theirs))
    return float((apart >= seen - 1e-9).mean())


@dataclass(frozen=True)
class GroupComparison:
    """Of two groups of seeds.

    Attributes:
        algo: the algorithm.
        name: who of ours.
        script: who of theirs.
        word: which return.
        ours: ``[seeds]``.
        theirs: ``[seeds]``.
    """

    algo: str
    name: str
    script: str
    word: str
    ours: np.ndarray
    theirs: np.ndarray


def comparisons(cells: pl.DataFrame) -> Iterator[GroupComparison]:
    for algo in TITLES:
        there = who(cells, algo)
        for name, script in PAIRS:
            if not {name, script} <= set(there):
                continue
            if algo == "ppo":
                values = (curves(cells, algo, each).mean(1) for each in (name, script))
                yield GroupComparison(algo, name, script, "learning curve", *values)
            for metric, word in (
                ("return_final", "final, greedy"),
                ("return_final_sampled", "final, sampled"),
            ):
                values = (finals(cells, algo, each, metric) for each in (name, script))
                yield GroupComparison(algo, name, script, word, *values)


def conclude(cells: pl.DataFrame) -> Finding:
    same = [each for each in comparisons(cells) if (each.name, each.script) == (SAME, THEIRS)]
    shown = [
        f"{TITLES[each.algo]}, {each.word} {signed(*difference(each.ours, each.theirs), digits=0)}"
        for each in same
    ]
    told = []
    for algo, title in TITLES.items():
        apart = [
            f"{each.word} {'higher' if each.ours.mean() > each.theirs.mean() else 'lower'}"
            for each in same
            if each.algo == algo and permutation(each.ours, each.theirs) < 0.05
        ]
        told.append(f"{title}: {', '.join(apart) or 'not told apart'}")
    seeds = cells.group_by("who", "algo").len()["len"].min()
    return Finding(
        ran=f"{cells['env'][0]}, dense PPO and DQN, {seeds} seeds each, "
        f"{cells['train_steps'].max():,} steps, beside CleanRL's ppo.py and dqn.py at commit "
        f"{cells['cleanrl'].drop_nulls()[0][:7]} (cut: 20% of the scripts' steps, {seeds} of 15 "
        "seeds, no Acrobot)",
        effect=f"ours minus the script's return: {'; '.join(shown)}",
        verdict="; ".join(told),
        text=text(cells),
        figures={"cleanrl": partial(draw, cells)},
    )


def text(cells: pl.DataFrame) -> str:
    rows = [
        [
            f"{TITLES[each.algo]}, {each.word}, {each.name} minus {each.script}",
            f"{each.theirs.mean():.0f}",
            f"{each.ours.mean():.0f}",
            signed(*difference(each.ours, each.theirs), digits=0),
            f"{permutation(each.ours, each.theirs):.2f}",
        ]
        for each in comparisons(cells)
    ]
    versions = cells["versions"].drop_nulls()[0]
    return f"""The scripts ran as they are, with their defaults but for the number of steps
({versions}). Seeds are not paired: differences of means with bootstrap intervals, p by exact
permutation. The scripts' curves are means of the episodes that end in a twentieth of the training,
ours lie between evaluations at its ends.

PPO has the script's settings and initialisation; "LeCun" is what tickets here start from. Our DQN
has the script's settings, loss (or Huber's, where the script has it), schedules and initialisation:
unlike DQN elsewhere here, a constant rate, no clipping, no steps that are random altogether. It
copies its target just before an update where the script does so just after. Its curve is greedy,
while the script's episodes act at random in 5% of the steps at the end and in more before, so that
only final returns are compared.

""" + markdown(["algorithm, return, policies", "script", "ours", "difference", "p"], rows)


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for algo, title in TITLES.items():
        lines = []
        for name in who(cells, algo):
            values = curves(cells, algo, name)
            steps = cells.filter(pl.col("algo") == algo)["train_steps"].max() / 1000
            middle = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
            lines.append(Line(name, steps * middle, values))
        panels[title] = lines
    return line_figure(
        panels,
        f"{cells['env'][0]}: dense policies, ours and CleanRL's",
        "mean over seeds, 95% interval; DQN: ours greedy, CleanRL's as it explores",
        "thousand steps",
        "return",
        scale="linear",
    )


EXPERIMENT = Experiment(
    name="cleanrl",
    question="Do dense policies learn as CleanRL's do?",
    claim="Our dense PPO and DQN learn as CleanRL's own scripts do (our own premise)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
