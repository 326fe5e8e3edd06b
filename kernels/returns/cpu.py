"""Generalised advantage estimation in Numba: a ticket per thread, vectors of environments."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share

# Work per step of an environment, in the units of `count_threads`.
_WORK = 64


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


@njit(cache=True)
def _gae_row(
    thread, ticket, reward, value, next_value, terminated, truncated, gamma, lam, advantage, target
):
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


@njit(cache=True, nogil=True)
def _gae(threads, tickets, arguments):
    share(_gae_row, threads, tickets, arguments)


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
    _gae(count_threads(len(reward), _WORK * reward.numel()), len(reward), arguments)
    return advantage, target
