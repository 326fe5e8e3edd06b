"""Transitions that tickets remember, and which of them an update draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .random import Stream, integers

__all__ = ["MOST_TRANSITIONS", "Transitions", "runs", "take"]

MOST_TRANSITIONS = 8192
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


def take(
    replay: Transitions, stored: int, key: Tensor, first: int, updates: int, batch: int
) -> Transitions:
    """The transitions ``[P, updates * batch]`` of updates ``first, first + 1, ...``, contiguous."""
    tickets, capacity = replay.reward.shape
    number = torch.arange(first, first + updates, device=key.device).repeat(tickets)
    index = integers(
        key.repeat_interleave(updates), batch, stored, stream=Stream.MINIBATCH, step=number
    ).view(tickets, updates * batch)
    row = torch.arange(tickets, device=key.device)[:, None] * capacity + index
    return type(replay)(*(field.flatten(0, 1)[row] for field in replay))


def runs(first: int, updates: int, batch: int) -> Iterator[tuple[int, int]]:
    """The updates of a call in runs to gather at once: the first one's number, and how many."""
    most = max(1, MOST_TRANSITIONS // batch)
    for begin in range(0, updates, most):
        yield first + begin, min(most, updates - begin)
