"""Generalised advantage estimation as plain torch: the recursion, backwards in time."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    delta = reward + gamma * torch.where(terminated, 0, next_value) - value
    done = terminated | truncated
    advantage = torch.empty_like(reward)
    following = reward.new_zeros(reward.shape[0], reward.shape[2])
    for t in reversed(range(reward.shape[1])):
        following = delta[:, t] + gamma * lam * torch.where(done[:, t], 0, following)
        advantage[:, t] = following
    return advantage, advantage + value
