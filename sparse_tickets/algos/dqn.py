"""Deep Q-learning (Mnih et al., 2015) of a population of tickets."""

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
from sparse_tickets.kernels import dqn
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.dqn import DQNConfig, check_loss, dqn_update_
from sparse_tickets.kernels.dqn.reference import draw, loss, wanted
from sparse_tickets.kernels.errors import check_shape
from sparse_tickets.kernels.random import Stream, integers, uniform
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.population import Population
from sparse_tickets.settings import above, at_least, check_fields, within

__all__ = ["ALGORITHM", "DQN", "Iteration", "explore", "train"]


@dataclass(frozen=True)
class DQN(ReplayBudget):
    """Hyper-parameters of DQN, near rl-zoo3's for CartPole; the learning rate falls to zero."""

    steps: int = 50_000
    """Environment steps per ticket."""
    copies: int = 8
    """Environment copies a ticket acts in side by side."""
    horizon: int = 32
    """Steps per copy between runs of updates."""
    updates: int = 128
    """Updates after each copies x horizon steps."""
    minibatch: int = 64
    """Transitions per update, drawn with replacement."""
    capacity: int = 100_000
    """Transitions in each ticket's replay buffer."""
    warmup: int = 1_000
    """Steps of random actions before the first update."""
    learning_rate: float = 2.3e-3
    """Adam's, in the first iteration."""
    gamma: float = 0.99
    """Discount."""
    target_interval: int = 10
    """Steps after which the target network becomes the network, before the next updates."""
    exploration: float = 0.16
    """Share of the steps over which the probability of a random action falls linearly from 1."""
    epsilon: float = 0.04
    """Probability of a random action from then on."""
    double: bool = False
    """Let the network choose the next action that the target network values; --dqn.no-double turns
    it off."""
    loss: str = "huber"
    """Of the error: huber, as Stable-Baselines3's, or squared, without a half, as CleanRL's."""
    n_step: int = 1
    """Steps whose rewards a transition adds up."""
    max_norm: float = 10.0
    """Each ticket's gradient is clipped to this norm."""

    def __post_init__(self) -> None:
        counts = ("steps", "copies", "horizon", "updates", "minibatch", "target_interval", "n_step")
        check_fields(
            self,
            dict.fromkeys(counts, at_least(1))
            | dict.fromkeys(("warmup", "learning_rate"), at_least(0))
            | dict.fromkeys(("gamma", "exploration", "epsilon"), within(0, 1))
            | {"max_norm": above(0)},
            prefix="dqn.",
        )
        check_loss("dqn.loss", self.loss)
        self.check_budget("dqn.")

    def epsilon_at(self, iteration: int) -> float:
        """Probability of a random action: 1 while warming up, else linear from 1 to `epsilon`."""
        step = iteration * self.batch
        if step < self.warmup:
            return 1.0
        share = min(step / max(self.exploration * self.steps, 1.0), 1.0)
        return 1.0 + share * (self.epsilon - 1.0)

    def config(self) -> DQNConfig:
        """What one run of updates needs to know."""
        return DQNConfig(self.updates, self.minibatch, self.double, self.loss, self.max_norm)


def train(
    settings: DQN,
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
    """Train every ticket of a population by DQN; nothing is computed across tickets.

    Greedy evaluation takes the action of the highest value, sampled evaluation draws from the
    softmax of the values.

    Args:
        settings: the hyper-parameters.
        env_name: a registered environment or any gymnasium id, of discrete actions.
        population: changed in place; its actor is the Q-network, without a critic.
        key: ``[P]`` int64; all randomness of a ticket's training comes from its key.
        evaluation: how returns are measured; the protocol's by default.
        first_iteration: where the schedule starts, for tickets rewound to a later step; the replay
            buffer starts empty all the same, and fills before the first update.
        rewind_iteration: snapshot the parameters before this iteration.
        on_iteration: called after each iteration with the agent-steps taken in it.
        pruning: prune and regrow while training, by the gradient steps taken; masks change between
            iterations, the target network's with them.

    Returns:
        Curves, returns, final and best weights.

    Raises:
        ValueError: an unknown environment, one of continuous actions, a population with a critic,
            a key that does not fit the population, or pruning where no update is made.
    """
    check_shape("key", key, (len(population),))
    _check(population.arena)
    return learn(
        "dqn.",
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


def explore(
    population: Population, obs: Tensor, epsilon: Tensor, key: Tensor, clock: int | Tensor
) -> Tensor:
    """Actions ``[P, E]``: a random one with probability epsilon, else that of the highest value.

    Args:
        population: of Q-networks.
        obs: ``[P, E, D]``.
        epsilon: ``[P]``, of each ticket.
        key: ``[P]`` int64.
        clock: number of this step.
    """
    greedy = population.actor(obs).argmax(-1)
    copies, actions = obs.shape[1], population.arena.actor.sizes[-1]
    chance = uniform(key, copies, stream=Stream.EXPLORE, step=clock)
    random = integers(key, copies, actions, stream=Stream.ACTION, step=clock)
    return torch.where(chance < epsilon[:, None], random, greedy)


class Iteration(ReplayIteration):
    """DQN's; see `ReplayIteration`.

    Attributes:
        epsilon: ``[P]``, the probability of a random action in the next call.
    """

    def __init__(
        self, settings: DQN, env: Env, population: Population, key: Tensor, first: int
    ) -> None:
        super().__init__(settings, env, population, key, first)
        self._settings, self._config = settings, settings.config()
        self.epsilon = torch.ones_like(self.learning_rate)

    def schedule(self, iteration: int) -> None:
        self.epsilon.fill_(self._settings.epsilon_at(iteration))
        super().schedule(iteration)

    def __call__(self) -> None:
        settings, population, buffer = self._settings, self._population, self.buffer
        with self._acting():
            for _ in range(settings.horizon):
                action = explore(population, self._obs, self.epsilon, self._key, self._env.clock)
                step = self._env.step(action)
                buffer.add(self._obs, action, step)
                self._obs = step.obs
        taken = self._number * settings.batch
        if (taken + settings.batch) // settings.target_interval > taken // settings.target_interval:
            self._target.copy_(population.parameters.weight)
        if self._number >= self.learns_from:
            self.gradient_norm = dqn_update_(
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
        """Gradient ``[P, prunable]`` of the loss of all transitions that the last call's updates
        drew, by pruned weights too."""
        settings, arena = self._settings, self._population.arena
        batch = draw(
            self.buffer.transitions,
            self.buffer.stored,
            self._key,
            (self._number - 1) * settings.updates,
            settings.updates,
            settings.minibatch,
            arena,
        )
        weight, mask = self._population.parameters.weight, self._population.parameters.mask
        values = wanted(batch, arena, weight, mask, self._target, settings.double)
        arguments = (arena, batch.obs, batch.action, values, settings.loss)
        dense, _ = gradient(weight, torch.ones_like(mask), loss, arguments)
        return dense[:, : arena.prunable]


def _check(arena: Arena) -> None:
    if arena.continuous:
        raise ValueError("dqn needs discrete actions, got continuous ones: train by ppo")
    if arena.critic is not None:
        raise ValueError("dqn trains a Q-network alone: build its arena with critic=False")


class _DeepQLearning:
    """DQN as a sweep knows it, with a budget of its own."""

    name, title = "dqn", "DQN"
    settings = DQN
    has_critic, imitates = False, False

    def train(
        self,
        settings: DQN,
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
        settings: DQN,
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
        return dqn.plan(arena, device, density=density)


ALGORITHM: Algorithm = _DeepQLearning()
