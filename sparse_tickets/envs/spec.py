"""What an environment is: `EnvSpec` its numbers, `Step` one transition, `Env` the protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparse_tickets.kernels.dynamics import Task
from sparse_tickets.settings import above, at_least, check_fields

__all__ = ["Env", "EnvSpec", "Step"]


@dataclass(frozen=True)
class EnvSpec:
    """Spaces, limits and the frozen observation scale of an environment.

    Policies see ``(observation - offset) / scale``. Both are fixed numbers: running statistics
    would be a learned input layer that is never pruned.

    Attributes:
        name: the name it is made by.
        observation_dim: D.
        discrete: actions are indices; otherwise vectors.
        action_dim: number of actions if discrete, else A.
        action_low: lowest action per dimension; empty if discrete.
        action_high: highest action per dimension; empty if discrete.
        time_limit: steps after which an episode is truncated, or None.
        offset: subtracted from the observation, one number per dimension.
        scale: divides the observation, one positive number per dimension.
        solved: mean return from which the environment counts as solved, or None if nobody says.
        random_return: mean return of uniformly random actions, or None if not measured.

    Raises:
        TypeError: a value of another type.
        ValueError: a tuple of the wrong length, a number that is not finite, a scale not above 0,
            or a dimension or time limit below 1.
    """

    name: str
    observation_dim: int
    discrete: bool
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    time_limit: int | None
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    solved: float | None
    random_return: float | None

    def __post_init__(self) -> None:
        check_fields(
            self,
            dict.fromkeys(("observation_dim", "action_dim", "time_limit"), at_least(1))
            | {"scale": above(0)},
            infinite=("action_low", "action_high"),
        )
        bounds = 0 if self.discrete else self.action_dim
        for name, values, length in (
            ("action_low", self.action_low, bounds),
            ("action_high", self.action_high, bounds),
            ("offset", self.offset, self.observation_dim),
            ("scale", self.scale, self.observation_dim),
        ):
            if len(values) != length:
                raise ValueError(f"{name} must have {length} numbers, got {values}")

    def raw(self) -> EnvSpec:
        """The same environment with observations as they come: offset 0, scale 1."""
        return replace(
            self, offset=(0.0,) * self.observation_dim, scale=(1.0,) * self.observation_dim
        )


class Step(NamedTuple):
    """One step of every copy of every ticket.

    Attributes:
        obs: ``[P, E, D]`` float32, what to act on next; a new episode's first observation where
            the old one ended.
        reward: ``[P, E]`` float32 or float64.
        terminated: ``[P, E]`` bool, the task ended the episode.
        truncated: ``[P, E]`` bool, the time limit ended it; never True where `terminated` is.
        final_obs: ``[P, E, D]`` float32, the observation the action really led to: the one to
            bootstrap from where truncated. Equal to `obs` where the episode goes on.
    """

    obs: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Tensor


@runtime_checkable
class Env(Protocol):
    """E copies of one environment for each of P tickets, restarting by themselves.

    A ticket's episodes depend on its key and its own actions alone, never on the other tickets.
    Two methods are optional: ``close()``, to release what the copies hold, and ``rest(resting)``,
    which evaluation calls with the copies ``[P, E]`` that need not act until the next `reset`. One
    whose copies are stepped by processes may say so as ``workers``: small policies then act on one
    thread, and leave the cores to them.

    Attributes:
        spec: spaces and observation scale.
        tickets: P.
        copies: E.
        device: where tensors live.
        clock: steps taken since the last `reset`.
    """

    spec: EnvSpec
    tickets: int
    copies: int
    device: torch.device

    @property
    def clock(self) -> int | Tensor:
        """Steps so far; a tensor where CUDA graphs are to advance it."""
        ...

    @property
    def task(self) -> Task | None:
        """The physics, where fused kernels know it."""
        ...

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh.

        Args:
            key: ``[P]`` int64, one key per ticket.

        Returns:
            Observations ``[P, E, D]`` float32.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; copies whose episode ends restart within the same step.

        Args:
            action: ``[P, E]`` int64 if discrete, else ``[P, E, A]`` float32, clipped to the
                bounds.
        """
        ...
