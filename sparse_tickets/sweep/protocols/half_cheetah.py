"""HalfCheetah by rl-zoo3's tuned PPO, and SAC as it trains MuJoCo's tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3, SLOW, ZOO_SAC

__all__ = ["ENV", "SETTINGS"]

ENV = "HalfCheetah-v5"
SETTINGS: dict[str, Any] = {
    **SLOW,
    "hidden": (256, 256),
    "activation": "relu",
    "log_std": -2.0,
    "ppo": replace(
        SB3,
        steps=1_000_000,
        copies=1,
        horizon=512,
        epochs=20,
        minibatches=8,
        learning_rate=2.06e-5,
        gamma=0.98,
        lam=0.92,
        clip=0.1,
        entropy_coef=0.000401762,
        value_coef=2 * 0.58096,
        max_norm=0.8,
    ),
    "sac": ZOO_SAC,
}
