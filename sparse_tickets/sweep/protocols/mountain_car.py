"""MountainCar by rl-zoo3's tuned PPO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.sweep.protocols.shared import SB3

__all__ = ["ENV", "SETTINGS"]

ENV = "MountainCar-v0"
SETTINGS: dict[str, Any] = {
    "ppo": replace(SB3, steps=1_000_000, copies=16, horizon=16, minibatches=4, lam=0.98)
}
