"""CartPole's physics with other ends: tasks of one shape, for masks to be carried between."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparse_tickets.envs import EnvSpec, env_spec, register_env
from sparse_tickets.envs.spec import Step
from sparse_tickets.kernels.dynamics import TASKS, Task
from sparse_tickets.kernels.dynamics.equations import cartpole_step
from sparse_tickets.kernels.random import Stream, uniform

__all__ = ["NARROW", "REVERSED", "PlainEnv"]

NARROW = "CartPole-v1 narrow"
"""The cart must stay within a tenth of the track, for which its position has to be seen."""
REVERSED = "CartPole-v1 reversed"
"""Pushes go the other way: what is needed stays, what a policy knows is wrong."""
_CARTPOLE = TASKS["CartPole-v1"]
_TRACK = 0.24


def _narrow_step(
    x: Tensor, x_dot: Tensor, theta: Tensor, theta_dot: Tensor, action: Tensor
) -> tuple[Tensor, ...]:
    *state, reward, terminated = cartpole_step(x, x_dot, theta, theta_dot, action)
    return *state, reward, terminated | (state[0].abs() > _TRACK)


def _reversed_step(
    x: Tensor, x_dot: Tensor, theta: Tensor, theta_dot: Tensor, action: Tensor
) -> tuple[Tensor, ...]:
    return cartpole_step(x, x_dot, theta, theta_dot, 1.0 - action)


_STEPS = {NARROW: _narrow_step, REVERSED: _reversed_step}


class PlainEnv:
    """E copies of a task for each of P tickets in batched torch; no fused kernel knows them.

    See `sparse_tickets.envs.Env`; random numbers are drawn as `ClassicEnv` draws them.

    Args:
        physics: what the copies do.
        tickets: P.
        copies: E.
        device: where tensors live.
        spec: its shape and time limit; observations come as they are.
        reset_stream: stream of the initial states.
    """

    task = None

    def __init__(
        self,
        physics: Task,
        tickets: int,
        copies: int,
        device: torch.device | str = "cpu",
        *,
        spec: EnvSpec,
        reset_stream: Stream = Stream.RESET,
    ) -> None:
        self.spec, self.tickets, self.copies = spec, tickets, copies
        self.device = torch.device(device)
        self.clock = 0
        self._physics, self._stream = physics, reset_stream

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh."""
        self.clock, self._key = 0, key
        self._state = self._initial()
        self._elapsed = torch.zeros_like(self._state[..., 0], dtype=torch.int32)
        return self._physics.observe(self._state)

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; those whose episode ends restart within the same step."""
        state, reward, terminated = self._physics.step(self._state, action)
        self.clock += 1
        elapsed = self._elapsed + 1
        truncated = (elapsed >= self._physics.time_limit) & ~terminated
        done = terminated | truncated
        obs = final_obs = self._physics.observe(state)
        if done.any():
            state = torch.where(done[..., None], self._initial(), state)
            elapsed = elapsed.masked_fill(done, 0)
            obs = self._physics.observe(state)
        self._state, self._elapsed = state, elapsed
        return Step(obs, reward, terminated, truncated, final_obs)

    def _initial(self) -> Tensor:
        states = self._physics.state_dim
        drawn = uniform(self._key, self.copies * states, stream=self._stream, step=self.clock)
        return self._physics.initial(drawn.unflatten(1, (self.copies, states)))


def _register(name: str) -> None:
    physics = replace(_CARTPOLE, name=name, advance=_STEPS[name])
    # Random policies fall before they leave even the narrow track, and as soon either way.
    spec = replace(env_spec("CartPole-v1"), name=name)
    register_env(name, partial(PlainEnv, physics), spec)


for _name in _STEPS:
    _register(_name)
