"""What the protocols of several environments have in common."""

from __future__ import annotations

from typing import Any

from sparse_tickets.algos.ppo import PPO

__all__ = ["SB3", "SLOW"]

# rl-zoo3's tuned hyper-parameters are those of Stable-Baselines3, whose value loss has no factor
# 1/2: its value_coef of 0.5 is 1 here.
SB3 = PPO(learning_rate=3e-4, clip_value=False, value_coef=1.0, entropy_coef=0.0)
# Box2D and MuJoCo are slow to simulate: fewer seeds, conditions and levels, a larger rate.
SLOW: dict[str, Any] = {
    "seeds": 5,
    "conditions": ("mask/weights", "mask/permuted", "permuted/permuted"),
    "levels": 10,
    "rate": 0.33,
}
