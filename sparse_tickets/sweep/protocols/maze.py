"""The maze: larger batches, a larger learning rate and more exploration than CleanRL's PPO has."""

from __future__ import annotations

from typing import Any

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.ppo import PPO

__all__ = ["ENV", "SETTINGS"]

ENV = "sparse_tickets/Maze-v0"
SETTINGS: dict[str, Any] = {
    "ppo": PPO(
        steps=500_000,
        copies=16,
        horizon=64,
        learning_rate=7e-4,
        clip_value=False,
        entropy_coef=0.02,
    ),
    # Of 196 inputs each, an expert's transitions are 392 MB.
    "bc": BC(experts=3),
}
