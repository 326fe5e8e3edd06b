"""The maze: larger batches, a larger learning rate and more exploration than CleanRL's PPO has."""

from __future__ import annotations

from typing import Any

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.ppo import PPO

__all__ = ["ENV", "SETTINGS"]

ENV = "sparse_tickets/Maze-v0"
SETTINGS: dict[str, Any] = {
    "activation": "relu",
    "ppo": PPO(
        steps=500_000,
        copies=16,
        horizon=64,
        learning_rate=7e-4,
        clip_value=False,
        # With 0.02 some seeds never learn to pass the enemy.
        entropy_coef=0.05,
    ),
    "dqn": DQN(
        steps=200_000,
        copies=4,
        horizon=16,
        updates=16,
        learning_rate=1e-3,
        warmup=2_000,
        target_interval=512,
        exploration=0.3,
        epsilon=0.02,
        double=True,
        n_step=3,
    ),
    # Of 196 inputs each, an expert's transitions are 392 MB.
    "bc": BC(experts=3),
}
