"""What a training algorithm has to say of itself to be swept, compared and drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.population import Population

if TYPE_CHECKING:
    from sparse_tickets.algos.ppo import PPO

__all__ = [
    "Algorithm",
    "Dataset",
    "Demonstrations",
    "History",
    "Networks",
    "PruningSchedule",
    "Schedule",
    "Taught",
    "TrainingBudget",
]


class Dataset(NamedTuple):
    """Transitions of D experts, frozen for all levels and conditions.

    Attributes:
        obs: ``[D, n, features]`` normalised observations.
        target: ``[D, n, A]`` expert log-probabilities, or ``[D, n, 2A]`` mean and log_std.
    """

    obs: Tensor
    target: Tensor


class History(NamedTuple):
    """What D experts did while PPO trained them: one iteration's rollout after the other.

    Attributes:
        obs: ``[D, iterations * batch, features]`` normalised observations.
        target: of the policies that acted, as in `Dataset`.
    """

    obs: Tensor
    target: Tensor


class Networks(NamedTuple):
    """D experts, who say what they would do in the states that students visit.

    Attributes:
        weight: ``[D, size]``, laid out as the students' are without a critic.
    """

    weight: Tensor


Taught = Dataset | History | Networks
"""What students learn from."""


class Demonstrations(NamedTuple):
    """What the experts show, and which expert each ticket of a population imitates.

    Attributes:
        dataset: of D experts.
        assignment: ``[P]`` int64, below D.
    """

    dataset: Taught
    assignment: Tensor


class Schedule(TypedDict, total=False):
    """How a training is judged and where it starts; see `sparse_tickets.algos.ppo.train`."""

    evaluation: Evaluation | None
    first_iteration: int
    rewind_iteration: int | None
    on_iteration: Callable[[int], None] | None


class PruningSchedule(Schedule, total=False):
    """That of a sweep which prunes during training: for trainers that take `pruning`."""

    pruning: Pruning


@runtime_checkable
class TrainingBudget(Protocol):
    """How long an algorithm trains, of settings that say so themselves.

    Attributes:
        steps: environment steps per ticket.
        copies: environment copies a ticket acts in side by side.
        batch: environment steps, or samples, per iteration.
        iterations: how many.
    """

    @property
    def steps(self) -> int: ...
    @property
    def copies(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def iterations(self) -> int: ...


class Algorithm(Protocol):
    """One object per algorithm, in its own file; `register_algorithm` makes it known.

    An algorithm whose settings are a `TrainingBudget` trains for that; every other for the budget
    of PPO's settings, as many iterations of as many samples, so that sweeps compare like with like.

    Attributes:
        name: what specifications, results and the command line call it.
        title: what figures call it.
        settings: a frozen dataclass of its own hyper-parameters, each with a default; PPO's are a
            `TrainingBudget`.
        has_critic: whether its tickets carry a critic.
        imitates: whether it learns from experts' demonstrations, which a sweep then makes.

    One whose policies are squashed, with two critics that value actions, says ``squashed = True``.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def settings(self) -> type: ...
    @property
    def has_critic(self) -> bool: ...
    @property
    def imitates(self) -> bool: ...

    def train(
        self,
        settings: Any,
        budget: PPO,
        env_name: str,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
        schedule: Schedule,
    ) -> Result:
        """Train every ticket of a population; nothing is computed across tickets.

        Args:
            settings: one of `settings`.
            budget: how long, and how minibatches are cut.
            env_name: where the tickets act or are judged.
            population: changed in place.
            key: ``[P]`` int64; all randomness of a ticket's training comes from its key.
            demonstrations: given where the algorithm `imitates`.
            schedule: how training is judged and where it starts.
        """
        ...

    def iteration(
        self,
        settings: Any,
        budget: PPO,
        env: Env,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
    ) -> Callable[[], object]:
        """One iteration of training, to be called again and again: estimates time it."""
        ...

    def plan(self, arena: Arena, device: torch.device, density: float) -> Plan:
        """How its updates are computed, and why; recorded with each ticket."""
        ...
