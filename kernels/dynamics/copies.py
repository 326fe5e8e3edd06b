"""Copies of a task that restart by themselves: what rollouts advance, and environments are made of.

A population's copies need nothing but tensors: their states, the steps since each one's restart,
and a key per ticket of which restarts are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..random import Stream, normal, uniform
from . import initial, observe, step
from .reference import Task


@dataclass(eq=False, repr=False)
class Copies:
    """E copies of a task for each of P tickets.

    Restarts after step t (counted from 0) draw ``E * S`` uniforms per ticket with step t + 1 on
    `reset_stream`; copy e takes uniforms ``[e * S, (e + 1) * S)``, used or not.

    With a `source` the observation has D inputs, of which the task knows some and the n others are
    noise: before step t (counted from 0) they are ``normal(key, E * n)`` of `noise_stream` with
    step ``noise_start + t``; copy e sees normals ``[e * n, (e + 1) * n)``.

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
        source: ``[D]`` int64, what each input shows: an entry of the task's observation, or from
            its end on one of the noise's; None where there is no noise.
        noise_stream: stream of the noise.
        noise_start: its step before the first step.
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
    source: Tensor | None = None
    noise_stream: int = Stream.NOISE
    noise_start: int = 0

    @staticmethod
    def start(
        task: Task,
        copies: int,
        offset: Tensor,
        scale: Tensor,
        key: Tensor,
        stream: int,
        draw: int,
        **noise: Any,
    ) -> Copies:
        """Copies at the beginning of their first episodes, the ``draw``-th on a stream.

        ``noise`` holds the attributes that tell of noise.
        """
        state = offset.new_empty((len(key), copies, task.state_dim), dtype=torch.float64)
        elapsed = torch.zeros_like(state[..., 0], dtype=torch.int32)
        started = Copies(task, copies, offset, scale, stream, key, state, elapsed, 0, **noise)
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
        self.clock += 1
        final_obs = obs = self.observe(state)
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
        """Scaled observations ``[P, E, D]`` float32 of states ``[P, E, S]`` float64, at `clock`."""
        seen = observe(self.task, state)
        if self.source is not None:
            count = len(self.source) - self.task.observation_dim
            noise = normal(
                self.restart_key,
                self.copies * count,
                stream=self.noise_stream,
                step=self.noise_start + self.clock,
            )
            seen = torch.cat([seen, noise.unflatten(1, (self.copies, count))], -1)
            seen = seen.index_select(-1, self.source)
        return (seen - self.offset) / self.scale

    def draw_initial(self, key: Tensor, stream: int, draw: int | Tensor) -> Tensor:
        """Initial states ``[P, E, S]``, the ``draw``-th on a stream."""
        states = self.task.state_dim
        u = uniform(key, self.copies * states, stream=stream, step=draw)
        return initial(self.task, u.unflatten(1, (self.copies, states)))
