"""Copies of a task that restart by themselves: what rollouts advance, and environments are made of.

A population's copies need nothing but tensors: their states, the steps since each one's restart,
and a key per ticket of which restarts are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..random import uniform
from . import initial, observe, step
from .reference import Task

__all__ = ["Copies"]


@dataclass(eq=False, repr=False)
class Copies:
    """E copies of a task for each of P tickets.

    Restarts after step t (counted from 0) draw ``E * S`` uniforms per ticket with step t + 1 on
    `reset_stream`; copy e takes uniforms ``[e * S, (e + 1) * S)``, used or not.

    Attributes:
        task: their physics and time limit.
        copies: E.
        offset: ``[D]`` float32, taken from observations.
        scale: ``[D]`` float32, by which they are divided then.
        reset_stream: stream of the initial states.
        key: ``[P]`` int64, or None before the first episode.
        state: ``[P, E, S]`` float64.
        elapsed: ``[P, E]`` int32, steps since each copy's last restart.
        clock: steps so far: an integer, or an int64 tensor ``[]`` with which `state` and `elapsed`
            change in place.
    """

    task: Task
    copies: int
    offset: Tensor
    scale: Tensor
    reset_stream: int
    key: Tensor | None
    state: Tensor
    elapsed: Tensor
    clock: int | Tensor

    @staticmethod
    def start(
        task: Task,
        copies: int,
        offset: Tensor,
        scale: Tensor,
        key: Tensor,
        stream: int,
        draw: int,
    ) -> Copies:
        """Copies at the beginning of their first episodes, the ``draw``-th on a stream."""
        state = offset.new_empty((len(key), copies, task.state_dim), dtype=torch.float64)
        elapsed = torch.zeros_like(state[..., 0], dtype=torch.int32)
        started = Copies(task, copies, offset, scale, stream, key, state, elapsed, clock=0)
        started.state = started.draw_initial(key, stream, draw)
        return started

    @property
    def restart_key(self) -> Tensor:
        """The key, of which restarts are drawn.

        Raises:
            RuntimeError: there is none yet.
        """
        if self.key is None:
            raise RuntimeError("reset must be called before step")
        return self.key

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Act once in every copy; those whose episode ends restart within the same step.

        Args:
            action: ``[P, E]`` int64 if discrete, else ``[P, E, A]`` float32.

        Returns:
            ``(obs, reward, terminated, truncated, final_obs)``; see `sparse_tickets.envs.Step`.

        Raises:
            RuntimeError: there is no key.
            TypeError, ValueError: see `sparse_tickets.kernels.dynamics.step`.
        """
        key = self.restart_key
        state, reward, terminated = step(self.task, self.state, action)
        elapsed = self.elapsed + 1
        truncated = (elapsed >= self.task.time_limit) & ~terminated
        done = terminated | truncated
        final_obs = obs = self.observe(state)
        self.clock += 1
        # On a GPU looking would wait for the device; drawing in vain costs less there.
        if state.device.type != "cpu" or bool(done.any()):
            restart = self.draw_initial(key, self.reset_stream, self.clock)
            state = torch.where(done[..., None], restart, state)
            elapsed = elapsed.masked_fill(done, 0)
            obs = torch.where(done[..., None], self.observe(restart), final_obs)
        if isinstance(self.clock, Tensor):
            self.state.copy_(state)
            self.elapsed.copy_(elapsed)
        else:
            self.state, self.elapsed = state, elapsed
        return obs, reward, terminated, truncated, final_obs

    def observe(self, state: Tensor) -> Tensor:
        """Scaled observations ``[..., D]`` float32 of states ``[..., S]`` float64."""
        return (observe(self.task, state) - self.offset) / self.scale

    def draw_initial(self, key: Tensor, stream: int, draw: int | Tensor) -> Tensor:
        """Initial states ``[P, E, S]``, the ``draw``-th on a stream."""
        states = self.task.state_dim
        u = uniform(key, self.copies * states, stream=stream, step=draw)
        return initial(self.task, u.unflatten(1, (self.copies, states)))
