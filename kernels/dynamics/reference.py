"""Physics of the built-in tasks in batched torch: the equations of gymnasium 1.4, and a maze.

A `Task` is a record of constants and three pure functions on float64 states ``[..., S]``. The
order of operations follows gymnasium's, so that only the last bit of a sine or cosine differs.

Sources: CartPole from Barto, Sutton and Anderson 1983; Acrobot from Sutton 1996, in the version of
Sutton and Barto's book; MountainCar from Moore 1990; Pendulum from gymnasium. The maze is ours
(`maze`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import maze

__all__ = [
    "ACROBOT",
    "CARTPOLE",
    "MAZE",
    "MOUNTAIN_CAR",
    "PENDULUM",
    "TASKS",
    "Task",
    "initial",
    "observe",
    "step",
]

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
        action_low: lowest action per dimension; empty if discrete.
        action_high: highest action per dimension; empty if discrete.
        time_limit: steps after which an episode is truncated.
        reset_low: lowest initial state per dimension.
        reset_high: highest initial state per dimension; the maze's initial states are not all
            that lie between.
        step: ``(state [..., S] float64, action) -> (state, reward float32, terminated bool)``.
        observe: ``state [..., S] float64 -> observation [..., D] float32``.
    """

    name: str
    id: int
    state_dim: int
    observation_dim: int
    discrete: bool
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    time_limit: int
    reset_low: tuple[float, ...]
    reset_high: tuple[float, ...]
    step: Callable[[Tensor, Tensor], Transition]
    observe: Callable[[Tensor], Tensor]

    def initial(self, u: Tensor) -> Tensor:
        """Initial states ``[..., S]`` float64 of uniforms ``u [..., S]``: low + (high - low) u.

        Those of the maze are drawn by `maze.initial`.
        """
        if self.name == MAZE.name:
            return maze.initial(u)
        bounds = zip(self.reset_low, self.reset_high, u.double().unbind(-1), strict=True)
        return torch.stack([low + (high - low) * column for low, high, column in bounds], -1)


def _cartpole_step(state: Tensor, action: Tensor) -> Transition:
    x, x_dot, theta, theta_dot = state.unbind(-1)
    force = torch.where(action == 1, 10.0, -10.0).double()
    cos, sin = theta.cos(), theta.sin()
    # Masses 1.0 + 0.1, half length 0.5, gravity 9.8, 0.02 s of explicit Euler.
    push = (force + 0.05 * (theta_dot * theta_dot) * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * (cos * cos) / 1.1))
    x_acc = push - 0.05 * theta_acc * cos / 1.1
    x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
    theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
    terminated = (x.abs() > 2.4) | (theta.abs() > 12 * 2 * math.pi / 360)
    reward = torch.ones_like(x, dtype=torch.float32)
    return torch.stack((x, x_dot, theta, theta_dot), -1), reward, terminated


def _acrobot_rates(state: Tensor, torque: Tensor) -> Tensor:
    """Time derivative of ``(theta1, theta2, theta1', theta2')``."""
    theta1, theta2, rate1, rate2 = state.unbind(-1)
    cos2, sin2 = theta2.cos(), theta2.sin()
    # Both links: mass 1, length 1, centre of mass at 0.5, moment of inertia 1.
    d1 = 0.25 + (1.25 + cos2) + 2.0
    d2 = (0.25 + 0.5 * cos2) + 1.0
    phi2 = 0.5 * 9.8 * (theta1 + theta2 - math.pi / 2).cos()
    phi1 = (
        -0.5 * (rate2 * rate2) * sin2
        - rate2 * rate1 * sin2
        + 1.5 * 9.8 * (theta1 - math.pi / 2).cos()
        + phi2
    )
    acc2 = (torque + d2 / d1 * phi1 - 0.5 * (rate1 * rate1) * sin2 - phi2) / (1.25 - d2 * d2 / d1)
    acc1 = -(d2 * acc2 + phi1) / d1
    return torch.stack((rate1, rate2, acc1, acc2), -1)


def _wrap(angle: Tensor) -> Tensor:
    """``angle`` moved into ``[-pi, pi]`` by whole turns; an angle already inside keeps its bits."""
    turn = 2 * math.pi
    above = ((angle - math.pi) / turn).ceil().clamp(min=0.0)
    below = ((angle + math.pi) / turn).floor().clamp(max=0.0)
    return angle - (above + below) * turn


def _acrobot_step(state: Tensor, action: Tensor) -> Transition:
    torque = action.double() - 1.0
    # One Runge-Kutta step of 0.2 s.
    k1 = _acrobot_rates(state, torque)
    k2 = _acrobot_rates(state + 0.1 * k1, torque)
    k3 = _acrobot_rates(state + 0.1 * k2, torque)
    k4 = _acrobot_rates(state + 0.2 * k3, torque)
    state = state + 0.2 / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    theta1, theta2, rate1, rate2 = state.unbind(-1)
    theta1, theta2 = _wrap(theta1), _wrap(theta2)
    rate1 = rate1.clamp(-4 * math.pi, 4 * math.pi)
    rate2 = rate2.clamp(-9 * math.pi, 9 * math.pi)
    terminated = -theta1.cos() - (theta2 + theta1).cos() > 1.0
    reward = terminated.float() - 1.0
    return torch.stack((theta1, theta2, rate1, rate2), -1), reward, terminated


def _acrobot_observe(state: Tensor) -> Tensor:
    theta1, theta2, rate1, rate2 = state.unbind(-1)
    features = (theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin(), rate1, rate2)
    return torch.stack(features, -1).float()


def _mountain_car_step(state: Tensor, action: Tensor) -> Transition:
    position, velocity = state.unbind(-1)
    velocity = velocity + ((action.double() - 1.0) * 0.001 + (3.0 * position).cos() * -0.0025)
    velocity = velocity.clamp(-0.07, 0.07)
    position = (position + velocity).clamp(-1.2, 0.6)
    velocity = torch.where((position == -1.2) & (velocity < 0.0), 0.0, velocity)
    terminated = (position >= 0.5) & (velocity >= 0.0)
    reward = torch.full_like(position, -1.0, dtype=torch.float32)
    return torch.stack((position, velocity), -1), reward, terminated


def _pendulum_step(state: Tensor, action: Tensor) -> Transition:
    theta, theta_dot = state.unbind(-1)
    torque = action[..., 0].double().clamp(-2.0, 2.0)
    angle = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
    cost = angle * angle + 0.1 * (theta_dot * theta_dot) + 0.001 * (torque * torque)
    # Gravity 10, mass 1, length 1, 0.05 s of semi-implicit Euler.
    theta_dot = (theta_dot + (15.0 * theta.sin() + 3.0 * torque) * 0.05).clamp(-8.0, 8.0)
    theta = theta + theta_dot * 0.05
    terminated = torch.zeros_like(theta, dtype=torch.bool)
    return torch.stack((theta, theta_dot), -1), (-cost).float(), terminated


def _pendulum_observe(state: Tensor) -> Tensor:
    theta, theta_dot = state.unbind(-1)
    return torch.stack((theta.cos(), theta.sin(), theta_dot), -1).float()


CARTPOLE = Task(
    name="CartPole-v1",
    id=0,
    state_dim=4,
    observation_dim=4,
    discrete=True,
    action_dim=2,
    action_low=(),
    action_high=(),
    time_limit=500,
    reset_low=(-0.05,) * 4,
    reset_high=(0.05,) * 4,
    step=_cartpole_step,
    observe=Tensor.float,
)
ACROBOT = Task(
    name="Acrobot-v1",
    id=1,
    state_dim=4,
    observation_dim=6,
    discrete=True,
    action_dim=3,
    action_low=(),
    action_high=(),
    time_limit=500,
    reset_low=(-0.1,) * 4,
    reset_high=(0.1,) * 4,
    step=_acrobot_step,
    observe=_acrobot_observe,
)
MOUNTAIN_CAR = Task(
    name="MountainCar-v0",
    id=2,
    state_dim=2,
    observation_dim=2,
    discrete=True,
    action_dim=3,
    action_low=(),
    action_high=(),
    time_limit=200,
    reset_low=(-0.6, 0.0),
    reset_high=(-0.4, 0.0),
    step=_mountain_car_step,
    observe=Tensor.float,
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
    step=_pendulum_step,
    observe=_pendulum_observe,
)

MAZE = Task(
    name="sparse_tickets/Maze-v0",
    id=4,
    state_dim=4,
    observation_dim=maze.CHANNELS * maze.CELLS,
    discrete=True,
    action_dim=len(maze.ACTIONS),
    action_low=(),
    action_high=(),
    time_limit=maze.TIME_LIMIT,
    reset_low=(0.0,) * 4,
    reset_high=(len(maze.LAYOUTS) - 1.0, maze.CELLS - 1.0, maze.PERIOD - 1.0, 0.0),
    step=maze.step,
    observe=maze.observe,
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
