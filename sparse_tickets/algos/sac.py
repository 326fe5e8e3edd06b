"""Soft actor-critic (Haarnoja et al., 2018) of a population of tickets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_tickets.algos.algorithm import Algorithm, Demonstrations, Schedule
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.algos.off_policy import ReplayBudget, ReplayIteration, learn
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env
from sparse_tickets.kernels import sac, squashed
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.errors import check_shape
from sparse_tickets.kernels.random import Stream, normal, uniform
from sparse_tickets.kernels.sac import SACConfig, sac_update_
from sparse_tickets.kernels.sac.reference import draw_noise, loss
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.kernels.transitions import take
from sparse_tickets.population import Population
from sparse_tickets.settings import above, at_least, check_fields, within

__all__ = ["ALGORITHM", "SAC", "Iteration", "act", "explore", "train"]


@dataclass(frozen=True)
class SAC(ReplayBudget):
    """Hyper-parameters of SAC, rl-zoo3's for Pendulum; the learning rate falls to zero."""

    steps: int = 20_000
    """Environment steps per ticket."""
    copies: int = 4
    """Environment copies a ticket acts in side by side."""
    horizon: int = 2
    """Steps per copy between runs of updates."""
    updates: int = 8
    """Updates after each copies x horizon steps."""
    minibatch: int = 256
    """Transitions per update, drawn with replacement."""
    capacity: int = 1_000_000
    """Transitions in each ticket's replay buffer."""
    warmup: int = 100
    """Steps of uniformly random actions before the first update."""
    learning_rate: float = 1e-3
    """Adam's, in the first iteration: of actor, critics and temperature."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """Share of the critics that goes into their targets after each update."""
    target_entropy: float | None = None
    """Of the policy, which the temperature is to bring about; default: -1 per number of an
    action."""
    n_step: int = 1
    """Steps whose rewards a transition adds up."""

    def __post_init__(self) -> None:
        counts = ("steps", "copies", "horizon", "updates", "minibatch", "n_step")
        check_fields(
            self,
            dict.fromkeys(counts, at_least(1))
            | dict.fromkeys(("warmup", "learning_rate"), at_least(0))
            | {"gamma": within(0, 1), "tau": above(0)},
            prefix="sac.",
        )
        if self.tau > 1:
            raise ValueError(f"sac.tau must be at most 1, got {self.tau}")
        self.check_budget("sac.")

    def config(self, actions: int) -> SACConfig:
        """What one run of updates needs to know, for actions of so many numbers."""
        entropy = -float(actions) if self.target_entropy is None else self.target_entropy
        return SACConfig(self.updates, self.minibatch, entropy, self.tau)


def train(
    settings: SAC,
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
    """Train every ticket of a population by SAC; nothing is computed across tickets.

    Greedy evaluation takes the squashed mean, sampled evaluation draws from the policy.

    Args:
        settings: the hyper-parameters.
        env_name: a registered environment or any gymnasium id, of continuous actions in bounds.
        population: changed in place; of an arena that is squashed, with critics.
        key: ``[P]`` int64; all randomness of a ticket's training comes from its key.
        evaluation: how returns are measured; the protocol's by default.
        first_iteration: where the schedule starts, for tickets rewound to a later step; the replay
            buffer starts empty all the same, and fills before the first update.
        rewind_iteration: snapshot the parameters before this iteration.
        on_iteration: called after each iteration with the agent-steps taken in it.
        pruning: prune and regrow while training, by the gradient steps taken; masks change between
            iterations, the targets' with them.

    Returns:
        Curves, returns, final and best weights.

    Raises:
        ValueError: an unknown environment, one of discrete actions, a population of another kind,
            a key that does not fit the population, or pruning where no update is made.
    """
    check_shape("key", key, (len(population),))
    _check(population.arena)
    return learn(
        "sac.",
        settings,
        Iteration,
        env_name,
        population,
        key,
        evaluation=evaluation,
        first_iteration=first_iteration,
        rewind_iteration=rewind_iteration,
        on_iteration=on_iteration,
        pruning=pruning,
    )


def act(population: Population, obs: Tensor, key: Tensor, clock: int | Tensor) -> Tensor:
    """Actions ``[P, E, A]`` in [-1, 1], drawn from the policies.

    Args:
        population: of squashed policies.
        obs: ``[P, E, D]``.
        key: ``[P]`` int64.
        clock: number of this step.
    """
    head, shape = population.actor(obs), (*obs.shape[:2], population.arena.actions)
    noise = normal(key, shape[1] * shape[2], stream=Stream.ACTION, step=clock)
    return squashed.sample(head, noise.view(shape))[0]


def explore(key: Tensor, copies: int, actions: int, clock: int | Tensor) -> Tensor:
    """Uniformly random actions ``[P, E, A]`` in [-1, 1)."""
    chance = uniform(key, copies * actions, stream=Stream.EXPLORE, step=clock)
    return 2.0 * chance.view(len(key), copies, actions) - 1.0


class Iteration(ReplayIteration):
    """SAC's; see `ReplayIteration`."""

    def __init__(
        self, settings: SAC, env: Env, population: Population, key: Tensor, first: int
    ) -> None:
        super().__init__(settings, env, population, key, first)
        self._settings = settings
        self._config = settings.config(population.arena.actions)

    def __call__(self) -> None:
        settings, population = self._settings, self._population
        env, buffer = self._env, self.buffer
        random = self._number * settings.batch < settings.warmup
        bounds = env.spec.action_low, env.spec.action_high
        with self._acting():
            for _ in range(settings.horizon):
                if random:
                    action = explore(self._key, env.copies, population.arena.actions, env.clock)
                else:
                    action = act(population, self._obs, self._key, env.clock)
                step = env.step(squashed.within_bounds(action, *bounds))
                buffer.add(self._obs, action, step)
                self._obs = step.obs
        if self._number >= self.learns_from:
            self.gradient_norm = sac_update_(
                population.parameters,
                population.arena,
                self._target,
                buffer.transitions,
                buffer.stored,
                self._key,
                self._number * settings.updates,
                self.learning_rate,
                self._config,
                density=population.density,
            ).grad_norm
        self._number += 1

    def dense_gradient(self) -> Tensor:
        """Gradient ``[P, prunable]`` of the losses of all transitions that the last call's updates
        drew, by pruned weights too."""
        settings, population, config = self._settings, self._population, self._config
        arena, first = population.arena, (self._number - 1) * settings.updates
        replay, stored = self.buffer.transitions, self.buffer.stored
        batch = take(replay, stored, self._key, first, settings.updates, settings.minibatch)
        noise = draw_noise(self._key, first, config, settings.updates, arena.actions)
        noise = noise.transpose(1, 2).flatten(2, 3)
        weight, every = population.parameters.weight, torch.ones_like(population.parameters.mask)
        arguments = (arena, batch, noise, self._target, config)
        dense, _ = gradient(weight, every, loss, arguments)
        return dense[:, : arena.prunable]


def _check(arena: Arena) -> None:
    if not arena.squashed or arena.critic is None:
        raise ValueError(
            "sac trains a squashed policy with two critics: build its arena by "
            "policy_arena(spec, squashed=True)"
        )


class _SoftActorCritic:
    """SAC as a sweep knows it, with a budget of its own."""

    name, title = "sac", "SAC"
    settings = SAC
    has_critic, imitates, squashed = True, False, True

    def train(
        self,
        settings: SAC,
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
        settings: SAC,
        budget: PPO,
        env: Env,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
    ) -> Iteration:
        # Nobody waits for a warmup to be told how long the rest takes.
        return Iteration(replace(settings, warmup=0), env, population, key, 0)

    def plan(self, arena: Arena, device: torch.device, density: float) -> Plan:
        _check(arena)
        return sac.plan(arena, device, density=density)


ALGORITHM: Algorithm = _SoftActorCritic()
