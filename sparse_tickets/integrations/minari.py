"""Minari data sets (extra ``minari``): read to be cloned, written from policies that act.

Minari is the public format of offline reinforcement learning: episodes of observations, actions and
rewards. A data set counts as one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from sparse_tickets.envs import Env, EnvSpec, Step, open_env
from sparse_tickets.envs.gym_adapter import find_registered
from sparse_tickets.kernels.random import Stream
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.population import Population

try:
    import minari
except ImportError as error:
    raise ImportError(
        "sparse_tickets.integrations.minari needs minari: pip install 'sparse-tickets[minari]'"
    ) from error

__all__ = ["load", "read", "write"]

# Log-probability of what was not done, log deviation of what was: finite, and as good as none.
_NEVER, _EXACT = -87.0, -10.0


def load(dataset: str, env: EnvSpec) -> minari.MinariDataset:
    """A data set on this machine, if it is one of an environment.

    Raises:
        ValueError: there is none of this id, or it is of another environment or other spaces.
    """
    try:
        found = minari.load_dataset(dataset)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"dataset must be a Minari data set on this machine, got {dataset!r}: "
            f"minari download {dataset} ({error})"
        ) from error
    recorded = found.env_spec
    if recorded is not None and recorded.id != env.name:
        raise ValueError(f"dataset {dataset} is of {recorded.id}, not of {env.name}")
    seen, done = found.observation_space, found.action_space
    boxes = isinstance(seen, gymnasium.spaces.Box)
    if not boxes or int(np.prod(seen.shape)) != env.observation_dim:
        raise ValueError(f"dataset {dataset} must hold {env.observation_dim} numbers, has {seen}")
    if env.discrete:
        fits = isinstance(done, gymnasium.spaces.Discrete) and done.n == env.action_dim
    else:
        fits = isinstance(done, gymnasium.spaces.Box) and int(np.prod(done.shape)) == env.action_dim
    if not fits:
        kind = "choices" if env.discrete else "numbers"
        raise ValueError(
            f"dataset {dataset} must have actions of {env.action_dim} {kind}, has {done}"
        )
    return found


def read(datasets: Sequence[str], env: EnvSpec, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Transitions of D data sets for `clone_update_`: as many of each, the first ones.

    What is known of an expert are the actions it took: a student that imitates them maximises their
    likelihood.

    Args:
        datasets: D ids of data sets on this machine.
        env: spaces, and the scale that observations are brought to.
        steps: transitions of each, at most; the shortest data set decides otherwise.

    Returns:
        ``obs [D, n, features]``, normalised, and ``target [D, n, A]`` log-probabilities, or
        ``[D, n, 2A]`` mean and log standard deviation.

    Raises:
        ValueError: a data set that is not there or does not fit the environment, or no transitions.
    """
    found = [load(dataset, env) for dataset in datasets]
    counts = [int(each.total_steps) for each in found]
    number = min(counts if steps is None else [*counts, steps], default=0)
    if number < 1:
        raise ValueError(f"datasets must each hold a transition, got {counts} in {datasets}")
    parts = [_transitions(each, env, number) for each in found]
    obs, target = (torch.stack(part) for part in zip(*parts, strict=True))
    return obs, target


def _transitions(dataset: minari.MinariDataset, env: EnvSpec, number: int) -> tuple[Tensor, Tensor]:
    """The first transitions of a data set: ``obs [n, features]`` and ``target``."""
    seen, done, left = [], [], number
    for episode in dataset.iterate_episodes():
        length = min(len(episode), left)
        seen.append(np.asarray(episode.observations)[:length].reshape(length, -1))
        done.append(np.asarray(episode.actions)[:length].reshape(length, -1))
        left -= length
        if not left:
            break
    offset, scale = np.asarray(env.offset), np.asarray(env.scale)
    obs = torch.from_numpy(((np.concatenate(seen) - offset) / scale).astype(np.float32))
    actions = np.concatenate(done)
    if env.discrete:
        choice = torch.from_numpy(actions[:, 0].astype(np.int64)) - int(dataset.action_space.start)
        target = torch.full((number, env.action_dim), _NEVER, dtype=torch.float32, device="cpu")
        return obs, target.scatter_(1, choice[:, None], 0.0)
    mean = torch.from_numpy(actions.astype(np.float32))
    return obs, torch.cat([mean, torch.full_like(mean, _EXACT)], dim=1)


def write(
    datasets: Sequence[str],
    policies: Population,
    env_name: str,
    key: Tensor,
    steps: int,
    *,
    copies: int = 16,
    **about: Any,
) -> list[minari.MinariDataset]:
    """Let P policies act, their actions sampled, and write what each did as a data set.

    The last episode of every copy is cut off, and marked as truncated.

    Args:
        datasets: P ids to write, such as ``cartpole/expert-0-v0``.
        policies: P policies.
        env_name: where they act.
        key: ``[P]`` int64, all randomness.
        steps: transitions of each, at least; a multiple of ``copies`` is recorded.
        copies: environment copies that a policy acts in side by side.
        **about: of ``minari.create_dataset_from_buffers``: author, description, ...

    Returns:
        The data sets.

    Raises:
        ValueError: not as many ids as policies, or one that is taken or no id of Minari's.
    """
    if len(datasets) != len(policies):
        raise ValueError(f"datasets must be one for each of {len(policies)} policies: {datasets}")
    with open_env(env_name, len(policies), copies, device=key.device) as env:
        recorded = _Recorded(env)
        obs, length = recorded.reset(key), -(-steps // copies)
        parameters, arena = policies.parameters, policies.arena
        rollout(
            parameters,
            arena,
            recorded,
            obs,
            key,
            length,
            density=policies.density,
            stream=Stream.DATASET_ACTION,
        )
    about = {"env": _gymnasium_spec(env_name), **_spaces(env.spec), **about}
    return [
        minari.create_dataset_from_buffers(
            dataset_id=dataset, buffer=recorded.episodes(ticket), **about
        )
        for ticket, dataset in enumerate(datasets)
    ]


def _gymnasium_spec(env_name: str) -> Any:
    """What Minari can make the environment from again; None where gymnasium does not know it."""
    try:
        return find_registered(env_name)
    except (gymnasium.error.Error, ImportError, ValueError):
        return None


def _spaces(env: EnvSpec) -> dict[str, Any]:
    spaces = gymnasium.spaces
    wide = spaces.Box(-np.inf, np.inf, (env.observation_dim,), np.float32)
    if env.discrete:
        return {"observation_space": wide, "action_space": spaces.Discrete(env.action_dim)}
    low, high = (np.asarray(side, np.float32) for side in (env.action_low, env.action_high))
    return {"observation_space": wide, "action_space": spaces.Box(low, high)}


class _Recorded:
    """An environment that keeps its steps; no task, so that every step passes here."""

    task = None

    def __init__(self, env: Env) -> None:
        self._env = env
        self.spec, self.device = env.spec, env.device
        self.tickets, self.copies = env.tickets, env.copies
        self._seen: list[Tensor] = []
        self._steps: list[Step] = []
        self._actions: list[Tensor] = []

    @property
    def clock(self) -> Any:
        return self._env.clock

    def reset(self, key: Tensor) -> Tensor:
        self._seen.append(self._env.reset(key))
        return self._seen[0]

    def step(self, action: Tensor) -> Step:
        step = self._env.step(action)
        self._actions.append(action.clone())
        self._steps.append(step)
        self._seen.append(step.obs)
        return step

    def episodes(self, ticket: int) -> list[Any]:
        """The episodes of a ticket, copy after copy, observations as they were before scaling."""
        spec = self.spec

        def array(parts: Sequence[Tensor]) -> np.ndarray:
            return torch.stack([part[ticket] for part in parts]).cpu().numpy()

        def raw(parts: Sequence[Tensor]) -> np.ndarray:
            values = array(parts) * np.asarray(spec.scale) + np.asarray(spec.offset)
            return values.astype(np.float32)

        before, after = raw(self._seen[:-1]), raw([step.final_obs for step in self._steps])
        actions = array(self._actions)
        if not spec.discrete:
            actions = np.clip(actions, spec.action_low, spec.action_high).astype(np.float32)
        rewards = array([step.reward for step in self._steps])
        terminated = array([step.terminated for step in self._steps])
        truncated = array([step.truncated for step in self._steps])
        truncated[-1] |= ~terminated[-1]
        found: list[Any] = []
        for copy in range(self.copies):
            begin = 0
            for last in np.flatnonzero(terminated[:, copy] | truncated[:, copy]).tolist():
                here = slice(begin, last + 1)
                episode = minari.data_collector.EpisodeBuffer(
                    id=len(found),
                    observations=np.concatenate([before[here, copy], after[last : last + 1, copy]]),
                    actions=actions[here, copy],
                    rewards=rewards[here, copy],
                    terminations=terminated[here, copy],
                    truncations=truncated[here, copy],
                )
                found.append(episode)
                begin = last + 1
        return found
