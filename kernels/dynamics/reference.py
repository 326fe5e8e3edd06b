"""The built-in tasks in batched torch: their constants, and the `equations` or `maze` of each.

A `Task` has three pure functions on float64 states ``[..., S]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import equations, maze

Transition = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One control task, as pure functions of its state.

    Attributes:
        name: gymnasium's id, or that under which we register it there.
        id: small integer by which fused kernels branch.
        state_dim: S.
        observation_dim: D.
        discrete: actions are indices ``[...]``; otherwise vectors ``[..., A]``.
        action_dim: number of actions if discrete, else A.
        time_limit: steps after which an episode is truncated.
        reset_low: lowest initial state per dimension.
        reset_high: highest initial state per dimension; the maze's initial states are not all
            that lie between.
        advance: a step's equation, of a state's S numbers and the action as float64; it returns
            the next state's numbers, the reward, and whether the episode has ended.
        features: an observation's equation: D numbers of a state's S.
        action_low: lowest action per dimension; empty if discrete.
        action_high: highest action per dimension; empty if discrete.
    """

    name: str
    id: int
    state_dim: int
    observation_dim: int
    discrete: bool
    action_dim: int
    time_limit: int
    reset_low: tuple[float, ...]
    reset_high: tuple[float, ...]
    advance: Callable[..., tuple[Tensor, ...]]
    features: Callable[..., tuple[Tensor, ...]]
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()

    def initial(self, u: Tensor) -> Tensor:
        """Initial states ``[..., S]`` float64 of uniforms ``u [..., S]``: low + (high - low) u.

        Those of the maze are drawn by `maze.initial`.
        """
        if self.name == MAZE.name:
            return maze.initial(u)
        bounds = zip(self.reset_low, self.reset_high, u.double().unbind(-1), strict=True)
        return torch.stack([low + (high - low) * column for low, high, column in bounds], -1)

    def step(self, state: Tensor, action: Tensor) -> Transition:
        """``(state [..., S] float64, action) -> (state, reward float32, terminated bool)``."""
        chosen = action if self.discrete else action[..., 0]
        *numbers, reward, terminated = self.advance(*state.unbind(-1), chosen.double())
        return torch.stack(numbers, -1), reward.float(), terminated

    def observe(self, state: Tensor) -> Tensor:
        """``state [..., S] float64 -> observation [..., D] float32``."""
        return torch.stack(self.features(*state.unbind(-1)), -1).float()


CARTPOLE = Task(
    name="CartPole-v1",
    id=0,
    state_dim=4,
    observation_dim=4,
    discrete=True,
    action_dim=2,
    time_limit=500,
    reset_low=(-0.05,) * 4,
    reset_high=(0.05,) * 4,
    advance=equations.cartpole_step,
    features=equations.cartpole_features,
)
ACROBOT = Task(
    name="Acrobot-v1",
    id=1,
    state_dim=4,
    observation_dim=6,
    discrete=True,
    action_dim=3,
    time_limit=500,
    reset_low=(-0.1,) * 4,
    reset_high=(0.1,) * 4,
    advance=equations.acrobot_step,
    features=equations.acrobot_features,
)
MOUNTAIN_CAR = Task(
    name="MountainCar-v0",
    id=2,
    state_dim=2,
    observation_dim=2,
    discrete=True,
    action_dim=3,
    time_limit=200,
    reset_low=(-0.6, 0.0),
    reset_high=(-0.4, 0.0),
    advance=equations.mountain_car_step,
    features=equations.mountain_car_features,
)
PENDULUM = Task(
    name="Pendulum-v1",
    id=3,
    state_dim=2,
    observation_dim=3,
    discrete=False,
    action_dim=1,
    action_low=(-2.0,),
    action_high=(2.0,),
    time_limit=200,
    reset_low=(-math.pi, -1.0),
    reset_high=(math.pi, 1.0),
    advance=equations.pendulum_step,
    features=equations.pendulum_features,
)

MAZE = Task(
    name="sparse_tickets/Maze-v0",
    id=4,
    state_dim=4,
    observation_dim=maze.CHANNELS * maze.CELLS,
    discrete=True,
    action_dim=len(maze.ACTIONS),
    time_limit=maze.TIME_LIMIT,
    reset_low=(0.0,) * 4,
    reset_high=(len(maze.LAYOUTS) - 1.0, maze.CELLS - 1.0, maze.PERIOD - 1.0, 0.0),
    advance=maze.step,
    features=maze.features,
)

TASKS = {task.name: task for task in (CARTPOLE, ACROBOT, MOUNTAIN_CAR, PENDULUM, MAZE)}
"""The tasks by gymnasium id."""


def initial(task: Task, u: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.initial`."""
    return task.initial(u)


def step(task: Task, state: Tensor, action: Tensor) -> Transition:
    """See `sparse_tickets.kernels.dynamics.step`."""
    return task.step(state, action)


def observe(task: Task, state: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.observe`."""
    return task.observe(state)
