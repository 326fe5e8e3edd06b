"""Pendulum by rl-zoo3's tuned PPO, without state-dependent exploration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3

__all__ = ["ENV", "SETTINGS"]

ENV = "Pendulum-v1"
SETTINGS: dict[str, Any] = {
    "ppo": replace(
        SB3,
        steps=400_000,
        horizon=1024,
        minibatches=64,
        epochs=10,
        learning_rate=1e-3,
        gamma=0.9,
    )
}
