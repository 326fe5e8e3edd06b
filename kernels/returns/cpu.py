"""Generalised advantage estimation in Numba: a ticket per thread, vectors of environments."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..threads import over_tickets

__all__ = ["gae", "gae_ticket"]


@njit(cache=True)
def gae_ticket(reward, value, next_value, terminated, truncated, gamma, lam, advantage, target):
    """GAE of one ticket, ``[T, E]``, into `advantage` and `target`; for use in other kernels."""
    kind = reward.dtype.type
    zero, discount, decay = kind(0), kind(gamma), kind(gamma * lam)
    following = np.zeros(reward.shape[1], reward.dtype)
    for t in range(reward.shape[0] - 1, -1, -1):
        for env in range(reward.shape[1]):
            ahead = zero if terminated[t, env] else next_value[t, env]
            later = zero if terminated[t, env] or truncated[t, env] else following[env]
            delta = reward[t, env] + discount * ahead - value[t, env]
            following[env] = delta + decay * later
            advantage[t, env] = following[env]
            target[t, env] = following[env] + value[t, env]


@njit(cache=True, nogil=True)
def _gae(
    begin, end, reward, value, next_value, terminated, truncated, gamma, lam, advantage, target
):
    for ticket in range(begin, end):
        gae_ticket(
            reward[ticket],
            value[ticket],
            next_value[ticket],
            terminated[ticket],
            truncated[ticket],
            gamma,
            lam,
            advantage[ticket],
            target[ticket],
        )


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantage, target = torch.empty_like(reward), torch.empty_like(reward)
    inputs = [t.numpy() for t in (reward, value, next_value, terminated, truncated)]
    arguments = (*inputs, gamma, lam, advantage.numpy(), target.numpy())
    over_tickets(len(reward), lambda _, begin, end: _gae(begin, end, *arguments))
    return advantage, target
