"""Behavioural cloning of experts by a population of tickets, with PPO's own budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.algos import dqn, ppo, sac
from sparse_tickets.algos.algorithm import (
    Algorithm,
    Dataset,
    Demonstrations,
    History,
    Networks,
    Schedule,
    Taught,
)
from sparse_tickets.algos.evaluation import Evaluation, Evaluator, Result
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
from sparse_tickets.kernels.random import Stream, derive_key, integers
from sparse_tickets.kernels.rollout import demonstrate
from sparse_tickets.kernels.rollout.reference import targets
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.population import Population, initialise
from sparse_tickets.settings import above, at_least, check_fields

__all__ = [
    "ALGORITHM",
    "BC",
    "FIRST_EXPERT_SEED",
    "TAUGHT",
    "Dataset",
    "ExpertError",
    "Experts",
    "Iteration",
    "dataset_keys",
    "demonstrations",
    "demonstrators",
    "history",
    "networks",
    "train",
    "train_experts",
]

FIRST_EXPERT_SEED = 1_000_000
"""Experts are trained from seeds no ticket uses."""


TAUGHT: dict[str, type[Taught]] = {"expert": Dataset, "student": Networks, "replay": History}
"""What students learn from, by whose states they imitate."""

_TRAINERS: dict[type, Callable[..., Result]] = {
    ppo.PPO: ppo.train,
    dqn.DQN: dqn.train,
    sac.SAC: sac.train,
}


class ExpertError(RuntimeError):
    """Too few experts reached the return gate."""


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


class Experts(NamedTuple):
    """Trained experts that passed the gate.

    Attributes:
        weight: ``[D, size]`` final weights in the arena with a critic.
        returns: ``[D]`` mean greedy return over fresh episodes.
        seeds: ``[D]`` int64, the seeds they were trained from.
    """

    weight: Tensor
    returns: Tensor
    seeds: Tensor


def train_experts(
    settings: BC,
    budget: ppo.PPO | dqn.DQN | sac.SAC,
    env_name: str,
    arena: Arena,
    gate: float,
    *,
    scheme: str = "lecun",
    log_std: float = 0.0,
    evaluation: Evaluation | None = None,
    on_iteration: Callable[[int], None] | None = None,
    device: torch.device | str = "cpu",
) -> Experts:
    """The first experts, in order of seed, whose final weights reach the return gate.

    Args:
        settings: how many experts and how many rounds of tries.
        budget: how experts are trained, the settings of PPO, DQN or SAC.
        env_name: the environment.
        arena: a layout, with a critic for PPO, with two for SAC.
        gate: the return an expert must reach.
        scheme: initialisation.
        log_std: initial log standard deviation of continuous actions.
        evaluation: how returns are measured.
        on_iteration: called after each iteration with the agent-steps taken in it.
        device: where to train.

    Raises:
        ExpertError: fewer experts than asked for passed after all tries.
    """
    passed: list[tuple[int, float, Tensor]] = []
    seen: list[float] = []
    for round_ in range(settings.expert_tries):
        first = FIRST_EXPERT_SEED + round_ * settings.experts
        seeds = range(first, first + settings.experts)
        population, key = _untrained(arena, env_name, seeds, scheme, log_std, device)
        schedule: Schedule = {"evaluation": evaluation, "on_iteration": on_iteration}
        result = _TRAINERS[type(budget)](budget, env_name, population, key, **schedule)
        returns = result.return_final.tolist()
        seen += returns
        passed += [
            (seed, value, weight)
            for seed, value, weight in zip(seeds, returns, result.final, strict=True)
            if value >= gate
        ]
        if len(passed) >= settings.experts:
            chosen, reached, weights = zip(*passed[: settings.experts], strict=True)
            return Experts(
                weight=torch.stack(weights),
                returns=torch.tensor(reached, dtype=torch.float32, device="cpu"),
                seeds=torch.tensor(chosen, dtype=torch.int64, device="cpu"),
            )
    all_returns = ", ".join(f"{value:.1f}" for value in sorted(seen, reverse=True))
    raise ExpertError(
        f"only {len(passed)} of {settings.experts} {settings.expert.upper()} experts on {env_name} "
        f"reached a return of {gate:g} (returns: {all_returns}); raise --bc.expert-steps, "
        "or lower --bc.expert-gate"
    )


def _untrained(
    arena: Arena,
    env_name: str,
    seeds: Iterable[int],
    scheme: str,
    log_std: float,
    device: torch.device | str,
) -> tuple[Population, Tensor]:
    """Experts to be, and their keys ``[D]``."""
    initial_key = _keys("init", env_name, seeds, device)
    population = Population.create(arena, initialise(arena, initial_key, scheme, log_std))
    return population, _keys("expert", env_name, seeds, device)


def _keys(what: str, env_name: str, seeds: Iterable[int], device: torch.device | str) -> Tensor:
    keys = [derive_key(what, env_name, seed) for seed in seeds]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def dataset_keys(experts: Experts, env_name: str) -> Tensor:
    """The random keys ``[D]`` by which experts demonstrate."""
    return _keys("dataset", env_name, experts.seeds.tolist(), experts.weight.device)


def demonstrators(experts: Experts, arena: Arena, temperature: float = 1.0) -> Population:
    """The experts as policies whose sampled actions are what they demonstrate.

    A Q-network acts by softmax(Q / temperature): its last layer over the temperature has these
    logits for outputs.

    Args:
        experts: weights laid out by ``arena``.
        arena: their layout.
        temperature: divides the outputs.
    """
    population = Population.create(arena, experts.weight)
    if temperature != 1.0:
        *_, (weight, bias) = arena.actor.layers(population.parameters.weight)
        weight /= temperature
        bias /= temperature
    return population


def demonstrations(
    experts: Experts,
    env_name: str,
    arena: Arena,
    steps: int,
    copies: int = 16,
    *,
    temperature: float = 1.0,
) -> Dataset:
    """A frozen data set of ``steps`` transitions per expert, its actions sampled.

    Args:
        experts: the experts, weights laid out by ``arena``.
        env_name: the environment they act in.
        arena: their layout.
        steps: transitions per expert; rounded up to a multiple of ``copies``.
        copies: environment copies acted in side by side.
        temperature: see `demonstrators`.
    """
    population = demonstrators(experts, arena, temperature)
    key = dataset_keys(experts, env_name)
    with open_env(env_name, len(key), copies, device=key.device) as env:
        obs, target, _ = demonstrate(
            population.parameters,
            arena,
            env,
            env.reset(key),
            key,
            -(-steps // copies),
            stream=Stream.DATASET_ACTION,
        )
    return Dataset(obs.flatten(1, 2), target.flatten(1, 2))


def networks(experts: Experts, arena: Arena, *, temperature: float = 1.0) -> Networks:
    """The experts themselves, to be asked in states that others visit; see `demonstrations`."""
    trained = demonstrators(experts, arena, temperature).parameters.weight
    actor = _actor_alone(arena)
    weight = trained.new_zeros(len(trained), actor.size)
    for into, of in zip(actor.actor.layers(weight), arena.actor.layers(trained), strict=True):
        for one, other in zip(into, of, strict=True):
            one.copy_(other)
    if actor.log_std is not None and arena.log_std is not None:
        outputs = arena.actor.sizes[-1]
        weight[:, actor.log_std :] = trained[:, arena.log_std :][:, :outputs]
    return Networks(weight)


def history(
    experts: Experts,
    budget: ppo.PPO,
    env_name: str,
    arena: Arena,
    *,
    scheme: str = "lecun",
    log_std: float = 0.0,
    on_iteration: Callable[[int], None] | None = None,
) -> History:
    """What the experts did while PPO trained them, and which policies they were then.

    Trains them once more, without evaluations: keys and settings are those of `train_experts`.

    Args:
        experts: of which only the seeds matter.
        budget: how they were trained.
        env_name: where.
        arena: their layout, with a critic.
        scheme: initialisation.
        log_std: initial log standard deviation of continuous actions.
        on_iteration: called after each iteration with the agent-steps taken in it.
    """
    seeds, device = experts.seeds.tolist(), experts.weight.device
    population, key = _untrained(arena, env_name, seeds, scheme, log_std, device)
    weight = population.parameters.weight
    seen, acted = [], []
    with open_env(env_name, len(key), budget.copies, device=device) as env:
        iterate = ppo.Iteration(budget, env, population, key, 0)
        for iteration in range(budget.iterations):
            then = weight.clone()
            iterate.learning_rate.fill_(budget.learning_rate_at(iteration))
            iterate()
            seen.append(iterate.samples.obs)
            acted.append(_answers(then, arena, iterate.samples.obs))
            if on_iteration is not None:
                on_iteration(len(key) * budget.batch)
    return History(torch.cat(seen, 1), torch.cat(acted, 1))


def _actor_alone(arena: Arena) -> Arena:
    return Arena.build(
        arena.actor.sizes,
        activation=arena.actor.activation,
        continuous=arena.log_std is not None,
        squashed=arena.squashed,
    )


def _answers(weight: Tensor, arena: Arena, obs: Tensor) -> Tensor:
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
        updates, pruner = budget.epochs * budget.minibatches, None
        if pruning is not None:
            steps = updates * (budget.iterations - first_iteration)
            pruner = pruning.pruner(population, steps, key, iterate.dense_gradient)
        evaluator = stack.enter_context(
            Evaluator(
                evaluation or Evaluation(),
                env_name,
                population,
                key,
                first_iteration,
                budget.iterations,
                rewind_iteration,
            )
        )
        advance: Callable[[], None] = iterate
        # A graph replays the kernels of the density it was captured at, on the same transitions.
        frozen = isinstance(dataset, Dataset)
        if pruner is None and frozen and can_replay_cloning(population):
            iterate.keep_count_on_device()
            advance = replayed(iterate)
        for iteration in range(first_iteration, budget.iterations):
            evaluator.before(iteration)
            iterate.learning_rate.fill_(budget.learning_rate_at(iteration))
            advance()
            if pruner is not None:
                pruner.step(updates)
            evaluator.after(iteration)
            if on_iteration is not None:
                on_iteration(len(population) * budget.batch)
        if env is not None:
            evaluator.note(env)
        return evaluator.result((budget.iterations - first_iteration) * budget.batch)


class Iteration:
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
            self._alone = _actor_alone(population.arena)
            weight, shape = dataset.weight, ("D", self._alone.size)
            check_tensor("dataset.weight", weight, shape, torch.float32, like=key)
            check_tensor("assignment", assignment, (len(population),), torch.int64, like=key)
            if not ((assignment >= 0) & (assignment < len(weight))).all():
                raise ValueError(
                    f"assignment must be in [0, {len(weight)}), got {assignment.tolist()}"
                )
            self._teachers = weight[assignment]
            self._env, self._obs = env, env.reset(key)
        self.learning_rate = population.parameters.weight.new_zeros(len(population))

    def keep_count_on_device(self) -> None:
        """Count updates in a tensor, so that a captured CUDA graph counts on."""
        self._update = torch.as_tensor(self._update, dtype=torch.int64, device=self._key.device)

    def __call__(self) -> None:
        self._lesson = self._next_lesson()
        clone_update_(
            self._population.parameters,
            self._population.arena,
            *self._lesson,
            self._key,
            self._update,
            self.learning_rate,
            self._config,
            density=self._population.density,
        )
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
        answers = _answers(self._teachers, self._alone, obs)
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
