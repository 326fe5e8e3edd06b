"""Do dense policies learn as CleanRL's own scripts make them learn?

PPO by the same settings and initialisation on two tasks, and from the initialisation used elsewhere
here; DQN by the same settings, schedules and initialisation, with the script's loss and with
Huber's. The scripts' side is stored by `cleanrl_scripts.py`, ours has as many seeds::

    python -m experiments.cleanrl [--quick]
"""

from __future__ import annotations

import math
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
from experiments.sweeps import SEEDS, quickly
from experiments.training import train
from sparse_tickets import Sweep
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.envs import ClassicEnv, env_spec, register_env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.random import Stream, uniform
from sparse_tickets.population import initialise
from sparse_tickets.sweep.protocols import protocol

CARTPOLE, ACROBOT = "CartPole-v1", "Acrobot-v1"
RAW = f"{ACROBOT} raw"
"""Acrobot with observations as they come, as the scripts see them."""
register_env(RAW, partial(ClassicEnv, ACROBOT), replace(env_spec(ACROBOT).raw(), name=RAW))
THEIRS, HUBER = "CleanRL's script", "the script with Huber's loss"
SAME, LECUN, SAME_HUBER = "ours", "ours, LeCun", "ours with Huber's loss"
PAIRS = ((SAME, THEIRS), (LECUN, THEIRS), (SAME_HUBER, HUBER))
Contest = tuple[str, str]
TITLES: dict[Contest, str] = {
    (CARTPOLE, "ppo"): "PPO",
    (ACROBOT, "ppo"): "PPO on Acrobot",
    (CARTPOLE, "dqn"): "DQN",
}
"""By task and algorithm."""
SCRIPTED_STEPS = 500_000
"""Steps that the scripts take by default."""
RESAMPLES = 10_000
SPLITS = 100_000
"""Most splits of all seeds that a p is counted over; of more, so many are drawn."""


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


def specs(scripts: pl.DataFrame, quick: bool) -> Iterator[tuple[Contest, str, str, Sweep]]:
    """Task and algorithm, name, initialisation and settings of what is trained here."""
    spec = replace(
        protocol(CARTPOLE),
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
    for contest, name, start, change, each in (
        ((CARTPOLE, "ppo"), SAME, "orthogonal", "", replace(spec, init="orthogonal")),
        ((CARTPOLE, "ppo"), LECUN, "lecun", "", spec),
        ((ACROBOT, "ppo"), SAME, "orthogonal", "", replace(spec, env=RAW, init="orthogonal")),
        ((CARTPOLE, "dqn"), SAME, "torch", "", network),
        (
            (CARTPOLE, "dqn"),
            SAME_HUBER,
            "torch",
            "Huber loss",
            replace(network, dqn=replace(dqn, loss="huber")),
        ),
    ):
        env, algo = contest
        seeds = len(scripts.filter(env=env, algo=algo, change=change))
        if seeds:
            own = replace(each, seeds=seeds)
            yield contest, name, start, quickly(own) if quick else own


def collect(place: Place) -> pl.DataFrame:
    scripts = pl.read_parquet(RESULTS / "cleanrl_scripts.parquet")
    plain = pl.col("change") == ""
    found = [scripts.with_columns(who=pl.when(plain).then(pl.lit(THEIRS)).otherwise(pl.lit(HUBER)))]
    for (env, algo), name, start, spec in specs(scripts, place.quick):
        task = "" if spec.env == CARTPOLE else "-acrobot"
        cells = place.once(
            f"cleanrl-{algo}-{start}{task}", (algo, spec), partial(dense, algo, start, spec)
        )
        found.append(cells.with_columns(who=pl.lit(name), env=pl.lit(env)))
    return pl.concat(found, how="diagonal")


def dense(algo: str, start: str, spec: Sweep) -> pl.DataFrame:
    arena, seeds = spec.arena(algo), list(range(spec.seeds))
    keys = torch.tensor([spec.initial_key(seed) for seed in seeds])
    if start == "torch":
        initial = like_torch(arena, keys)
    else:
        initial = initialise(arena, keys, start, spec.log_std)
    mask = torch.ones(len(seeds), arena.prunable, dtype=torch.bool)
    return train(spec, None, algo, 0, mask, initial, seeds, f"cleanrl {start}").rows


def of(cells: pl.DataFrame, contest: Contest) -> pl.DataFrame:
    env, algo = contest
    return cells.filter((pl.col("env") == env) & (pl.col("algo") == algo))


def contests(cells: pl.DataFrame) -> dict[Contest, str]:
    """Those that were run, with their titles."""
    return {each: title for each, title in TITLES.items() if len(of(cells, each))}


def who(cells: pl.DataFrame, contest: Contest) -> list[str]:
    there = set(of(cells, contest)["who"])
    return [name for name in (THEIRS, HUBER, SAME, LECUN, SAME_HUBER) if name in there]


def finals(cells: pl.DataFrame, contest: Contest, name: str, metric: str) -> np.ndarray:
    return of(cells, contest).filter(pl.col("who") == name).sort("seed")[metric].to_numpy()


def curves(cells: pl.DataFrame, contest: Contest, name: str) -> np.ndarray:
    """``[seeds, windows]``: the return in each window of the training.

    The scripts' are means of the episodes that end there. Ours lie between the evaluations at its
    two ends: by sampled actions for PPO, which acts so, by greedy ones for DQN.
    """
    rows = of(cells, contest).filter(pl.col("who") == name).sort("seed")
    if name in (THEIRS, HUBER):
        return np.array(rows["curve"].to_list())
    begin, points = {
        "ppo": ("return_initial_sampled", "curve_sampled"), "dqn": ("return_initial", "curve"),
    }[contest[1]]  # fmt: skip
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
    """p of the difference of means: the share of splits of all seeds that are as far apart."""
    both = np.concatenate([ours, theirs])
    seen, count = abs(ours.mean() - theirs.mean()), len(ours)
    if math.comb(len(both), count) <= SPLITS:
        first = both[np.array(list(combinations(range(len(both)), count)))].sum(1)
        drawn = 0
    else:
        first = np.random.default_rng(0).permuted(np.tile(both, (SPLITS, 1)), axis=1)
        first, drawn = first[:, :count].sum(1), 1
    apart = np.abs(first / count - (both.sum() - first) / len(theirs)) >= seen - 1e-9
    # What was seen is a split, too.
    return float((apart.sum() + drawn) / (len(apart) + drawn))


@dataclass(frozen=True)
class GroupComparison:
    """Of two groups of seeds.

    Attributes:
        contest: task and algorithm.
        name: who of ours.
        script: who of theirs.
        word: which return.
        ours: ``[seeds]``.
        theirs: ``[seeds]``.
    """

    contest: Contest
    name: str
    script: str
    word: str
    ours: np.ndarray
    theirs: np.ndarray


def comparisons(cells: pl.DataFrame) -> Iterator[GroupComparison]:
    for contest in contests(cells):
        there = who(cells, contest)
        for name, script in PAIRS:
            if not {name, script} <= set(there):
                continue
            if contest[1] == "ppo":
                values = (curves(cells, contest, each).mean(1) for each in (name, script))
                yield GroupComparison(contest, name, script, "learning curve", *values)
            for metric, word in (
                ("return_final", "final, greedy"),
                ("return_final_sampled", "final, sampled"),
            ):
                values = (finals(cells, contest, each, metric) for each in (name, script))
                yield GroupComparison(contest, name, script, word, *values)


def conclude(cells: pl.DataFrame) -> Finding:
    same = [each for each in comparisons(cells) if (each.name, each.script) == (SAME, THEIRS)]
    shown = [
        f"{TITLES[each.contest]}, {each.word} "
        f"{signed(*difference(each.ours, each.theirs), digits=0)}"
        for each in same
    ]
    told = []
    for contest, title in contests(cells).items():
        apart = [
            f"{each.word} {'higher' if each.ours.mean() > each.theirs.mean() else 'lower'}"
            for each in same
            if each.contest == contest and permutation(each.ours, each.theirs) < 0.05
        ]
        told.append(f"{title}: {', '.join(apart) or 'not told apart'}")
    return Finding(
        ran=f"{CARTPOLE}, dense policies of {_seeds(cells)}, "
        f"{cells['train_steps'].max():,} steps, beside CleanRL's ppo.py and dqn.py at commit "
        f"{cells['cleanrl'].drop_nulls()[0][:7]} (cut: {', '.join(_cuts(cells))})",
        effect=f"ours minus the script's return: {'; '.join(shown)}",
        verdict="; ".join(told),
        text=text(cells),
        figures={"cleanrl": partial(draw, cells)},
    )


def _seeds(cells: pl.DataFrame) -> str:
    found = []
    for contest, title in contests(cells).items():
        as_it_is = of(cells, contest).filter(~pl.col("who").is_in([HUBER, SAME_HUBER]))
        counts = as_it_is.group_by("who").len()["len"].unique().sort().to_list()
        found.append(f"{title}, {' to '.join(map(str, counts))} seeds")
    return ", ".join(found)


def _cuts(cells: pl.DataFrame) -> list[str]:
    """Of the steps that the scripts take by default, and of the protocol's seeds."""
    found = [f"{cells['train_steps'].max() / SCRIPTED_STEPS:.0%} of the scripts' steps"]
    for name, word in ((THEIRS, "{}"), (HUBER, "{} with Huber's loss")):
        for contest, title in contests(cells).items():
            seeds = len(of(cells, contest).filter(pl.col("who") == name))
            if 0 < seeds < SEEDS:
                found.append(f"{seeds} of {SEEDS} seeds of {word.format(title)}")
    return found


def text(cells: pl.DataFrame) -> str:
    rows = [
        [
            f"{TITLES[each.contest]}, {each.word}, {each.name} minus {each.script}",
            f"{each.theirs.mean():.0f}",
            f"{each.ours.mean():.0f}",
            signed(*difference(each.ours, each.theirs), digits=0),
            f"{permutation(each.ours, each.theirs):.2f}",
        ]
        for each in comparisons(cells)
    ]
    versions = cells["versions"].drop_nulls()[0]
    return f"""The scripts ran as they are, with their defaults but for the number of steps
({versions}). Seeds are not paired: differences of means with bootstrap intervals, p by
permutation, exact where splits of the seeds are few. The scripts' curves are means of the episodes
that end in a twentieth of the training, ours lie between evaluations at its ends.

PPO has the script's settings and initialisation; "LeCun" is what tickets here start from. Our DQN
has the script's settings, loss (or Huber's, where the script has it), schedules and initialisation:
unlike DQN elsewhere here, a constant rate, no clipping, no steps that are random altogether. It
copies its target just before an update where the script does so just after. Its curve is greedy,
while the script's episodes act at random in 5% of the steps at the end and in more before, so that
only final returns are compared.

""" + markdown(["algorithm, return, policies", "script", "ours", "difference", "p"], rows)


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for contest, title in contests(cells).items():
        lines = []
        for name in who(cells, contest):
            values = curves(cells, contest, name)
            steps = of(cells, contest)["train_steps"].max() / 1000
            middle = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
            lines.append(Line(name, steps * middle, values))
        panels[title] = lines
    return line_figure(
        panels,
        "Dense policies, ours and CleanRL's, on CartPole where no other task is named",
        "mean over seeds, 95% interval; DQN: ours greedy, CleanRL's as it explores",
        "thousand steps",
        "return",
        scale="linear",
        share_y=False,
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
