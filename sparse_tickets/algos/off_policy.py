"""What training from a replay buffer has in common: budget, loop, the parts of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from sparse_tickets.algos.budget import IterationBudget
from sparse_tickets.algos.buffer import ReplayBuffer
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.algos.loop import TrainingIteration, run
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env, open_env
from sparse_tickets.kernels.rollout import takes_turns
from sparse_tickets.kernels.threads import one_thread
from sparse_tickets.population import Population

__all__ = ["ReplayBudget", "ReplayIteration", "learn"]


class ReplayBudget(IterationBudget):
    """A budget whose first iterations fill a replay buffer."""

    updates: int
    capacity: int
    warmup: int
    gamma: float
    n_step: int

    def check_budget(self, prefix: str) -> None:
        """Raise ``ValueError`` unless the buffer and the budget hold a step of every copy."""
        if self.capacity < self.copies:
            raise ValueError(
                f"{prefix}capacity must be at least copies = {self.copies}, got {self.capacity}"
            )
        super().check_budget(prefix)

    @property
    def waiting(self) -> int:
        """Iterations without updates, in which the replay buffer fills for the warmup."""
        filled = -(-max(self.warmup, 1) // self.copies) + self.n_step - 1
        return -(-filled // self.horizon) - 1


class ReplayIteration(TrainingIteration):
    """Act, store, update; each call goes on from the last.

    Args:
        settings: the hyper-parameters.
        env: the environment; reset here.
        population: changed in place.
        key: ``[P]`` int64.
        first: number of the first iteration.

    Attributes:
        learning_rate: ``[P]`` of the next call.
        buffer: what each ticket remembers.
    """

    def __init__(
        self, settings: ReplayBudget, env: Env, population: Population, key: Tensor, first: int
    ) -> None:
        super().__init__(settings, population, settings.updates, first + settings.waiting)
        arena = population.arena
        self._env, self._population, self._key = env, population, key
        self._obs = env.reset(key)
        self._number = first
        self._target = population.parameters.weight.clone()
        self.buffer = ReplayBuffer(
            len(population),
            env.copies,
            env.spec.observation_dim,
            max(min(settings.capacity, settings.steps), env.copies),
            n_step=settings.n_step,
            gamma=settings.gamma,
            device=key.device,
            numbers=arena.actions if arena.squashed else None,
        )

    def _acting(self) -> AbstractContextManager[None]:
        return one_thread() if takes_turns(self._env, self._key.device) else nullcontext()

    def follow_masks_(self) -> None:
        """Zero the target networks' weights off the masks."""
        pruned = ~self._population.parameters.mask
        self._target[:, : self._population.arena.prunable].masked_fill_(pruned, 0.0)


def learn(
    prefix: str,
    settings: ReplayBudget,
    iteration: Callable[[Any, Env, Population, Tensor, int], ReplayIteration],
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
    """Iterate and evaluate until the budget is spent; the arguments are those of `dqn.train`.

    Args:
        prefix: of the settings' names in errors.
        settings: the hyper-parameters.
        iteration: makes the iteration of settings, environment, population, key and first number.
        env_name: a registered environment or any gymnasium id.
        population: changed in place.
        key: ``[P]`` int64.
        evaluation: how returns are measured; the protocol's by default.
        first_iteration: where the schedule starts.
        rewind_iteration: snapshot the parameters before this iteration.
        on_iteration: called after each iteration with the agent-steps taken in it.
        pruning: prune and regrow while training, by the gradient steps taken.

    Returns:
        Curves, returns, final and best weights.

    Raises:
        ValueError: an unknown environment, or pruning where no update is made.
    """
    learns_from = first_iteration + settings.waiting
    if pruning is not None and learns_from >= settings.iterations:
        raise ValueError(
            "pruning while training needs updates, which begin after "
            f"{learns_from * settings.batch} steps: {prefix}steps must be more, "
            f"got {settings.steps}"
        )
    with open_env(env_name, len(population), settings.copies, device=key.device) as env:
        iterate = iteration(settings, env, population, key, first_iteration)
        return run(
            iterate,
            settings,
            env_name,
            population,
            key,
            advance=iterate,
            env=env,
            evaluation=evaluation,
            first_iteration=first_iteration,
            rewind_iteration=rewind_iteration,
            on_iteration=on_iteration,
            pruning=pruning,
        )
