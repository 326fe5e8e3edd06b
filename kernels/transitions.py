"""Transitions that tickets remember, and which samples an update draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import check_tensor
from .random import Stream, integers

MOST_SAMPLES = 8192
"""Of a ticket, gathered at once: those of many updates, but not of any number of them."""


class Transitions(NamedTuple):
    """Transitions of P tickets, C of each; with n-step returns they span n steps.

    Attributes:
        obs: ``[P, C, D]`` float32, scaled: what was acted on.
        action: ``[P, C]`` int64, or ``[P, C, A]`` float32 where actions are squashed.
        reward: ``[P, C]`` float32, discounted sum of the rewards up to `next_obs`.
        discount: ``[P, C]`` float32, of the value of `next_obs`: gamma to the power of the steps,
            zero where the episode terminated, after which nobody looks at `next_obs`.
        next_obs: ``[P, C, D]`` float32, what the actions led to.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor


def check_replay(
    replay: Transitions,
    stored: int,
    weight: Tensor,
    features: int,
    *action: int,
    action_dtype: torch.dtype,
) -> None:
    """Raise unless these are transitions of the weights' tickets, of which ``stored`` are there.

    Args:
        replay: what is checked.
        stored: how many of each ticket's transitions count.
        weight: ``[P, size]``.
        features: of an observation.
        action: sizes of an action.
        action_dtype: its dtype.
    """
    check_tensor("reward", replay.reward, (len(weight), "C"), weight.dtype, like=weight)
    shape = replay.reward.shape
    check_tensor("discount", replay.discount, shape, weight.dtype, like=weight)
    check_tensor("action", replay.action, (*shape, *action), action_dtype, like=weight)
    for name in ("obs", "next_obs"):
        fields = (*shape, features)
        check_tensor(name, getattr(replay, name), fields, weight.dtype, like=weight)
    if not 1 <= stored <= shape[1]:
        raise ValueError(f"stored must be in [1, {shape[1]}], the length of reward, got {stored}")


def take(
    replay: Transitions, stored: int, key: Tensor, first: int | Tensor, updates: int, batch: int
) -> Transitions:
    """The transitions ``[P, updates * batch]`` of updates ``first, first + 1, ...``, contiguous."""
    tickets, capacity = replay.reward.shape
    index = draw(stored, key, first, updates, batch)
    row = torch.arange(tickets, device=key.device)[:, None] * capacity + index
    return type(replay)(*(field.flatten(0, 1)[row] for field in replay))


def draw(count: int, key: Tensor, first: int | Tensor, updates: int, batch: int) -> Tensor:
    """Which of ``count`` samples updates ``first, first + 1, ...`` take, ``[P, updates * batch]``.

    All at once, and without waiting for a GPU, where ``first`` may lie.
    """
    number = (first + torch.arange(updates, device=key.device)).repeat(len(key))
    keys = key.repeat_interleave(updates)
    index = integers(keys, batch, count, stream=Stream.MINIBATCH, step=number)
    return index.view(len(key), updates * batch)


def runs(updates: int, batch: int) -> Iterator[tuple[int, int]]:
    """The updates of a call in runs to gather at once: how many are before, and how many it is."""
    most = max(1, MOST_SAMPLES // batch)
    for begin in range(0, updates, most):
        yield begin, min(most, updates - begin)
