"""Any gymnasium environment for a population, one Python object per copy: general, not fast."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from sparse_tickets.kernels.errors import check_dtype, check_shape
from sparse_tickets.kernels.random import Stream, bits

from .pool import PREFIX, Pool, PoolTask
from .spec import EnvSpec, Step
from .stepping import ArrayLayout, Stepper, describe, flatten
from .workers import Shared, workers_for

__all__ = ["GymEnv", "find_registered", "gym_spec", "maker"]

Maker = Callable[[], gymnasium.Env]

_PILOT_SEED = 0


def gym_spec(make: Maker | str, name: str | None = None, *, pilot_steps: int = 10_000) -> EnvSpec:
    """The spec of a gymnasium environment, its observation scale and random return from a pilot.

    The pilot plays episodes of random actions, the same ones every time. An input's scale is its
    standard deviation, its offset its mean, or zero where that lies within one standard deviation
    of zero, both to two digits of the scale; an input that never moves keeps offset 0 and scale 1,
    as one-hot and boolean observations do, and images are divided by 255. A random policy may not
    see all that a good one sees: give numbers of your own with ``dataclasses.replace``.

    Args:
        make: a gymnasium id, ``module:id`` too, ``envpool:`` and a task of envpool, or a function
            without arguments that makes the environment.
        name: name of the spec; by default the id.
        pilot_steps: steps of the pilot. The random return is None where no episode ends within
            them; with 0 nothing is played, and offset and scale are 0 and 1.

    Raises:
        ValueError: a space is neither ``Box`` nor ``Discrete``, or the environment returns
            observations of another shape than it promises.
    """
    env = maker(make)()
    try:
        spec = _read_spec(env, name)
        return spec if pilot_steps == 0 else _pilot(env, spec, pilot_steps)
    finally:
        env.close()


class GymEnv:
    """E copies of a gymnasium environment for each of P tickets.

    Observations that are boxes are flattened, discrete ones become one-hot vectors; they are scaled
    in float64, then rounded to float32. Each copy is seeded once, by `reset`, from the Philox words
    of its ticket's key, and restarts from its own generator, so that a ticket's episodes do not
    depend on the tickets beside it. What an environment returns is copied before it acts again, so
    it may reuse its memory; its infos are not looked at.

    Copies may be spread over worker processes, which step them side by side, the same to the last
    bit. What an environment raises arrives as it is, with the copy it comes from as a note. Tasks
    of envpool are stepped by its threads instead, which change no result either.

    An observation or reward that is not finite is warned of, once per ticket, and passed on: it
    ends that ticket's training, not that of the others. An action that is not finite, of a policy
    that is lost already, reaches the environment as the bounds' middle.

    Args:
        make: a gymnasium id, ``envpool:`` and a task of envpool, or a function without arguments
            that makes one environment.
        tickets: P.
        copies: E.
        device: where tensors live; the environments themselves run on the CPU.
        spec: observation scale; by default what `gym_spec` says.
        reset_stream: stream of the seeds; evaluation uses another than training.
        workers: processes that step the copies, 1 for this one; by default what `use_workers` says.
            Other processes make copies of their own by ``make``, which has to be picklable by
            cloudpickle, and share nothing else with this one. Of envpool's tasks: threads.

    Attributes:
        clock: steps since `reset`.
        task: None: no fused kernel knows the physics.
        workers: how many processes or threads step the copies.
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
        workers: int | None = None,
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
        make_one = maker(make)
        env = make_one()
        try:
            self._action_space = env.action_space
            self._observation_space = env.observation_space
            read = _read_spec(env, None)
        finally:
            env.close()
        self.spec = read if spec is None else spec
        for name in ("observation_dim", "discrete", "action_dim"):
            expected, given = getattr(read, name), getattr(self.spec, name)
            if given != expected:
                raise ValueError(f"spec must have {name}={expected}, got {given}")
        self._offset = np.array(self.spec.offset)
        self._scale = np.array(self.spec.scale)
        self._low = np.array(self.spec.action_low, dtype=np.float32)
        self._high = np.array(self.spec.action_high, dtype=np.float32)
        bounded = np.isfinite(self._low) & np.isfinite(self._high)
        ends = (np.where(bounded, bound, 0.0) for bound in (self._low, self._high))
        self._middle = np.clip(sum(0.5 * end for end in ends), self._low, self._high)
        count, name = tickets * copies, self.spec.name
        shape, dtype = self._action_space.shape, self._action_space.dtype
        layout = ArrayLayout(count, read.observation_dim, shape, np.dtype(dtype).str)  # type: ignore[arg-type]
        by_name = isinstance(make_one, _Registered | PoolTask)
        self.workers = workers_for(workers, count, by_name)
        if isinstance(make_one, PoolTask):
            self._stepper: Pool | Shared | Stepper = Pool(make_one, layout.arrays(), self.workers)
        elif self.workers > 1:
            self._stepper = Shared(make_one, layout, self.workers, name, copies)
        else:
            self._stepper = Stepper(make_one, layout.arrays(), range(count), name, copies)

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh; see `Env.reset`."""
        check_dtype("key", key, torch.int64)
        check_shape("key", key, (self.tickets,))
        seeds = bits(key.cpu(), self.copies, stream=self.reset_stream, step=0)
        arrays = self._stepper.arrays
        self.clock = 0
        self.faults.clear()
        arrays.resting[:] = False
        self._stepper.reset(seeds.flatten().tolist())
        obs = self._scaled(arrays.obs)
        for copy in np.flatnonzero(~_finite(obs)).tolist():
            self._note_observation(arrays.obs[copy], copy)
        self._ready = True
        return self._tensor(obs)

    def rest(self, resting: Tensor) -> None:
        """Let copies stand still until the next `reset`: `step` returns what they saw last.

        Args:
            resting: ``[P, E]`` bool.
        """
        check_dtype("resting", resting, torch.bool)
        check_shape("resting", resting, (self.tickets, self.copies))
        self._stepper.arrays.resting[:] = resting.flatten().cpu().numpy()

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; see `Env.step`. Rewards are float64, as they come.

        Raises:
            RuntimeError: `reset` was never called, or a worker process ended.
            TypeError, ValueError: an action of the wrong dtype, shape or range, or an observation
                or reward that is not what the environment's spaces promise.
        """
        if not self._ready:
            raise RuntimeError("reset must be called before step")
        arrays = self._stepper.arrays
        arrays.action[:] = self._native(action)
        # What resting copies say.
        arrays.reward[:] = 0.0
        arrays.terminated[:] = arrays.truncated[:] = False
        arrays.final_obs[:] = arrays.obs
        self.clock += 1
        self._stepper.step()
        obs, final_obs = self._scaled(arrays.obs), self._scaled(arrays.final_obs)
        # Nobody looks at what a terminated episode ended with.
        finite = _finite(obs) & (_finite(final_obs) | arrays.terminated)
        for copy in np.flatnonzero(~(finite & np.isfinite(arrays.reward))).tolist():
            self._note_faults(obs, final_obs, copy)
        return Step(
            self._tensor(obs),
            self._tensor(arrays.reward),
            self._tensor(arrays.terminated),
            self._tensor(arrays.truncated & ~arrays.terminated),
            self._tensor(final_obs),
        )

    def close(self) -> None:
        """Release what the environments hold; every one is closed, whatever one of them raises."""
        self._stepper.close()
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

    def _scaled(self, flat: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return ((flat - self._offset) / self._scale).astype(np.float32)

    def _note_faults(self, obs: np.ndarray, final_obs: np.ndarray, copy: int) -> None:
        """Warn of what a copy's step gave that is not finite."""
        arrays = self._stepper.arrays
        if not math.isfinite(arrays.reward[copy]):
            self._note(f"reward {arrays.reward[copy]}", copy)
        if not (arrays.terminated[copy] or _finite(final_obs[copy])):
            self._note_observation(arrays.final_obs[copy], copy)
        if not _finite(obs[copy]):
            self._note_observation(arrays.obs[copy], copy)

    def _note_observation(self, flat: np.ndarray, copy: int) -> None:
        what = f"observation {np.array2string(flat, threshold=8)}"
        if _finite(flat):
            what += ", beyond float32: give its spec an offset and a scale"
        self._note(what, copy)

    def _note(self, what: str, copy: int) -> None:
        ticket = copy // self.copies
        if ticket not in self.faults:
            self.faults[ticket] = f"{self.spec.name} returned {what}"
            warnings.warn(
                f"{describe(self.spec.name, self.copies, copy)} returned {what}, at step "
                f"{self.clock}: not finite, so that ticket's training diverges",
                stacklevel=5,
            )

    def _tensor(self, values: np.ndarray) -> Tensor:
        shape = (self.tickets, self.copies, *values.shape[1:])
        return torch.from_numpy(values.reshape(shape)).to(self.device, copy=True)


class _Registered:
    """Makes the environment of a gymnasium id; elsewhere too, where nobody registered it."""

    def __init__(self, name: str) -> None:
        self._known: Any = name

    def __call__(self) -> gymnasium.Env:
        env = gymnasium.make(self._known, disable_env_checker=True)
        self._known = env.spec
        return env

    def __reduce__(self) -> Any:
        return partial(gymnasium.make, self._known, disable_env_checker=True).__reduce__()


def maker(make: Maker | str) -> Maker:
    """A function that makes an environment, also of its name."""
    if not isinstance(make, str):
        return make
    return PoolTask(make) if make.startswith(PREFIX) else _Registered(make)


def find_registered(name: str) -> gymnasium.envs.registration.EnvSpec:
    """What gymnasium has registered by an id; of ``module:id`` the module is imported first.

    Raises:
        gymnasium.error.Error: it has none.
        ImportError, ValueError: the module cannot be imported, or the id is one of envpool's tasks.
    """
    if name.startswith(PREFIX):
        raise ValueError(f"gymnasium knows no tasks of envpool, got {name!r}")
    module, colon, own = name.rpartition(":")
    if colon:
        importlib.import_module(module)
    return gymnasium.spec(own)


def _finite(values: np.ndarray) -> Any:
    return np.isfinite(values).all(-1)


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


def _pilot(env: gymnasium.Env, spec: EnvSpec, most: int) -> EnvSpec:
    """A spec with the scale and the random return that random actions find."""
    space = env.observation_space
    scaled = isinstance(space, Box) and space.dtype != bool and not _is_image(space)
    env.action_space.seed(_PILOT_SEED)
    # Moments about the first observation: squares of what is far from zero would cancel.
    origin, (first, second) = None, np.zeros((2, spec.observation_dim))
    returns: list[float] = []
    steps = 0
    while steps < most:
        observation, _ = env.reset(seed=None if steps else _PILOT_SEED)
        total, ended = 0.0, False
        while steps < most and not ended:
            if scaled:
                flat = flatten(space, observation, lambda: spec.name).astype(np.float64)
                origin = flat if origin is None else origin
                with np.errstate(over="ignore", invalid="ignore"):
                    first += flat - origin
                    second += (flat - origin) ** 2
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, ended = total + float(reward), terminated or truncated
            steps += 1
        if ended:
            returns.append(total)
    random_return = float(np.mean(returns)) if returns else math.nan
    spec = replace(spec, random_return=random_return if math.isfinite(random_return) else None)
    if origin is None:
        return spec
    with np.errstate(over="ignore", invalid="ignore"):
        mean = origin + first / steps
        std = np.sqrt(np.maximum(second / steps - (first / steps) ** 2, 0.0))
    pairs = [_rounded(*pair) for pair in zip(mean.tolist(), std.tolist(), strict=True)]
    offset, scale = zip(*pairs, strict=True)
    return replace(spec, offset=offset, scale=scale)


def _rounded(mean: float, std: float) -> tuple[float, float]:
    """Offset and scale to two digits of the scale; 0 and 1 where an input never moves."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        return 0.0, 1.0
    digits = 1 - math.floor(math.log10(std))
    return (0.0 if abs(mean) < std else round(mean, digits)), round(std, digits)


def _is_image(space: Space[Any]) -> bool:
    """Bytes from 0 to 255, which as they are would saturate any first layer."""
    return (
        isinstance(space, Box)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
