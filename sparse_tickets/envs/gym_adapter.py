"""Any gymnasium environment for a population, one Python object per copy: general, not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from sparse_tickets.kernels.errors import check_dtype, check_shape
from sparse_tickets.kernels.random import Stream, bits

from .spec import EnvSpec, Step

__all__ = ["GymEnv", "gym_spec"]

Maker = Callable[[], gymnasium.Env]


def gym_spec(make: Maker | str, name: str | None = None) -> EnvSpec:
    """The spec of a gymnasium environment, with offset 0 and scale 1.

    Args:
        make: a gymnasium id, or a function without arguments that makes the environment.
        name: name of the spec; by default the id.

    Raises:
        ValueError: a space is neither ``Box`` nor ``Discrete``.
    """
    env = _maker(make)()
    try:
        return _read_spec(env, name)
    finally:
        env.close()


class GymEnv:
    """E copies of a gymnasium environment for each of P tickets.

    Observations that are boxes are flattened, discrete ones become one-hot vectors. Each copy is
    seeded once, by `reset`, from the Philox words of its ticket's key, and restarts from its own
    generator, so that a ticket's episodes do not depend on the tickets beside it.

    Args:
        make: a gymnasium id, or a function without arguments that makes one environment.
        tickets: P.
        copies: E.
        device: where tensors live; the environments themselves run on the CPU.
        spec: observation scale, by default offset 0 and scale 1.
        reset_stream: stream of the seeds; evaluation uses another than training.

    Attributes:
        clock: steps since `reset`.
        task: None: no fused kernel knows the physics.

    Raises:
        ValueError: no tickets or no copies, a space neither ``Box`` nor ``Discrete``, or a spec
            that does not fit the spaces.
    """

    task = None

    def __init__(
        self,
        make: Maker | str,
        tickets: int,
        copies: int,
        device: torch.device | str = "cpu",
        *,
        spec: EnvSpec | None = None,
        reset_stream: Stream = Stream.RESET,
    ) -> None:
        for name, count in (("tickets", tickets), ("copies", copies)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        maker = _maker(make)
        self._envs = SyncVectorEnv(
            [maker] * (tickets * copies), autoreset_mode=AutoresetMode.SAME_STEP
        )
        read = _read_spec(self._envs.envs[0], None)
        self.spec = read if spec is None else spec
        for name in ("observation_dim", "discrete", "action_dim"):
            expected, given = getattr(read, name), getattr(self.spec, name)
            if given != expected:
                raise ValueError(f"spec must have {name}={expected}, got {given}")
        self.tickets = tickets
        self.copies = copies
        self.device = torch.device(device)
        self.reset_stream = reset_stream
        self.clock = 0
        self._ready = False
        self._offset = np.array(self.spec.offset, dtype=np.float32)
        self._scale = np.array(self.spec.scale, dtype=np.float32)
        self._low = torch.tensor(self.spec.action_low, dtype=torch.float32)
        self._high = torch.tensor(self.spec.action_high, dtype=torch.float32)

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh; see `Env.reset`."""
        check_dtype("key", key, torch.int64)
        check_shape("key", key, (self.tickets,))
        seeds = bits(key.cpu(), self.copies, stream=self.reset_stream, step=0)
        observations, _ = self._envs.reset(seed=seeds.flatten().tolist())
        self.clock = 0
        self._ready = True
        return self._tensor(self._scaled(observations))

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; see `Env.step`.

        Raises:
            RuntimeError: `reset` was never called.
            TypeError, ValueError: an action of the wrong dtype, shape or range.
        """
        if not self._ready:
            raise RuntimeError("reset must be called before step")
        observations, reward, terminated, truncated, info = self._envs.step(self._native(action))
        self.clock += 1
        obs = self._scaled(observations)
        final_obs = obs
        if "final_obs" in info:
            final_obs = obs.copy()
            ended = np.flatnonzero(info["_final_obs"])
            final_obs[ended] = self._scaled(np.stack([info["final_obs"][i] for i in ended]))
        return Step(
            self._tensor(obs),
            self._tensor(reward.astype(np.float32)),
            self._tensor(terminated),
            self._tensor(truncated & ~terminated),
            self._tensor(final_obs),
        )

    def close(self) -> None:
        """Release what the environments hold."""
        self._envs.close()

    def _native(self, action: Tensor) -> np.ndarray:
        space = self._envs.single_action_space
        copies = (self.tickets, self.copies)
        if isinstance(space, Discrete):
            check_dtype("action", action, torch.int64)
            check_shape("action", action, copies)
            index = action.flatten().cpu().numpy()
            if index.min() < 0 or index.max() >= space.n:
                raise ValueError(
                    f"action must be in [0, {space.n}), got values from {index.min()} "
                    f"to {index.max()}"
                )
            return index + space.start
        check_dtype("action", action, torch.float32)
        check_shape("action", action, (*copies, self.spec.action_dim))
        clipped = action.cpu().clamp(self._low, self._high).numpy()
        return clipped.reshape(-1, *space.shape).astype(space.dtype)  # type: ignore[misc]

    def _scaled(self, observations: np.ndarray) -> np.ndarray:
        space = self._envs.single_observation_space
        if isinstance(space, Discrete):
            index = np.asarray(observations) - space.start
            flat = np.eye(space.n, dtype=np.float32)[index]
        else:
            flat = observations.reshape(len(observations), -1).astype(np.float32)
        return (flat - self._offset) / self._scale

    def _tensor(self, values: np.ndarray) -> Tensor:
        shape = (self.tickets, self.copies, *values.shape[1:])
        return torch.from_numpy(values.reshape(shape)).to(self.device, copy=True)


def _maker(make: Maker | str) -> Maker:
    if isinstance(make, str):
        return lambda: gymnasium.make(make, disable_env_checker=True)
    return make


def _read_spec(env: gymnasium.Env, name: str | None) -> EnvSpec:
    registered = env.spec
    observation_dim = _observation_dim(env.observation_space)
    space: Space[Any] = env.action_space
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    if isinstance(space, Discrete):
        action_dim = int(space.n)
    elif isinstance(space, Box):
        action_dim = int(np.prod(space.shape))
        low = tuple(map(float, space.low.flat))
        high = tuple(map(float, space.high.flat))
    else:
        raise ValueError(f"action space must be Box or Discrete, got {space}")
    return EnvSpec(
        name=name or (type(env.unwrapped).__name__ if registered is None else registered.id),
        observation_dim=observation_dim,
        discrete=isinstance(space, Discrete),
        action_dim=action_dim,
        action_low=low,
        action_high=high,
        time_limit=None if registered is None else registered.max_episode_steps,
        offset=(0.0,) * observation_dim,
        scale=(1.0,) * observation_dim,
        solved=None if registered is None else registered.reward_threshold,
        random_return=None,
    )


def _observation_dim(space: Space[Any]) -> int:
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, Box):
        return int(np.prod(space.shape))
    raise ValueError(
        f"observation space must be Box or Discrete, got {space}; "
        "gymnasium.wrappers.FlattenObservation turns most others into a Box"
    )
