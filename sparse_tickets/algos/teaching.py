"""Experts: trained past a gate, and what they give to those that imitate them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.algos import dqn, ppo, sac
from sparse_tickets.algos.algorithm import Dataset, History, Networks, Schedule
from sparse_tickets.algos.bc import BC, actor_alone, answer
from sparse_tickets.algos.evaluation import Evaluation, Result
from sparse_tickets.envs import open_env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.random import Stream, derive_key
from sparse_tickets.kernels.rollout import demonstrate
from sparse_tickets.population import Population, initialise

__all__ = [
    "FIRST_EXPERT_SEED",
    "ExpertError",
    "Experts",
    "dataset_keys",
    "demonstrations",
    "demonstrators",
    "history",
    "networks",
    "train_experts",
]

FIRST_EXPERT_SEED = 1_000_000
"""Experts are trained from seeds no ticket uses."""

_TRAINERS: dict[type, Callable[..., Result]] = {
    ppo.PPO: ppo.train,
    dqn.DQN: dqn.train,
    sac.SAC: sac.train,
}


class ExpertError(RuntimeError):
    """Too few experts reached the return gate."""


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
    actor = actor_alone(arena)
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
            acted.append(answer(then, arena, iterate.samples.obs))
            if on_iteration is not None:
                on_iteration(len(key) * budget.batch)
    return History(torch.cat(seen, 1), torch.cat(acted, 1))
