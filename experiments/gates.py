"""Do the trainers learn, dense? Some seeds of a task, each held to the task's gate.

    python -m experiments.gates dqn MountainCar-v0 [--seeds 5] [--first-seed 5] [--loss squared]

Settings are the protocol's, but of slow tasks their `BUDGETS`; returns are greedy, means of 100
fresh episodes of the final weights. A gate holds for each seed. Rows go to
``results/gates.parquet``, in place of those that the same seeds had by the same settings.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import torch

from sparse_tickets import Sweep, load_results, run_sweep
from sparse_tickets.algos.evaluation import Evaluation, on_evaluation
from sparse_tickets.algos.registry import find_algorithm
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.envs.maze import MAZE
from sparse_tickets.imp import dense_population
from sparse_tickets.provenance import commit, processor
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Track

__all__ = ["GATES", "RESULTS", "main", "run"]

RESULTS = Path(__file__).parent / "results" / "gates.parquet"
GATES = {
    "dqn": {
        "CartPole-v1": 475.0,
        "Acrobot-v1": -100.0,
        "MountainCar-v0": -120.0,
        "LunarLander-v3": 150.0,  # rl-zoo3 reports 154 +- 79
        MAZE: 0.9,  # the best policy's is 0.945
    },
    # Hopper: what standing for a whole episode pays.
    "sac": {"Pendulum-v1": -200.0, "Hopper-v5": 1000.0},
    "ppo": {"Hopper-v5": 1000.0, MAZE: 0.9},
    "bc": {MAZE: 0.9},
}
BUDGETS = {("ppo", "Hopper-v5"): 499_712, ("sac", "Hopper-v5"): 200_000}
"""Steps, where they are fewer than the protocol's."""
KEY = ("algo", "env", "seed", "loss")
"""What a stored row is of: a new one takes its place."""


def run(algo: str, env: str, seeds: range, loss: str | None = None) -> pl.DataFrame:
    """A row for each dense seed, trained together; ``loss``: DQN's, if not the protocol's."""
    spec = protocol(env)
    if find_algorithm(algo).imitates:
        seeded = replace(spec, first_seed=seeds.start, seeds=len(seeds))
        return _cloned(replace(seeded, algos=(algo,), levels=1))
    settings, budget = spec.settings_of(algo), spec.ppo
    if (algo, env) in BUDGETS:
        settings = budget = replace(settings, steps=BUDGETS[algo, env])
    if loss is not None:
        settings = replace(settings, loss=loss)
    key = [spec.key(algo, Track(seed, "dense", "shared"), 0) for seed in seeds]
    initial_key = torch.tensor([spec.initial_key(seed) for seed in seeds])
    population = dense_population(spec.arena(algo), initial_key, spec.init, spec.log_std)
    with on_evaluation(lambda at, greedy, sampled: print(at, greedy.tolist(), flush=True)):
        result = find_algorithm(algo).train(
            settings,
            budget,
            env,
            population,
            torch.tensor(key),
            None,
            {"evaluation": Evaluation(points=10)},
        )
    return pl.DataFrame(
        {
            "algo": algo,
            "env": env,
            "seed": seeds,
            "loss": getattr(settings, "loss", None),
            "hidden": [list(spec.hidden)] * len(seeds),
            "activation": spec.activation,
            "gate": GATES[algo][env],
            "return_final": result.return_final.tolist(),
            "return_best": result.return_best.tolist(),
            "curve": result.curve.tolist(),
            "train_steps": result.train_steps,
            "wall_s": result.wall_s,
            "commit": commit(),
            "processor": processor(),
        },
        schema_overrides={"loss": pl.String},
    )


def _cloned(spec: Sweep) -> pl.DataFrame:
    """Rows of students of a sweep's experts, which are held to the task's gate too."""
    (algo,) = spec.algos
    with TemporaryDirectory() as folder:
        run_sweep(spec, folder)
        cells = load_results(folder)
    return cells.select(
        "algo",
        "env",
        "seed",
        pl.lit(None, dtype=pl.String).alias("loss"),
        pl.lit(list(spec.hidden)).alias("hidden"),
        pl.lit(spec.activation).alias("activation"),
        pl.lit(GATES[algo][spec.env]).alias("gate"),
        "return_final",
        "return_best",
        "curve",
        pl.col("train_steps").cast(pl.Int32),
        pl.col("wall_s").sum().alias("wall_s"),
        "commit",
        "processor",
    )


def main(arguments: list[str]) -> int:
    """0 if every seed of every task reaches its gate."""
    options = _parser().parse_args(arguments)
    algo, gates = options.algo, GATES[options.algo]
    unknown = set(options.tasks) - gates.keys()
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(gates)}, got {', '.join(unknown)}")
    if options.loss is not None and algo != "dqn":
        raise ValueError(f"loss is for dqn alone, got {options.loss} for {algo}")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    failed = 0
    for env in options.tasks or gates:
        rows = run(algo, env, seeds, options.loss)
        passed = rows.filter(pl.col("return_final") >= pl.col("gate")).height
        failed += rows.height - passed
        returns = ", ".join(f"{value:.4g}" for value in rows["return_final"])
        print(f"{algo} on {env}: {returns}; {passed} of {rows.height} reach {gates[env]:g}")
        if RESULTS.exists():
            kept = pl.read_parquet(RESULTS)
            new = set(rows.select(KEY).rows())
            kept = kept.filter([each not in new for each in kept.select(KEY).rows()])
            rows = pl.concat([kept, rows])
        write_parquet(RESULTS, rows)
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("experiments.gates", description=__doc__.split("\n")[0])
    parser.add_argument("algo", choices=GATES)
    parser.add_argument("tasks", nargs="*", help="default: all that have a gate")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first")
    parser.add_argument("--loss", help="dqn's; default: the protocol's")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
