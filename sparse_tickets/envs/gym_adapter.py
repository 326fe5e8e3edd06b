"""Any gymnasium environment for a population, one Python object per copy: general, not fast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from sparse_tickets.kernels.errors import check_dtype, check_shape
from sparse_tickets.kernels.random import Stream, bits

from .spec import EnvSpec, Step

__all__ = ["GymEnv", "gym_spec"]

Maker = Callable[[], gymnasium.Env]


def gym_spec(make: Maker | str, name: str | None = None) -> EnvSpec:
    """The spec of a gymnasium environment, with offset 0 and scale 1; images are divided by 255.

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

    Observations that are boxes are flattened, discrete ones become one-hot vectors; they are scaled
    in float64, then rounded to float32. Each copy is seeded once, by `reset`, from the Philox words
    of its ticket's key, and restarts from its own generator, so that a ticket's episodes do not
    depend on the tickets beside it. What an environment returns is copied before it acts again, so
    it may reuse its memory; its infos are not looked at.

    An observation or reward that is not finite is warned of, once per ticket, and passed on: it
    ends that ticket's training, not that of the others. An action that is not finite, of a policy
    that is lost already, reaches the environment as the bounds' middle.

    Args:
        make: a gymnasium id, or a function without arguments that makes one environment.
        tickets: P.
        copies: E.
        device: where tensors live; the environments themselves run on the CPU.
        spec: observation scale; by default what `gym_spec` says.
        reset_stream: stream of the seeds; evaluation uses another than training.

    Attributes:
        clock: steps since `reset`.
        task: None: no fused kernel knows the physics.
        faults: of each ticket by its index, what it was returned first that is not finite.

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
        self.tickets = tickets
        self.copies = copies
        self.device = torch.device(device)
        self.reset_stream = reset_stream
        self.clock = 0
        self.faults: dict[int, str] = {}
        self._ready = False
        self._envs: list[gymnasium.Env] = []
        try:
            maker = _maker(make)
            for _ in range(tickets * copies):
                self._envs.append(maker())
            self._action_space = self._envs[0].action_space
            self._observation_space = self._envs[0].observation_space
            read = _read_spec(self._envs[0], None)
            self.spec = read if spec is None else spec
            for name in ("observation_dim", "discrete", "action_dim"):
                expected, given = getattr(read, name), getattr(self.spec, name)
                if given != expected:
                    raise ValueError(f"spec must have {name}={expected}, got {given}")
        except BaseException:
            self.close()
            raise
        self._offset = np.array(self.spec.offset)
        self._scale = np.array(self.spec.scale)
        self._low = np.array(self.spec.action_low, dtype=np.float32)
        self._high = np.array(self.spec.action_high, dtype=np.float32)
        bounded = np.isfinite(self._low) & np.isfinite(self._high)
        ends = (np.where(bounded, bound, 0.0) for bound in (self._low, self._high))
        self._middle = np.clip(sum(0.5 * end for end in ends), self._low, self._high)
        self._resting = np.zeros(len(self._envs), dtype=bool)
        # Zeros where a copy rests from the start.
        self._obs = np.zeros((len(self._envs), self.spec.observation_dim), dtype=np.float32)

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh; see `Env.reset`."""
        check_dtype("key", key, torch.int64)
        check_shape("key", key, (self.tickets,))
        seeds = bits(key.cpu(), self.copies, stream=self.reset_stream, step=0)
        self.clock = 0
        self.faults.clear()
        self._resting[:] = False
        for copy, (env, seed) in enumerate(zip(self._envs, seeds.flatten().tolist(), strict=True)):
            observation, _ = env.reset(seed=seed)
            self._obs[copy] = self._read(observation, copy)
        self._ready = True
        return self._tensor(self._obs)

    def rest(self, resting: Tensor) -> None:
        """Let copies stand still until the next `reset`: `step` returns what they saw last.

        Args:
            resting: ``[P, E]`` bool.
        """
        check_dtype("resting", resting, torch.bool)
        check_shape("resting", resting, (self.tickets, self.copies))
        self._resting[:] = resting.flatten().cpu().numpy()

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; see `Env.step`. Rewards are float64, as they come.

        Raises:
            RuntimeError: `reset` was never called.
            TypeError, ValueError: an action of the wrong dtype, shape or range, or an observation
                or reward that is not what the environment's spaces promise.
        """
        if not self._ready:
            raise RuntimeError("reset must be called before step")
        actions = self._native(action)
        final_obs = self._obs.copy()
        reward = np.zeros(len(self._envs))
        terminated, truncated = np.zeros((2, len(self._envs)), dtype=bool)
        self.clock += 1
        for copy in np.flatnonzero(~self._resting).tolist():
            env = self._envs[copy]
            observation, gain, ended, cut, _ = env.step(actions[copy])
            reward[copy] = self._read_reward(gain, copy)
            terminated[copy], truncated[copy] = ended, cut and not ended
            final_obs[copy] = self._read(observation, copy, judged=not ended)
            self._obs[copy] = final_obs[copy]
            if ended or cut:
                observation, _ = env.reset()
                self._obs[copy] = self._read(observation, copy)
        return Step(
            self._tensor(self._obs),
            self._tensor(reward),
            self._tensor(terminated),
            self._tensor(truncated),
            self._tensor(final_obs),
        )

    def close(self) -> None:
        """Release what the environments hold; every one is closed, whatever one of them raises."""
        with ExitStack() as stack:
            for env in self._envs:
                stack.callback(env.close)
        self._envs.clear()
        self._ready = False

    def _native(self, action: Tensor) -> np.ndarray:
        space = self._action_space
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
        given = action.cpu().numpy()
        clipped = np.where(np.isnan(given), self._middle, np.clip(given, self._low, self._high))
        return clipped.reshape(-1, *space.shape).astype(space.dtype)  # type: ignore[misc]

    def _read(self, observation: Any, copy: int, *, judged: bool = True) -> np.ndarray:
        """One observation, flat and scaled, float32; it is copied."""
        space = self._observation_space
        if isinstance(space, Discrete):
            flat = np.zeros(int(space.n))
            index = int(observation) - int(space.start)
            if not 0 <= index < space.n:
                raise ValueError(
                    f"{self._who(copy)} must return observations in {space}, got {observation!r}"
                )
            flat[index] = 1.0
        else:
            given = np.asarray(observation)
            if given.shape != space.shape:
                raise ValueError(
                    f"{self._who(copy)} must return observations of its space's shape "
                    f"{space.shape}, got {given.shape}"
                )
            flat = given.reshape(-1).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((flat - self._offset) / self._scale).astype(np.float32)
        # Nobody looks at what a terminated episode ended with.
        if judged and not np.isfinite(scaled).all():
            what = f"observation {np.array2string(flat, threshold=8)}"
            if np.isfinite(flat).all():
                what += ", beyond float32: give its spec an offset and a scale"
            self._note(what, copy)
        return scaled

    def _read_reward(self, reward: Any, copy: int) -> float:
        try:
            value = float(reward)
        except (TypeError, ValueError):
            raise TypeError(
                f"{self._who(copy)} must return a number as reward, got {reward!r}"
            ) from None
        if not math.isfinite(value):
            self._note(f"reward {value}", copy)
        return value

    def _note(self, what: str, copy: int) -> None:
        ticket = copy // self.copies
        if ticket not in self.faults:
            self.faults[ticket] = f"{self.spec.name} returned {what}"
            warnings.warn(
                f"{self._who(copy)} returned {what}, at step {self.clock}: not finite, so that "
                "ticket's training diverges",
                stacklevel=4,
            )

    def _who(self, copy: int) -> str:
        ticket, own = divmod(copy, self.copies)
        return f"{self.spec.name} (ticket {ticket}, copy {own})"

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
    scale = 255.0 if _is_image(env.observation_space) else 1.0
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
        scale=(scale,) * observation_dim,
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


def _is_image(space: Space[Any]) -> bool:
    """Bytes from 0 to 255, which as they are would saturate any first layer."""
    return (
        isinstance(space, Box)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
