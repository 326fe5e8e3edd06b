"""Proximal policy optimisation (Schulman et al., 2017) of a population of tickets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.algos.algorithm import Algorithm, Demonstrations, Schedule
from sparse_tickets.algos.budget import IterationBudget
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.algos.loop import TrainingIteration, run
from sparse_tickets.algos.replay import can_replay, replayed
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env, open_env
from sparse_tickets.kernels import ppo
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.errors import check_shape
from sparse_tickets.kernels.ppo import Batch, PPOConfig, Stats, ppo_update_
from sparse_tickets.kernels.ppo.reference import loss
from sparse_tickets.kernels.returns import gae
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.population import Population
from sparse_tickets.settings import above, at_least, check_fields, within

__all__ = ["ALGORITHM", "PPO", "Iteration", "train"]


@dataclass(frozen=True)
class PPO(IterationBudget):
    """Hyper-parameters of PPO, as in CleanRL; the learning rate falls linearly to zero."""

    steps: int = 500_000
    """Environment steps per ticket."""
    copies: int = 4
    """Environment copies a ticket acts in side by side."""
    horizon: int = 128
    """Steps per copy between updates."""
    epochs: int = 4
    """Passes over each batch of copies x horizon samples."""
    minibatches: int = 4
    """Minibatches per pass."""
    learning_rate: float = 2.5e-4
    """Adam's, in the first iteration."""
    gamma: float = 0.99
    """Discount."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    clip_value: bool = True
    """Clip the value loss too, at the same range; --ppo.no-clip-value turns it off."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy, a bonus."""
    value_coef: float = 0.5
    """Weight of the value loss, half a squared error."""
    max_norm: float = 0.5
    """Each ticket's gradient is clipped to this norm, actor and critic jointly."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            dict.fromkeys(("steps", "copies", "horizon", "epochs", "minibatches"), at_least(1))
            | dict.fromkeys(("learning_rate", "entropy_coef", "value_coef"), at_least(0))
            | dict.fromkeys(("gamma", "lam"), within(0, 1))
            | dict.fromkeys(("clip", "max_norm"), above(0)),
            prefix="ppo.",
        )
        self.check_budget("ppo.")
        if self.batch % self.minibatches:
            raise ValueError(
                f"ppo.minibatches must divide copies * horizon = {self.batch}, "
                f"got {self.minibatches}"
            )

    def config(self) -> PPOConfig:
        """What one update needs to know."""
        return PPOConfig(
            epochs=self.epochs,
            minibatches=self.minibatches,
            clip=self.clip,
            clip_value=self.clip_value,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            max_norm=self.max_norm,
        )


def train(
    settings: PPO,
    env_name: str,
    population: Population,
    key: Tensor,
    *,
    evaluation: Evaluation | None = None,
    first_iteration: int = 0,
    rewind_iteration: int | None = None,
    on_iteration: Callable[[int], None] | None = None,
    pruning: Pruning | None = None,
) -> Result:
    """Train every ticket of a population by PPO; nothing is computed across tickets.

    Args:
        settings: the hyper-parameters.
        env_name: a registered environment or any gymnasium id.
        population: changed in place.
        key: ``[P]`` int64; all randomness of a ticket's training comes from its key.
        evaluation: how returns are measured; the protocol's by default.
        first_iteration: where the schedule starts, for tickets rewound to a later step.
        rewind_iteration: snapshot the parameters before this iteration.
        on_iteration: called after each iteration with the agent-steps taken in it.
        pruning: prune and regrow while training; masks change between iterations.

    Returns:
        Curves, returns, final and best weights.

    Raises:
        ValueError: an unknown environment, or a key that does not fit the population.
    """
    check_shape("key", key, (len(population),))
    with open_env(env_name, len(population), settings.copies, device=key.device) as env:
        iterate = Iteration(settings, env, population, key, first_iteration)
        advance: Callable[[], object] = iterate
        # A graph replays the kernels of the density it was captured at.
        if pruning is None and can_replay(env, population):
            env.keep_clock_on_device()
            iterate.keep_count_on_device()
            advance = replayed(iterate)
        return run(
            iterate,
            settings,
            env_name,
            population,
            key,
            advance=advance,
            env=env,
            evaluation=evaluation,
            first_iteration=first_iteration,
            rewind_iteration=rewind_iteration,
            on_iteration=on_iteration,
            pruning=pruning,
        )


class Iteration(TrainingIteration):
    """Rollout, advantages and update; each call goes on from the last.

    Args:
        settings: the hyper-parameters.
        env: the environment; reset here.
        population: changed in place.
        key: ``[P]`` int64.
        first: number of the first iteration.

    Attributes:
        learning_rate: ``[P]`` of the next call.
    """

    def __init__(
        self, settings: PPO, env: Env, population: Population, key: Tensor, first: int
    ) -> None:
        super().__init__(settings, population, settings.epochs * settings.minibatches, first)
        self._settings, self._config = settings, settings.config()
        self._env, self._population, self._key = env, population, key
        self._obs = env.reset(key)
        self._number: int | Tensor = first
        self._batch: Batch | None = None

    def keep_count_on_device(self) -> None:
        """Count iterations in a tensor, so that a captured CUDA graph counts on."""
        self._number = torch.as_tensor(self._number, dtype=torch.int64, device=self._key.device)

    def __call__(self) -> Stats:
        """What the update says of itself."""
        settings, population = self._settings, self._population
        arena, parameters, density = population.arena, population.parameters, population.density
        experience, obs = rollout(
            parameters, arena, self._env, self._obs, self._key, settings.horizon, density=density
        )
        advantage, target = gae(
            experience.reward,
            experience.value,
            experience.next_value,
            experience.terminated,
            experience.truncated,
            settings.gamma,
            settings.lam,
        )
        samples = experience.flatten()
        batch = Batch(
            samples.obs,
            samples.action,
            samples.logp,
            samples.value,
            advantage.flatten(1),
            target.flatten(1),
        )
        self._batch = batch
        stats = ppo_update_(
            parameters,
            arena,
            batch,
            self._key,
            self._number,
            self.learning_rate,
            self._config,
            density=density,
        )
        # A replay writes it anew, in the same memory.
        self.gradient_norm = stats.grad_norm
        # In place: a replay looks where the capture did.
        self._obs.copy_(obs)
        self._number += 1
        return stats

    @property
    def samples(self) -> Batch:
        """What the last call learnt from.

        Raises:
            RuntimeError: there was no call yet.
        """
        if self._batch is None:
            raise RuntimeError("an iteration must be run before it has samples")
        return self._batch

    def dense_gradient(self) -> Tensor:
        """Gradient ``[P, prunable]`` of the loss of the last call's samples, by pruned weights too.

        Raises:
            RuntimeError: there was no call yet.
        """
        arena, mask = self._population.arena, self._population.parameters.mask
        weight, every = self._population.parameters.weight, torch.ones_like(mask)
        dense, _ = gradient(weight, every, loss, (arena, self.samples, self._config))
        return dense[:, : arena.prunable]


class _ProximalPolicyOptimisation:
    """PPO as a sweep knows it: its settings are the budget."""

    name, title = "ppo", "PPO"
    settings = PPO
    has_critic, imitates = True, False

    def train(
        self,
        settings: PPO,
        budget: PPO,
        env_name: str,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
        schedule: Schedule,
    ) -> Result:
        return train(settings, env_name, population, key, **schedule)

    def iteration(
        self,
        settings: PPO,
        budget: PPO,
        env: Env,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
    ) -> Iteration:
        return Iteration(budget, env, population, key, 0)

    def plan(self, arena: Arena, device: torch.device, density: float) -> Plan:
        return ppo.plan(arena, device, density=density)


ALGORITHM: Algorithm = _ProximalPolicyOptimisation()
