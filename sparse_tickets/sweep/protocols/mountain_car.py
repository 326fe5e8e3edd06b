"""MountainCar by rl-zoo3's tuned PPO, and its DQN with three rewards added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.algos.dqn import DQN
from sparse_tickets.sweep.protocols.shared import SB3

__all__ = ["ENV", "SETTINGS"]

ENV = "MountainCar-v0"
SETTINGS: dict[str, Any] = {
    "ppo": replace(SB3, steps=1_000_000, copies=16, horizon=16, minibatches=4, lam=0.98),
    "dqn": DQN(
        steps=120_000,
        copies=4,
        horizon=4,
        updates=8,
        minibatch=128,
        capacity=10_000,
        learning_rate=4e-3,
        gamma=0.98,
        target_interval=600,
        exploration=0.2,
        epsilon=0.07,
        # Every step costs the same until the goal: what is near it is learnt three times sooner.
        n_step=3,
    ),
}
