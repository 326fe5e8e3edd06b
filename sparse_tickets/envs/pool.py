"""Tasks of envpool: simulators in C++ whose threads step all copies of a population in one call."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as Registration
from gymnasium.spaces import Discrete, Space

from sparse_tickets.kernels.threads import end_idle_threads

from .stepping import Arrays

__all__ = ["PREFIX", "Pool", "PoolTask"]

PREFIX = "envpool:"
# How some of envpool's tasks say that they have no time limit.
_ENDLESS = (0, 2**31 - 1)


class PoolTask:
    """Makes a task of envpool: one copy by a call, as gymnasium has it, or a `Pool` of them.

    Args:
        name: ``envpool:`` and one of ``envpool.list_all_envs()``.

    Attributes:
        name: as given.
        limit: steps after which an episode is truncated, or None.
        threshold: mean return from which envpool counts the task as solved, or None.
        observation_space: of one copy.
        action_space: of one copy.

    Raises:
        ValueError: envpool is not installed, has no such task, or more than one player plays it.
    """

    def __init__(self, name: str) -> None:
        try:
            import envpool
        except ImportError as error:
            raise ValueError(
                f"env {name} needs envpool: pip install 'sparse-tickets[envpool]'"
            ) from error
        self.name, self._task = name, name.removeprefix(PREFIX)
        known = envpool.list_all_envs()
        if self._task not in known:
            close = difflib.get_close_matches(self._task, known)
            raise ValueError(
                f"env must be {PREFIX} and one of envpool.list_all_envs(), perhaps "
                f"{' or '.join(close or known[:1])}, got {name!r}"
            )
        with _unwarned():
            spec = envpool.make_spec(self._task)
            self.observation_space: Space[Any] = spec.gymnasium_observation_space
            self.action_space: Space[Any] = spec.gymnasium_action_space
        players = spec.config.max_num_players
        if players != 1:
            raise ValueError(f"env must be a task of one player, got {name!r} of {players}")
        limit = spec.config.max_episode_steps
        self.limit = None if limit in _ENDLESS else int(limit)
        self.threshold = getattr(spec.config, "reward_threshold", None)

    def __call__(self) -> gymnasium.Env:
        env = _Single(self)
        return env if self.limit is None else gymnasium.wrappers.TimeLimit(env, self.limit)

    def pool(self, seeds: Sequence[int], threads: int) -> Any:
        """As many copies as seeds, each below 2^31; they know no time limit.

        envpool would call an episode truncated that ends by itself in its last step.
        """
        import envpool

        limit = {} if self.limit is None else {"max_episode_steps": self.limit + 1}
        seeded = {"num_envs": len(seeds), "env_seed": list(seeds)}
        with _unwarned():
            pool = envpool.make_gymnasium(self._task, num_threads=threads, **seeded, **limit)
            _ = pool.observation_space  # Made, and warned of, when asked for first.
        return pool


class Pool:
    """Copies of a task of envpool; otherwise what `stepping.Stepper` is.

    Args:
        task: which.
        arrays: of all copies.
        threads: that step them.

    Attributes:
        arrays: as given.
    """

    def __init__(self, task: PoolTask, arrays: Arrays, threads: int) -> None:
        self.arrays = arrays
        self._task, self._threads = task, threads
        self._steps = np.zeros(len(arrays.reward), dtype=np.int64)
        self._pool: Any = None

    def reset(self, seeds: Sequence[int]) -> None:
        """Start every copy afresh, from a seed of its own: the upper 31 bits of 32."""
        end_idle_threads()
        self.close()
        # Copies are seeded as they are made, and never again.
        self._pool = self._task.pool([seed >> 1 for seed in seeds], self._threads)
        self.arrays.obs[:] = self._flat(self._pool.reset()[0])
        self._steps[:] = 0

    def step(self) -> None:
        """Act in every copy that does not rest, and restart those whose episode ends."""
        arrays, limit = self.arrays, self._task.limit
        rows = np.flatnonzero(~arrays.resting)
        if not rows.size:
            return
        end_idle_threads()
        observation, reward, ended, cut, _ = self._pool.step(arrays.action[rows], rows)
        self._steps[rows] += 1
        if limit is not None:
            cut = cut | (self._steps[rows] >= limit)
        arrays.reward[rows], arrays.terminated[rows], arrays.truncated[rows] = reward, ended, cut
        arrays.obs[rows] = arrays.final_obs[rows] = self._flat(observation)
        over = rows[ended | cut]
        if over.size:
            # envpool itself would restart them at their next step, and pass over its action.
            arrays.obs[over] = self._flat(self._pool.reset(over)[0])
            self._steps[over] = 0

    def close(self) -> None:
        """Release the copies and their threads."""
        self._pool = None

    def _flat(self, observation: np.ndarray) -> np.ndarray:
        space = self._task.observation_space
        if isinstance(space, Discrete):
            return np.eye(int(space.n))[observation - space.start]
        return observation.reshape(len(observation), -1)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without gymnasium's warning of bounds that float32 rounds, which nobody can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered")
        yield


class _Single(gymnasium.Env):
    """A task of envpool as gymnasium has environments."""

    def __init__(self, task: PoolTask) -> None:
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self.spec = Registration(
            task.name, max_episode_steps=task.limit, reward_threshold=task.threshold
        )
        self._task = task
        self._pool: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or self._pool is None:
            drawn = int(self.np_random.integers(2**31)) if seed is None else seed >> 1
            self._pool = self._task.pool([drawn], 1)
        observation, _ = self._pool.reset()
        return observation[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, ended, cut, _ = self._pool.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(ended[0]), bool(cut[0]), {}

    def close(self) -> None:
        self._pool = None
