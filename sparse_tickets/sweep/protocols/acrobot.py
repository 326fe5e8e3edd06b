"""Acrobot by rl-zoo3's tuned PPO, for half its steps, and DQN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3, ZOO_DQN

__all__ = ["ENV", "SETTINGS"]

ENV = "Acrobot-v1"
SETTINGS: dict[str, Any] = {
    "ppo": replace(SB3, copies=16, horizon=256, minibatches=64, lam=0.94),
    "dqn": ZOO_DQN,
}
