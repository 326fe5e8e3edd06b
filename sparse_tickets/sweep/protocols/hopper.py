"""Hopper by rl-zoo3's tuned PPO, and SAC as it trains MuJoCo's tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3, SLOW, ZOO_SAC

__all__ = ["ENV", "SETTINGS"]

ENV = "Hopper-v5"
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
        epochs=5,
        minibatches=16,
        learning_rate=9.80828e-5,
        gamma=0.999,
        lam=0.99,
        entropy_coef=0.00229519,
        value_coef=2 * 0.835671,
        max_norm=0.7,
    ),
    "sac": ZOO_SAC,
}
