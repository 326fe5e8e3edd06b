"""Do the trainers learn, dense? Five seeds a task, each held to the task's gate.

    python -m experiments.gates sac [Pendulum-v1 ...]

Settings are the protocol's, but of slow tasks their `BUDGETS`; returns are greedy, means of 100
fresh episodes of the final weights. A gate holds for each seed. The seeds' rows go to
``results/gates.parquet``, in place of those that the algorithm had on the task before.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.registry import find_algorithm
from sparse_tickets.imp import dense_population
from sparse_tickets.provenance import commit, processor
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Track

__all__ = ["GATES", "RESULTS", "main", "run"]

RESULTS = Path(__file__).parent / "results" / "gates.parquet"
SEEDS = 5
GATES = {
    "dqn": {
        "CartPole-v1": 475.0,
        "Acrobot-v1": -100.0,
        "MountainCar-v0": -120.0,
        "LunarLander-v3": 150.0,  # rl-zoo3 reports 154 +- 79
    },
    "sac": {"Pendulum-v1": -200.0},
    "ppo": {"Hopper-v5": 1000.0},  # what standing for a whole episode pays
}
BUDGETS = {("ppo", "Hopper-v5"): 499_712}
"""Steps, where they are fewer than the protocol's."""


def run(algo: str, env: str, gate: float, seeds: int = SEEDS) -> pl.DataFrame:
    """A row for each dense seed, trained together."""
    spec = protocol(env)
    settings, budget = spec.settings_of(algo), spec.ppo
    if (algo, env) in BUDGETS:
        settings = budget = replace(settings, steps=BUDGETS[algo, env])
    key = [spec.key(algo, Track(seed, "dense", "shared"), 0) for seed in range(seeds)]
    initial_key = torch.tensor([spec.initial_key(seed) for seed in range(seeds)])
    population = dense_population(spec.arena(algo), initial_key, spec.init, spec.log_std)
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
            "seed": range(seeds),
            "hidden": [list(spec.hidden)] * seeds,
            "activation": spec.activation,
            "gate": gate,
            "return_final": result.return_final.tolist(),
            "return_best": result.return_best.tolist(),
            "curve": result.curve.tolist(),
            "train_steps": result.train_steps,
            "wall_s": result.wall_s,
            "commit": commit(),
            "processor": processor(),
        }
    )


def main(arguments: list[str]) -> int:
    """0 if every seed of every task reaches its gate."""
    if not arguments or arguments[0] not in GATES:
        raise ValueError(f"the algorithm must be one of {', '.join(GATES)}, got {arguments[:1]}")
    algo, *names = arguments
    unknown = set(names) - GATES[algo].keys()
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(GATES[algo])}, got {', '.join(unknown)}")
    failed = 0
    for env in names or GATES[algo]:
        rows = run(algo, env, GATES[algo][env])
        passed = rows.filter(pl.col("return_final") >= pl.col("gate")).height
        failed += rows.height - passed
        returns = ", ".join(f"{value:.1f}" for value in rows["return_final"])
        print(f"{algo} on {env}: {returns}; {passed} of {rows.height} reach {GATES[algo][env]:g}")
        if RESULTS.exists():
            same = (pl.col("algo") == algo) & (pl.col("env") == env)
            rows = pl.concat([pl.read_parquet(RESULTS).filter(~same), rows])
        rows.write_parquet(RESULTS)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
