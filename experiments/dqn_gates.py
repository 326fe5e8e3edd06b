"""Does dense DQN learn? Five seeds by the protocol's settings, each held to its task's gate.

    python -m experiments.dqn_gates [CartPole-v1 ...]

Greedy returns, means of 100 fresh episodes of the final weights. A gate holds for each seed.
"""

from __future__ import annotations

import sys

import torch

from sparse_tickets.algos import dqn
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.imp import dense_population
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Track

__all__ = ["GATES", "main"]

GATES = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "MountainCar-v0": -120.0}
SEEDS = 5


def main(names: list[str]) -> int:
    """0 if every seed of every task reaches its gate."""
    unknown = set(names) - GATES.keys()
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(GATES)}, got {', '.join(unknown)}")
    failed = 0
    for name in names or GATES:
        spec = protocol(name)
        tracks = [Track(seed, "dense", "shared") for seed in range(SEEDS)]
        key = torch.tensor([spec.key("dqn", track, 0) for track in tracks])
        initial_key = torch.tensor([spec.initial_key(seed) for seed in range(SEEDS)])
        population = dense_population(spec.arena("dqn"), initial_key, spec.init)
        result = dqn.train(spec.dqn, name, population, key, evaluation=Evaluation(points=10))
        passed = result.return_final >= GATES[name]
        failed += int((~passed).sum())
        returns = ", ".join(f"{value:.1f}" for value in result.return_final.tolist())
        curve = ", ".join(f"{value:.0f}" for value in result.curve.median(0).values.tolist())
        print(f"{name}: {returns}; gate {GATES[name]:g} holds for {int(passed.sum())} of {SEEDS}")
        print(f"  median in training: {curve}; {result.train_steps:,} steps, {result.wall_s:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
