"""CartPole's physics with other ends: tasks of one shape, for masks to be carried between."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparse_tickets.envs import ClassicEnv, EnvSpec, env_spec, register_env
from sparse_tickets.envs.spec import Step
from sparse_tickets.kernels.arena import Net
from sparse_tickets.kernels.dynamics import TASKS, initial, observe, step
from sparse_tickets.kernels.random import Stream, uniform

__all__ = ["NARROW", "REVERSED", "NarrowCartPole", "turned"]

NARROW = "CartPole-v1 narrow"
"""The cart must stay within a tenth of the track, for which its position has to be seen."""
REVERSED = "CartPole-v1 reversed"
"""Pushes go the other way: what is needed stays, what a policy knows is wrong.

To a policy whose `turned` network it is CartPole, and it is trained so.
"""
_CARTPOLE = TASKS["CartPole-v1"]
_TRACK = 0.24


class NarrowCartPole:
    """E copies of a narrow CartPole for each of P tickets, stepped outside of the fused kernels.

    See `sparse_tickets.envs.Env`; random numbers are drawn as `ClassicEnv` draws them.

    Args:
        tickets: P.
        copies: E.
        device: where tensors live.
        spec: observations come as they are.
        reset_stream: stream of the initial states.
    """

    task = None

    def __init__(
        self,
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
        self._stream = reset_stream

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh."""
        self.clock, self._key = 0, key
        self._state = self._initial()
        self._elapsed = torch.zeros_like(self._state[..., 0], dtype=torch.int32)
        return observe(_CARTPOLE, self._state)

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; those whose episode ends restart within the same step."""
        state, reward, terminated = step(_CARTPOLE, self._state, action)
        terminated = terminated | (state[..., 0].abs() > _TRACK)
        self.clock += 1
        elapsed = self._elapsed + 1
        truncated = (elapsed >= _CARTPOLE.time_limit) & ~terminated
        done = terminated | truncated
        obs = final_obs = observe(_CARTPOLE, state)
        if done.any():
            state = torch.where(done[..., None], self._initial(), state)
            elapsed = elapsed.masked_fill(done, 0)
            obs = observe(_CARTPOLE, state)
        self._state, self._elapsed = state, elapsed
        return Step(obs, reward, terminated, truncated, final_obs)

    def _initial(self) -> Tensor:
        states = _CARTPOLE.state_dim
        drawn = uniform(self._key, self.copies * states, stream=self._stream, step=self.clock)
        return initial(_CARTPOLE, drawn.unflatten(1, (self.copies, states)))


def turned(actor: Net, rows: Tensor) -> Tensor:
    """Weights or masks of two-action policies ``[P, size]`` with the actions in the other order.

    Args:
        actor: where rows have the policy.
        rows: all parameters, or the mask of the prunable ones, which has no biases.
    """
    swapped, last = rows.clone(), actor.depth - 1
    head = actor.weight(swapped, last)
    head.copy_(head.flip(-2))
    if rows.dtype != torch.bool:
        bias = actor.bias(swapped, last)
        bias.copy_(bias.flip(-1))
    return swapped


# Random policies fall before they leave even the narrow track, and as soon either way.
register_env(NARROW, NarrowCartPole, replace(env_spec("CartPole-v1"), name=NARROW))
register_env(
    REVERSED,
    partial(ClassicEnv, "CartPole-v1"),
    replace(env_spec("CartPole-v1"), name=REVERSED),
)
