"""CartPole by CleanRL's PPO; by a DQN of the squared error, whose target follows often."""

from __future__ import annotations

from typing import Any

from sparse_tickets.algos.dqn import DQN

__all__ = ["ENV", "SETTINGS"]

ENV = "CartPole-v1"
SETTINGS: dict[str, Any] = {
    # rl-zoo3's copies the target 195 times: values look no further ahead than so many steps.
    "dqn": DQN(
        steps=100_000,
        horizon=8,
        updates=32,
        learning_rate=1e-3,
        target_interval=64,
        epsilon=0.02,
        double=True,
        # Huber's counts the rare end of an episode for little: it learns later, and not for good.
        loss="squared",
        n_step=3,
    )
}
