"""Behavioural cloning of experts by a population of tickets, with PPO's own budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.algos import ppo
from sparse_tickets.algos.algorithm import (
    Algorithm,
    Dataset,
    Demonstrations,
    History,
    Networks,
    Schedule,
    Taught,
)
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.algos.loop import TrainingIteration, run
from sparse_tickets.algos.replay import can_replay_cloning, replayed
from sparse_tickets.dynamic import Pruning
from sparse_tickets.envs import Env, open_env
from sparse_tickets.kernels import imitation
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.errors import check_shape, check_tensor
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_
from sparse_tickets.kernels.imitation.reference import measured_loss
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.random import Stream, integers
from sparse_tickets.kernels.rollout import demonstrate
from sparse_tickets.kernels.rollout.reference import targets
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.population import Population
from sparse_tickets.settings import above, at_least, check_fields

__all__ = [
    "ALGORITHM",
    "BC",
    "TAUGHT",
    "Dataset",
    "Iteration",
    "train",
]

TAUGHT: dict[str, type[Taught]] = {"expert": Dataset, "student": Networks, "replay": History}
"""What students learn from, by whose states they imitate."""


@dataclass(frozen=True)
class BC:
    """Behavioural cloning; updates, minibatch, optimiser and schedule are PPO's."""

    experts: int = 5
    """Experts per environment; student s imitates expert s mod experts."""
    expert: str = "ppo"
    """How experts are trained: ppo; sac; dqn, whose policies are softmax(Q / temperature)."""
    temperature: float = 1.0
    """Of a DQN expert's policy: the smaller, the closer to its greedy actions."""
    expert_gate: float | None = None
    """Return an expert must reach; default: where the environment counts as solved."""
    expert_steps: int | None = None
    """Environment steps each expert is trained for; default: the budget of its algorithm."""
    expert_tries: int = 4
    """Rounds of training before giving up on finding enough experts."""
    dataset: tuple[str, ...] = ()
    """Minari data sets to clone in place of experts, each counted as one; on this machine."""
    states: str = "expert"
    """Where experts are imitated: expert, in states they visit, a frozen data set; student, in
    those each student visits as it learns; replay, in those of the experts' own training by PPO,
    iteration by iteration, the policies of that time."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            dict.fromkeys(("experts", "expert_steps", "expert_tries"), at_least(1))
            | {"temperature": above(0)},
            prefix="bc.",
        )
        if self.expert not in ("ppo", "dqn", "sac"):
            raise ValueError(f"bc.expert must be ppo, dqn or sac, got {self.expert!r}")
        if self.expert == "sac" and self.dataset:
            raise ValueError(
                "bc.expert must be ppo with bc.dataset, whose actions are not squashed, got 'sac'"
            )
        if self.expert != "dqn" and self.temperature != 1.0:
            raise ValueError(
                f"bc.temperature must be 1 for {self.expert.upper()} experts, whose policies have "
                f"none, got {self.temperature}"
            )
        if self.states not in TAUGHT:
            raise ValueError(f"bc.states must be one of {', '.join(TAUGHT)}, got {self.states!r}")
        if self.states == "replay" and (self.expert != "ppo" or self.expert_steps is not None):
            raise ValueError(
                "bc.states replay follows a training by PPO of the students' own length: leave "
                f"bc.expert ppo and bc.expert_steps unset, got {self.expert!r} and "
                f"{self.expert_steps}"
            )
        if self.states != "expert" and self.dataset:
            raise ValueError(
                f"bc.states must be expert with bc.dataset, which has no experts to ask, "
                f"got {self.states!r}"
            )

    @property
    def teachers(self) -> int:
        """How many experts or data sets there are to imitate."""
        return len(self.dataset) or self.experts


def actor_alone(arena: Arena) -> Arena:
    return Arena.build(
        arena.actor.sizes,
        activation=arena.actor.activation,
        architecture=arena.actor.architecture,
        continuous=arena.log_std is not None,
        squashed=arena.squashed,
    )


def answer(weight: Tensor, arena: Arena, obs: Tensor) -> Tensor:
    """The action distributions ``[P, B, .]`` of policies in states ``[P, B, D]``, as targets."""
    heads = mlp(obs, weight, arena.actor, None)
    return targets(weight, arena, heads[:, None])[:, 0]


def train(
    budget: ppo.PPO,
    env_name: str,
    population: Population,
    key: Tensor,
    dataset: Taught,
    assignment: Tensor,
    *,
    evaluation: Evaluation | None = None,
    first_iteration: int = 0,
    rewind_iteration: int | None = None,
    on_iteration: Callable[[int], None] | None = None,
    pruning: Pruning | None = None,
) -> Result:
    """Train every ticket to imitate its expert by minimising KL(expert || student).

    Iterations, updates per iteration, minibatch size, Adam and the learning-rate schedule are
    those of ``budget``. Minibatches are drawn from the expert's whole data set; of a `History` from
    as many transitions as PPO had in the same iteration; or from a rollout of the student's own,
    drawn before each iteration and answered by the expert's `Networks`. Judged, like PPO, by its
    return in the environment.

    Args:
        budget: the PPO settings whose budget is matched.
        env_name: where the students are evaluated, and act if they are taught in their own states.
        population: changed in place.
        key: ``[P]`` int64; all randomness of a ticket's training comes from its key.
        dataset: what the experts show.
        assignment: ``[P]`` int64, which expert each ticket imitates.
        evaluation: how returns are measured; the protocol's by default.
        first_iteration: where the schedule starts, for tickets rewound to a later step.
        rewind_iteration: snapshot the parameters before this iteration.
        on_iteration: called after each iteration with the transitions imitated in it.
        pruning: prune and regrow while training; masks change between iterations.

    Raises:
        ValueError: a key or an assignment that does not fit, a history of another length than the
            budget's, or networks of another layout than the students'.
    """
    check_shape("key", key, (len(population),))
    with ExitStack() as stack:
        env = None
        if isinstance(dataset, Networks):
            own = open_env(env_name, len(population), budget.copies, device=key.device)
            env = stack.enter_context(own)
        iterate = Iteration(budget, population, key, dataset, assignment, first_iteration, env)
        advance: Callable[[], object] = iterate
        # A graph replays the kernels of the density it was captured at, on the same transitions.
        frozen = isinstance(dataset, Dataset)
        if pruning is None and frozen and can_replay_cloning(population):
            iterate.keep_count_on_device()
            advance = replayed(iterate)
        return run(
            iterate,
            budget,
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
    """As many updates as PPO makes of a rollout; each call goes on from the last.

    Args:
        budget: the PPO settings whose budget is matched.
        population: changed in place.
        key: ``[P]`` int64.
        dataset: what the experts show.
        assignment: ``[P]`` int64, which expert each ticket imitates.
        first: number of the first iteration.
        env: where students act who are taught in their own states; reset here.

    Attributes:
        learning_rate: ``[P]`` of the next call.
    """

    def __init__(
        self,
        budget: ppo.PPO,
        population: Population,
        key: Tensor,
        dataset: Taught,
        assignment: Tensor,
        first: int,
        env: Env | None = None,
    ) -> None:
        updates = budget.epochs * budget.minibatches
        super().__init__(budget, population, updates, first)
        self._config = CloneConfig(
            updates=updates, batch=budget.batch // budget.minibatches, max_norm=budget.max_norm
        )
        self._budget, self._population, self._key = budget, population, key
        self._dataset, self._assignment = dataset, assignment
        self._update: int | Tensor = first * updates
        self._number = first
        self._lesson: tuple[Tensor, Tensor, Tensor] | None = None
        if isinstance(dataset, History):
            needed, given = budget.iterations * budget.batch, dataset.obs.shape[1]
            if given != needed:
                raise ValueError(
                    f"dataset must have {needed} transitions, iterations * batch, got {given}"
                )
        if isinstance(dataset, Networks):
            if env is None:
                raise ValueError("env must be given to learn in one's own states, got None")
            self._alone = actor_alone(population.arena)
            weight, shape = dataset.weight, ("D", self._alone.size)
            check_tensor("dataset.weight", weight, shape, torch.float32, like=key)
            check_tensor("assignment", assignment, (len(population),), torch.int64, like=key)
            if not ((assignment >= 0) & (assignment < len(weight))).all():
                raise ValueError(
                    f"assignment must be in [0, {len(weight)}), got {assignment.tolist()}"
                )
            self._teachers = weight[assignment]
            self._env, self._obs = env, env.reset(key)

    def keep_count_on_device(self) -> None:
        """Count updates in a tensor, so that a captured CUDA graph counts on."""
        self._update = torch.as_tensor(self._update, dtype=torch.int64, device=self._key.device)

    def __call__(self) -> None:
        self._lesson = self._next_lesson()
        stats = clone_update_(
            self._population.parameters,
            self._population.arena,
            *self._lesson,
            self._key,
            self._update,
            self.learning_rate,
            self._config,
            density=self._population.density,
        )
        # A replay writes it anew, in the same memory.
        self.gradient_norm = stats.grad_norm
        # In place: a replay looks where the capture did.
        self._update += self._config.updates
        self._number += 1

    def _next_lesson(self) -> tuple[Tensor, Tensor, Tensor]:
        """Observations ``[D, n, .]``, how to answer them, and which of D is each ticket's."""
        budget, population, dataset = self._budget, self._population, self._dataset
        if isinstance(dataset, Dataset):
            return *dataset, self._assignment
        if isinstance(dataset, History):
            now = slice(self._number * budget.batch, (self._number + 1) * budget.batch)
            return dataset.obs[:, now], dataset.target[:, now], self._assignment
        visited, _, self._obs = demonstrate(
            population.parameters,
            population.arena,
            self._env,
            self._obs,
            self._key,
            budget.horizon,
            density=population.density,
            stream=Stream.ACTION,
        )
        obs = visited.flatten(1, 2)
        answers = answer(self._teachers, self._alone, obs)
        return obs, answers, torch.arange(len(population), device=obs.device)

    def dense_gradient(self) -> Tensor:
        """Gradient ``[P, prunable]`` of the loss by pruned weights too, at as many transitions as
        a call takes for one pass; the first are those of its last minibatch.

        Raises:
            RuntimeError: there was no call yet.
        """
        if self._lesson is None:
            raise RuntimeError("an iteration must be run before dense_gradient")
        arena, mask = self._population.arena, self._population.parameters.mask
        obs, answers, dataset = self._lesson
        index = integers(
            self._key,
            self._budget.batch,
            obs.shape[1],
            stream=Stream.MINIBATCH,
            step=self._update - 1,
        )
        rows = dataset[:, None]
        seen, target = obs[rows, index], answers[rows, index]
        weight, every = self._population.parameters.weight, torch.ones_like(mask)
        dense, _ = gradient(weight, every, measured_loss, (arena, seen, target))
        return dense[:, : arena.prunable]


class _Cloning:
    """Behavioural cloning as a sweep knows it."""

    name, title = "bc", "behavioural cloning"
    settings = BC
    has_critic, imitates = False, True

    def train(
        self,
        settings: BC,
        budget: ppo.PPO,
        env_name: str,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
        schedule: Schedule,
    ) -> Result:
        taught = _given(demonstrations)
        return train(budget, env_name, population, key, *taught, **schedule)

    def iteration(
        self,
        settings: BC,
        budget: ppo.PPO,
        env: Env,
        population: Population,
        key: Tensor,
        demonstrations: Demonstrations | None,
    ) -> Iteration:
        return Iteration(budget, population, key, *_given(demonstrations), 0, env)

    def plan(self, arena: Arena, device: torch.device, density: float) -> Plan:
        return imitation.plan(arena, device, density=density)


def _given(demonstrations: Demonstrations | None) -> Demonstrations:
    if demonstrations is None:
        raise ValueError("demonstrations must be given to train by behavioural cloning, got None")
    return demonstrations


ALGORITHM: Algorithm = _Cloning()
