"""What the protocols of several environments have in common."""

from __future__ import annotations

from typing import Any

from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.sac import SAC

__all__ = ["SB3", "SLOW", "ZOO_DQN", "ZOO_SAC"]

# rl-zoo3's tuned hyper-parameters are those of Stable-Baselines3, whose value loss has no factor
# 1/2: its value_coef of 0.5 is 1 here.
SB3 = PPO(learning_rate=3e-4, clip_value=False, value_coef=1.0, entropy_coef=0.0)
# rl-zoo3's DQN for Acrobot and LunarLander: as many updates as steps.
ZOO_DQN = DQN(
    steps=100_000,
    copies=4,
    horizon=1,
    updates=4,
    minibatch=128,
    capacity=50_000,
    warmup=0,
    learning_rate=6.3e-4,
    target_interval=250,
    exploration=0.12,
    epsilon=0.1,
)
# rl-zoo3's SAC for MuJoCo: Stable-Baselines3's, after 10,000 random steps.
ZOO_SAC = SAC(steps=1_000_000, copies=1, horizon=8, warmup=10_000, learning_rate=3e-4)
# Box2D and MuJoCo are slow to simulate: fewer seeds, conditions and levels, a larger rate.
SLOW: dict[str, Any] = {
    "seeds": 5,
    "conditions": ("mask/weights", "mask/permuted", "permuted/permuted"),
    "levels": 10,
    "rate": 0.33,
}
