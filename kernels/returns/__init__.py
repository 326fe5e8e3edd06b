"""Advantages and returns of a population's rollouts, bootstrapped where an episode was cut short.

A *terminated* episode has no future. A *truncated* one has, and its value is that of the true
successor observation, not of the observation after the reset (Pardo et al. 2018, "Time limits in
reinforcement learning"): therefore `next_value` is an argument and not `value` shifted by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_tensor
from ..registration import declare

__all__ = ["gae"]


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), per ticket and environment.

    With ``done = terminated | truncated`` and A = 0 after the last step::

        delta[t] = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        A[t]     = delta[t] + gamma * lam * (1 - done[t]) * A[t+1]
        target   = A + value

    What an episode's end cuts off is left out, not multiplied by zero: a NaN there does no harm.
    The results are constants to autograd.

    Args:
        reward: ``[P, T, E]`` float32 or float64; axis 1 is time.
        value: ``[P, T, E]``, V of the observation acted on.
        next_value: ``[P, T, E]``, V of the true successor, at a truncation the final observation;
            ignored where terminated.
        terminated: ``[P, T, E]`` bool.
        truncated: ``[P, T, E]`` bool; a step may be both.
        gamma: discount in [0, 1].
        lam: in [0, 1]; 0 gives one-step advantages, 1 Monte-Carlo ones.

    Returns:
        ``(advantage [P, T, E], target [P, T, E])``.

    Raises:
        ValueError: a shape, a device, or a number out of its range.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    return torch.ops.sparse_tickets.gae(
        reward.detach(),
        value.detach(),
        next_value.detach(),
        terminated,
        truncated,
        float(gamma),
        float(lam),
    )


def _check(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> None:
    """Whoever calls the op by its name has passed no other check; kernels read memory by shapes."""
    check_tensor("reward", reward, ("P", "T", "E"), torch.float32, torch.float64, like=reward)
    for name, tensor, dtype in (
        ("value", value, reward.dtype),
        ("next_value", next_value, reward.dtype),
        ("terminated", terminated, torch.bool),
        ("truncated", truncated, torch.bool),
    ):
        check_tensor(name, tensor, reward.shape, dtype, like=reward)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")


def _gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    rows = (reward, value, next_value, terminated, truncated)
    _check(*rows, gamma, lam)
    kernels = implementation(__name__, reward.device)
    return kernels.gae(*(row.contiguous() for row in rows), gamma, lam)


def _gae_fake(reward: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(reward, *rest)
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)


declare("gae", _gae, _gae_fake)
