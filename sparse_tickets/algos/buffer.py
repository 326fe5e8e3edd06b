"""A replay buffer per ticket, allocated once; transitions come in with their n-step returns."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.envs import Step
from sparse_tickets.kernels.transitions import Transitions

__all__ = ["ReplayBuffer"]


class _Acted(NamedTuple):
    obs: Tensor
    action: Tensor
    step: Step


class ReplayBuffer:
    """Rings of C transitions, one for each of P tickets.

    They take ``C * (8 D + 16)`` bytes a ticket; with actions of A numbers ``C * (8 D + 4 A + 8)``.

    All tickets act side by side, so their rings fill at the same pace and turn together.

    Args:
        tickets: P.
        copies: E, environments a ticket acts in; each step adds E transitions.
        features: D, of an observation.
        capacity: most transitions of a ticket; C is that, rounded down to a multiple of E.
        n_step: steps whose rewards a transition adds up.
        gamma: discount per step.
        device: where the tensors live.
        numbers: A, of which an action consists; None for an index.

    Attributes:
        transitions: all C of them; the first `stored` are there.
        stored: how many.
        added: how many there ever were.
    """

    def __init__(
        self,
        tickets: int,
        copies: int,
        features: int,
        capacity: int,
        *,
        n_step: int,
        gamma: float,
        device: torch.device,
        numbers: int | None = None,
    ) -> None:
        if capacity < copies:
            raise ValueError(f"capacity must be at least copies = {copies}, got {capacity}")
        shape = (tickets, capacity // copies * copies)
        reward = torch.zeros(shape, dtype=torch.float32, device=device)
        obs = torch.zeros(*shape, features, dtype=torch.float32, device=device)
        if numbers is None:
            action = torch.zeros(shape, dtype=torch.int64, device=device)
        else:
            action = torch.zeros(*shape, numbers, dtype=torch.float32, device=device)
        self.transitions = Transitions(
            obs, action, reward, torch.zeros_like(reward), torch.zeros_like(obs)
        )
        self.added = 0
        self._copies, self._gamma = copies, gamma
        self._recent: deque[_Acted] = deque(maxlen=n_step)

    @property
    def stored(self) -> int:
        return min(self.added, self.transitions.reward.shape[1])

    def add(self, obs: Tensor, action: Tensor, step: Step) -> None:
        """Take what every copy of every ticket just did.

        Args:
            obs: ``[P, E, D]``, what was acted on.
            action: ``[P, E]`` int64, or ``[P, E, A]`` float32.
            step: what came of it.
        """
        self._recent.append(_Acted(obs, action, step))
        if len(self._recent) < (self._recent.maxlen or 1):
            return
        begin = self.added % self.transitions.reward.shape[1]
        rows = slice(begin, begin + self._copies)
        oldest = self._recent[0]
        for ring, new in zip(
            self.transitions, (oldest.obs, oldest.action, *self._ahead()), strict=True
        ):
            ring[:, rows] = new
        self.added += self._copies

    def _ahead(self) -> tuple[Tensor, Tensor, Tensor]:
        """From the oldest of the recent steps on: discounted rewards, discount and observation.

        An episode that ends on the way ends the sum: without a bootstrap where it terminated, with
        one from its last observation where it was cut.
        """
        next_obs = self._recent[-1].step.final_obs
        reward = torch.zeros_like(self._recent[-1].step.reward)
        discount = torch.ones_like(reward)
        for _, _, step in reversed(self._recent):
            ended = step.terminated | step.truncated
            next_obs = torch.where(ended[..., None], step.final_obs, next_obs)
            reward = step.reward + self._gamma * torch.where(ended, 0.0, reward)
            discount = self._gamma * torch.where(step.truncated, 1.0, discount)
            discount = torch.where(step.terminated, 0.0, discount)
        return reward, discount, next_obs
