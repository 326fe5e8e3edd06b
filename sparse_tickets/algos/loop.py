"""The loop that all algorithms train by: iterate, prune, evaluate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from sparse_tickets.algos.budget import IterationBudget
from sparse_tickets.algos.evaluation import Evaluation, Evaluator, Result
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env
from sparse_tickets.population import Population

__all__ = ["TrainingIteration", "run"]


class TrainingIteration(ABC):
    """One iteration of an algorithm; each call goes on from the last.

    Args:
        budget: whose learning rate it follows.
        population: changed in place.
        updates: gradient steps of a call.
        learns_from: number of the first iteration that takes them.

    Attributes:
        learning_rate: ``[P]`` of the next call.
        gradient_norm: ``[P]`` norm of each ticket's gradient before clipping, a mean over updates
            of the last call; None before one that makes any.
    """

    gradient_norm: Tensor | None = None

    def __init__(
        self, budget: IterationBudget, population: Population, updates: int, learns_from: int
    ) -> None:
        self.updates, self.learns_from = updates, learns_from
        self.learning_rate = population.parameters.weight.new_zeros(len(population))
        self._learning_rate_at = budget.learning_rate_at

    @abstractmethod
    def __call__(self) -> object:
        """One iteration."""

    @abstractmethod
    def dense_gradient(self) -> Tensor:
        """Gradient ``[P, prunable]`` of the loss of what the last call learnt from, by pruned
        weights too."""

    def schedule(self, iteration: int) -> None:
        """Set what changes with the number of the iteration that comes next."""
        self.learning_rate.fill_(self._learning_rate_at(iteration))

    def follow_masks_(self) -> None:  # noqa: B027 (few have something that follows)
        """Bring what follows the population's masks up to date, after these have changed."""


def run(
    iterate: TrainingIteration,
    budget: IterationBudget,
    env_name: str,
    population: Population,
    key: Tensor,
    *,
    advance: Callable[[], object],
    env: Env | None,
    evaluation: Evaluation | None,
    first_iteration: int,
    rewind_iteration: int | None,
    on_iteration: Callable[[int], None] | None,
    pruning: Pruning | None,
) -> Result:
    """Iterate, prune and evaluate until the budget is spent; other arguments are `ppo.train`'s.

    Args:
        iterate: asked for what the algorithm knows.
        advance: makes the iteration: ``iterate`` itself, or a graph of it.
        env: where the tickets act, whose faults go into the result; None where they do not.
    """
    pruner = None
    if pruning is not None:
        steps = iterate.updates * (budget.iterations - iterate.learns_from)
        pruner = pruning.pruner(population, steps, key, iterate.dense_gradient)
        iterate.follow_masks_()
    with Evaluator(
        evaluation or Evaluation(),
        env_name,
        population,
        key,
        first_iteration,
        budget.iterations,
        rewind_iteration,
    ) as evaluator:
        for number in range(first_iteration, budget.iterations):
            evaluator.before(number)
            iterate.schedule(number)
            advance()
            learnt = number >= iterate.learns_from
            if pruner is not None and learnt and pruner.step(iterate.updates):
                iterate.follow_masks_()
            evaluator.after(number, iterate.gradient_norm)
            if on_iteration is not None:
                on_iteration(len(population) * budget.batch)
        if env is not None:
            evaluator.note(env)
        return evaluator.result((budget.iterations - first_iteration) * budget.batch)
