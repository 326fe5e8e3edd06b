"""How a population is judged during and after training: the protocol's evaluation, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.diagnostics import (
    dormant_share,
    effective_rank,
    hidden_features,
    parameter_norm,
    random_observations,
)
from sparse_tickets.envs import Env, open_env
from sparse_tickets.kernels.arena import Parameters
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population
from sparse_tickets.settings import at_least, check_fields, within

__all__ = ["FINAL_INDEX", "Evaluation", "Evaluator", "Result", "due", "on_evaluation"]

# Evaluation indices key the random numbers; those of the curve are 0, 1, ..., points - 1.
FINAL_INDEX = 100_000
BEST_INDEX = 100_001
INITIAL_INDEX = 100_002
# Environments that are Python objects, open at once: a hundred episodes of sixty tickets would
# take gigabytes.
_MOST_COPIES = 512


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
        check_fields(
            self,
            {
                "points": within(1, FINAL_INDEX),
                "episodes": at_least(1),
                "final_episodes": at_least(1),
            },
            prefix="evaluation.",
        )


@dataclass(frozen=True)
class Result:
    """What training a population of P tickets gave.

    Attributes:
        initial: ``[P, size]`` weights before the first update.
        rewind: the parameters at the rewind point, or None if no snapshot was asked for.
        diverged: of each ticket, why it has no result: a weight or a return that is not finite;
            None where it has one. The others are what they are without it.
        final: ``[P, size]`` weights after the last update; pruning uses these.
        best: ``[P, size]`` weights at the best evaluation of the curve; where masks change in
            training, of those since the last change.
        return_initial: ``[P]`` mean greedy return before the first update, over fresh episodes.
        return_initial_sampled: ``[P]`` the same with sampled actions.
        curve: ``[P, points]`` mean greedy return at each evaluation.
        curve_sampled: ``[P, points]`` the same with sampled actions.
        return_final: ``[P]`` mean greedy return of `final` over fresh episodes.
        return_final_sampled: ``[P]`` the same with sampled actions.
        return_best: ``[P]`` mean greedy return of `best` over other fresh episodes.
        dormant_curve: ``[P, points]`` share of the actor's hidden units that are dormant.
        norm_curve: ``[P, points]`` norm of the actor's weights and biases.
        gradient_norm_curve: ``[P, points]`` norm of the gradient before clipping, in the updates
            before each evaluation; NaN where the algorithm does not say, or made none.
        effective_rank: ``[P]`` of the actor's last hidden layer, in `final`.
        train_steps: environment steps (or imitated transitions) each ticket was trained for.
        wall_s: seconds of wall time, evaluation included.
        train_s: seconds of wall time spent in training alone.
    """

    initial: Tensor
    rewind: Parameters | None
    diverged: tuple[str | None, ...]
    final: Tensor
    best: Tensor
    return_initial: Tensor
    return_initial_sampled: Tensor
    curve: Tensor
    curve_sampled: Tensor
    return_final: Tensor
    return_final_sampled: Tensor
    return_best: Tensor
    dormant_curve: Tensor
    norm_curve: Tensor
    gradient_norm_curve: Tensor
    effective_rank: Tensor
    train_steps: int
    wall_s: float
    train_s: float


_listeners: list[Callable[[int, Tensor, Tensor], None]] = []


@contextmanager
def on_evaluation(notify: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``notify`` at every point of a learning curve, as soon as it is there.

    Args:
        notify: called with the index of the iteration of training just done, and the mean returns
            ``[P]`` of greedy and of sampled actions.
    """
    _listeners.append(notify)
    try:
        yield
    finally:
        _listeners.remove(notify)


def due(points: int, first: int, iterations: int) -> list[int]:
    """After which iterations of ``[first, iterations)`` a curve of so many points is evaluated."""
    span = iterations - first
    points = min(points, span)
    return [first + -(-span * (j + 1) // points) - 1 for j in range(points)]


class Evaluator:
    """Evaluates a population before, in and after training; keeps its curve and best checkpoint.

    To be used in a ``with`` statement, whose end releases the environments.

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
        self._due = {at: j for j, at in enumerate(due(settings.points, first, iterations))}
        points = len(self._due)
        self._population = population
        self._key = key
        self._rewind_iteration = rewind_iteration
        device = key.device
        self._env_name = env_name
        self._faults: dict[int, str] = {}
        self._open = ExitStack()
        weight = population.parameters.weight
        self._initial = weight.clone()
        self._rewind: Parameters | None = None
        self._best = weight.clone()
        self._mask = population.parameters.mask.clone()
        self._curve = torch.zeros(len(key), points, dtype=torch.float64, device=device)
        self._curve_sampled = torch.zeros_like(self._curve)
        self._best_return = torch.full_like(self._curve[:, 0], -torch.inf)
        self._dormant_curve = torch.full_like(self._curve, torch.nan, device="cpu")
        self._norm_curve = self._dormant_curve.clone()
        self._gradient_norm_curve = self._dormant_curve.clone()
        self._begin = time.perf_counter()
        self._final_episodes = settings.final_episodes
        # Untrained, a mask that training has chosen is not.
        self._return_initial = self._fresh(population.parameters, INITIAL_INDEX, greedy=True)
        self._return_initial_sampled = self._fresh(
            population.parameters, INITIAL_INDEX, greedy=False
        )
        self._obs = random_observations(env_name)
        self._evaluating_s = time.perf_counter() - self._begin
        self._env, self._rows = self._environment(settings.episodes, self._open)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def note(self, env: Env) -> None:
        """Keep what an environment says that it returned and should not have, by ticket."""
        for ticket, fault in getattr(env, "faults", {}).items():
            self._faults.setdefault(ticket, fault)

    def before(self, iteration: int) -> None:
        """To be called before each iteration's updates: takes the snapshot to rewind to."""
        if iteration == self._rewind_iteration:
            self._rewind = Parameters(*(value.clone() for value in self._population.parameters))

    def after(self, iteration: int, gradient_norm: Tensor | None = None) -> None:
        """To be called after each iteration's updates: evaluates where one is due.

        Args:
            iteration: its number.
            gradient_norm: ``[P]`` norm of its gradients, if known.
        """
        point = self._due.get(iteration)
        if point is None:
            return
        begin = time.perf_counter()
        parameters = self._population.parameters
        where = self._env, self._rows, point
        greedy = self._returns(parameters, *where, greedy=True)
        self._curve[:, point] = greedy
        sampled = self._returns(parameters, *where, greedy=False)
        self._curve_sampled[:, point] = sampled
        moved = (parameters.mask != self._mask).any(1)
        self._mask.copy_(parameters.mask)
        self._best_return.masked_fill_(moved, -torch.inf)
        better = greedy > self._best_return
        self._best_return = torch.where(better, greedy, self._best_return)
        self._best[better] = parameters.weight[better]
        actor = self._population.arena.actor
        # Of units; sums in a residual network's stream are none.
        units = [each for layer, each in enumerate(self._features()) if actor.activates(layer)]
        if units:
            self._dormant_curve[:, point] = dormant_share(units)
        self._norm_curve[:, point] = parameter_norm(parameters.weight.cpu(), actor)
        if gradient_norm is not None:
            self._gradient_norm_curve[:, point] = gradient_norm
        for notify in _listeners:
            notify(iteration, greedy, sampled)
        self._evaluating_s += time.perf_counter() - begin

    def _features(self) -> list[Tensor]:
        """What the actors' hidden layers make of `random_observations`; empty if there is none."""
        population = self._population
        weight = population.parameters.weight.cpu()
        return hidden_features(weight, population.arena.actor, self._obs.to(weight.dtype))

    def _environment(self, episodes: int, stack: ExitStack) -> tuple[Env, list[slice]]:
        """An environment for some tickets' episodes, and the rows of tickets that take turns."""
        tickets, device = len(self._key), self._key.device
        turns = -(-tickets // max(1, _MOST_COPIES // episodes))
        size = -(-tickets // turns)
        env = stack.enter_context(open_env(self._env_name, size, episodes, device=device))
        if env.task is not None:  # its copies are rows of tensors, made by the evaluation itself
            return env, [slice(0, tickets)]
        # The last turn repeats tickets of the one before where turns do not come out even.
        ends = [min(size * (turn + 1), tickets) for turn in range(turns)]
        return env, [slice(end - size, end) for end in ends]

    def _fresh(self, parameters: Parameters, index: int, *, greedy: bool) -> Tensor:
        with ExitStack() as stack:
            env, rows = self._environment(self._final_episodes, stack)
            return self._returns(parameters, env, rows, index, greedy=greedy)

    def _returns(
        self, parameters: Parameters, env: Env, rows: list[slice], index: int, *, greedy: bool
    ) -> Tensor:
        """Mean returns ``[P]``, float64."""
        population = self._population
        returns = torch.empty(len(self._key), dtype=torch.float64, device=self._key.device)
        for turn in rows:
            found = evaluate(
                Parameters(*(value[turn] for value in parameters)),
                population.arena,
                env,
                self._key[turn],
                index=index,
                greedy=greedy,
                density=population.density,
            )
            returns[turn] = found.double().mean(1)
            for ticket, fault in getattr(env, "faults", {}).items():
                self._faults.setdefault(turn.start + ticket, fault)
        return returns

    def result(self, train_steps: int) -> Result:
        """Score the final and the best weights on fresh episodes and gather everything."""
        train_s = time.perf_counter() - self._begin - self._evaluating_s
        population = self._population
        parameters = population.parameters
        best = population.with_weight(self._best)
        rank, features = torch.full_like(self._norm_curve[:, 0], torch.nan), self._features()
        if features:
            rank = effective_rank(features[-1])
        final, sampled = (
            self._fresh(parameters, FINAL_INDEX, greedy=greedy) for greedy in (True, False)
        )
        returns = {
            "return before training": self._return_initial[:, None],
            "sampled return before training": self._return_initial_sampled[:, None],
            "return in training": self._curve,
            "sampled return in training": self._curve_sampled,
            "final return": final[:, None],
            "final sampled return": sampled[:, None],
        }
        return Result(
            initial=self._initial,
            rewind=self._rewind,
            diverged=self._diverged({"weight after training": parameters.weight, **returns}),
            final=parameters.weight.clone(),
            best=self._best,
            return_initial=self._return_initial,
            return_initial_sampled=self._return_initial_sampled,
            curve=self._curve,
            curve_sampled=self._curve_sampled,
            return_final=final,
            return_final_sampled=sampled,
            return_best=self._fresh(best, BEST_INDEX, greedy=True),
            dormant_curve=self._dormant_curve,
            norm_curve=self._norm_curve,
            gradient_norm_curve=self._gradient_norm_curve,
            effective_rank=rank,
            train_steps=train_steps,
            wall_s=time.perf_counter() - self._begin,
            train_s=train_s,
        )

    def _diverged(self, found: dict[str, Tensor]) -> tuple[str | None, ...]:
        reasons: list[str | None] = [None] * len(self._key)
        for name, values in found.items():
            for ticket in (~values.isfinite().all(1)).nonzero().flatten().tolist():
                if reasons[ticket] is None:
                    fault = self._faults.get(ticket)
                    reasons[ticket] = fault or f"a {name} is not finite"
        return tuple(reasons)
