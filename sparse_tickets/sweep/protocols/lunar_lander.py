"""LunarLander by rl-zoo3's tuned PPO and DQN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3, SLOW, ZOO_DQN

__all__ = ["ENV", "SETTINGS"]

ENV = "LunarLander-v3"
SETTINGS: dict[str, Any] = {
    **SLOW,
    "dqn": ZOO_DQN,
    "ppo": replace(
        SB3,
        steps=1_000_000,
        copies=16,
        horizon=1024,
        minibatches=256,
        gamma=0.999,
        lam=0.98,
        entropy_coef=0.01,
    ),
}
