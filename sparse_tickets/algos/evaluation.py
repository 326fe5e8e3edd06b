"""How a population is judged during and after training: the protocol's evaluation, in one place."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.envs import make_env
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population

__all__ = ["FINAL_INDEX", "Evaluation", "Evaluator", "Result"]

# Evaluation indices key the random numbers; those of the curve are 0, 1, ..., points - 1.
FINAL_INDEX = 100_000
BEST_INDEX = 100_001


@dataclass(frozen=True)
class Evaluation:
    """How returns are measured; undiscounted, complete episodes, never across tickets."""

    points: int = 20
    """Evaluations during training, equally spaced; the last one follows the last update."""
    episodes: int = 32
    """Episodes per evaluation during training."""
    final_episodes: int = 100
    """Fresh episodes that score the final weights, and as many again for the best checkpoint."""

    def __post_init__(self) -> None:
        for name in ("points", "episodes", "final_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Result:
    """What training a population of P tickets gave.

    Attributes:
        initial: ``[P, size]`` weights before the first update.
        rewind: the parameters at the rewind point, or None if no snapshot was asked for.
        final: ``[P, size]`` weights after the last update; pruning uses these.
        best: ``[P, size]`` weights at the best evaluation of the curve.
        curve: ``[P, points]`` mean greedy return at each evaluation.
        curve_sampled: ``[P, points]`` the same with sampled actions.
        return_final: ``[P]`` mean greedy return of `final` over fresh episodes.
        return_final_sampled: ``[P]`` the same with sampled actions.
        return_best: ``[P]`` mean greedy return of `best` over other fresh episodes.
        train_steps: environment steps (or imitated transitions) each ticket was trained for.
        wall_s: seconds of wall time, evaluation included.
        train_s: seconds of wall time spent in training alone.
    """

    initial: Tensor
    rewind: Parameters | None
    final: Tensor
    best: Tensor
    curve: Tensor
    curve_sampled: Tensor
    return_final: Tensor
    return_final_sampled: Tensor
    return_best: Tensor
    train_steps: int
    wall_s: float
    train_s: float


class Evaluator:
    """Evaluates a population in training and keeps its curve and best checkpoint.

    Args:
        settings: how many evaluations and episodes.
        env_name: the environment the policies act in.
        population: the population in training.
        key: ``[P]`` int64 random keys of the tickets.
        first: index of the first iteration of training.
        iterations: index one past the last iteration.
        rewind_iteration: iteration before which the parameters are snapshotted, or None.
    """

    def __init__(
        self,
        settings: Evaluation,
        env_name: str,
        population: Population,
        key: Tensor,
        first: int,
        iterations: int,
        rewind_iteration: int | None = None,
    ) -> None:
        points = min(settings.points, iterations - first)
        span = iterations - first
        self._due = {first + -(-span * (j + 1) // points) - 1: j for j in range(points)}
        self._population = population
        self._key = key
        self._rewind_iteration = rewind_iteration
        device = key.device
        self._env = make_env(env_name, len(key), settings.episodes, device=device)
        self._final_env = make_env(env_name, len(key), settings.final_episodes, device=device)
        weight = population.parameters.weight
        self._initial = weight.clone()
        self._rewind: Parameters | None = None
        self._best = weight.clone()
        self._best_return = torch.full((len(key),), -torch.inf, device=device)
        self._curve = torch.zeros(len(key), points, device=device)
        self._curve_sampled = torch.zeros(len(key), points, device=device)
        self._begin = time.perf_counter()
        self._evaluating_s = 0.0

    def before(self, iteration: int) -> None:
        """To be called before each iteration's updates: takes the snapshot to rewind to."""
        if iteration == self._rewind_iteration:
            self._rewind = Parameters(*(value.clone() for value in self._population.parameters))

    def after(self, iteration: int) -> None:
        """To be called after each iteration's updates: evaluates where one is due."""
        point = self._due.get(iteration)
        if point is None:
            return
        begin = time.perf_counter()
        parameters = self._population.parameters
        greedy = self._returns(parameters, self._env, point, greedy=True)
        self._curve[:, point] = greedy
        self._curve_sampled[:, point] = self._returns(parameters, self._env, point, greedy=False)
        better = greedy > self._best_return
        self._best_return = torch.where(better, greedy, self._best_return)
        self._best[better] = parameters.weight[better]
        self._evaluating_s += time.perf_counter() - begin

    def _returns(self, parameters: Parameters, env, index: int, *, greedy: bool) -> Tensor:
        population = self._population
        returns = evaluate(
            parameters,
            population.arena,
            env,
            self._key,
            index=index,
            greedy=greedy,
            density=population.density,
        )
        return returns.mean(1)

    def result(self, train_steps: int) -> Result:
        """Score the final and the best weights on fresh episodes and gather everything."""
        train_s = time.perf_counter() - self._begin - self._evaluating_s
        population = self._population
        parameters = population.parameters
        best = population.with_weight(self._best)
        return Result(
            initial=self._initial,
            rewind=self._rewind,
            final=parameters.weight.clone(),
            best=self._best,
            curve=self._curve,
            curve_sampled=self._curve_sampled,
            return_final=self._returns(parameters, self._final_env, FINAL_INDEX, greedy=True),
            return_final_sampled=self._returns(
                parameters, self._final_env, FINAL_INDEX, greedy=False
            ),
            return_best=self._returns(best, self._final_env, BEST_INDEX, greedy=True),
            train_steps=train_steps,
            wall_s=time.perf_counter() - self._begin,
            train_s=train_s,
        )
