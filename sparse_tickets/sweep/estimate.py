"""What a sweep will take, before it runs: cells, time by a short probe, disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from sparse_tickets.algos.algorithm import Dataset, Demonstrations, History, Networks, Taught
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.registry import find_algorithm
from sparse_tickets.envs import open_env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.population import Population, initialise
from sparse_tickets.prune import random_mask
from sparse_tickets.sweep.progress import expert_steps, total_steps
from sparse_tickets.sweep.spec import Sweep

__all__ = ["estimate", "estimate_study"]

# Agent-steps of one probed iteration, at most; Python's environments take a thousand times longer.
_PROBE_STEPS, _PYTHON_PROBE_STEPS = 1 << 17, 1 << 12
_TIMED_ITERATIONS = 2


class _Needs(NamedTuple):
    """Of one algorithm; seconds of evaluation are an upper bound, or None where nobody knows."""

    cells: int
    steps: int
    training_s: float
    evaluation_s: float | None
    disk: float


def estimate(spec: Sweep) -> Table:
    """The cells of a sweep, and the time and disk it will take on this machine.

    Times come from a few short iterations at the densest and the sparsest level, so they are rough;
    kernels compile before the clock starts. No evaluation is played: its time is that of acting to
    the time limit in every episode.

    Raises:
        ValueError: an unknown environment.
    """
    table = Table(title=Text(f"{spec.env}: {spec.levels} levels, {spec.seeds} seeds"))
    for column in ("algo", "cells", "agent-steps", "training", "evaluation", "disk"):
        table.add_column(column, justify="left" if column == "algo" else "right", no_wrap=True)
    needs = {algo: _needs(spec, algo) for algo in spec.algos}
    for algo, need in needs.items():
        table.add_row(algo, *_texts(need))
    table.add_section()
    table.add_row("in all", *_texts(_summed(needs.values(), total_steps(spec))))
    return table


def estimate_study(study: Mapping[str, Sweep]) -> Table:
    """What the sweeps of a study take, and all together; as `estimate`.

    Raises:
        ValueError: an unknown environment.
    """
    table = Table(title=Text(f"{len(study)} sweeps"))
    for column in ("sweep", "cells", "agent-steps", "training", "evaluation", "disk"):
        table.add_column(column, justify="left" if column == "sweep" else "right", no_wrap=True)
    needs = []
    for name, spec in study.items():
        steps = total_steps(spec)
        needs.append(_summed([_needs(spec, algo) for algo in spec.algos], steps))
        table.add_row(Text(name), *_texts(needs[-1]))
    table.add_section()
    table.add_row("in all", *_texts(_summed(needs, sum(need.steps for need in needs))))
    return table


def _summed(needs: Collection[_Needs], steps: int) -> _Needs:
    evaluations = [need.evaluation_s for need in needs if need.evaluation_s is not None]
    return _Needs(
        sum(need.cells for need in needs),
        steps,
        sum(need.training_s for need in needs),
        sum(evaluations) if len(evaluations) == len(needs) else None,
        sum(need.disk for need in needs),
    )


def _texts(need: _Needs) -> tuple[str, ...]:
    evaluation = "unknown" if need.evaluation_s is None else f"<= {_clock(need.evaluation_s)}"
    return (
        f"{need.cells:,}",
        f"{need.steps:,}",
        _clock(need.training_s),
        evaluation,
        f"{need.disk / 1e6:,.1f} MB",
    )


def _needs(spec: Sweep, algo: str) -> _Needs:
    first, later = spec.cells
    pruned = later * (spec.levels - 1)
    # The cells' densities add up to this many dense ones: a geometric series from level 1 on.
    dense_cells = first + later * ((1.0 - spec.density(spec.levels)) / spec.rate - 1.0)
    widest = min(spec.chunk, max(first, later if pruned else 0))
    dense, acting = _probe(spec, algo, widest, 1.0)
    sparse, _ = _probe(spec, algo, widest, spec.density(spec.levels - 1))
    steps = first * spec.train_steps(algo, 0) + pruned * spec.train_steps(algo, 1)
    # Between the two, time grows with density.
    share = dense_cells / (first + pruned)
    training_s = steps * (sparse + (dense - sparse) * share)
    arena = spec.arena(algo)
    # Four weight rows on the mask, the rest dense, and the mask's bits.
    dense_bytes = 16 * (arena.size - arena.prunable) + arena.prunable // 8 + 600
    disk = 16 * arena.prunable * dense_cells + dense_bytes * (first + pruned)
    if algo in spec.imitating[:1]:  # the experts are trained once for all
        if spec.bc.states != "student":
            width = spec.env_spec.observation_dim + 2 * spec.env_spec.action_dim
            disk += 4 * width * spec.bc.teachers * spec.ppo.steps
        if steps_before := expert_steps(spec):
            training_s += steps_before * _probe(spec, spec.bc.expert, spec.bc.experts, 1.0)[0]
    limit, evaluation_s = spec.env_spec.time_limit, None
    if limit is not None:
        # Greedy and sampled, before and after training and at every point; and the best checkpoint.
        episodes = 2 * spec.evaluation.points * spec.evaluation.episodes
        episodes += 5 * spec.evaluation.final_episodes
        evaluation_s = (first + pruned) * episodes * limit * acting
    return _Needs(first + pruned, steps, training_s, evaluation_s, disk)


def _probe(spec: Sweep, algo: str, tickets: int, density: float) -> tuple[float, float]:
    """Seconds of training and of acting alone, per agent-step of ``tickets`` side by side."""
    key = torch.arange(tickets, device="cpu")
    arena = spec.arena(algo)
    actors = spec.expert_arena if find_algorithm(algo).imitates else arena
    mask = random_mask(key, round(density * arena.prunable), arena)
    weight = initialise(arena, key, spec.init, spec.log_std)
    population = Population.create(arena, weight, mask, density)
    acting = Population.create(actors, initialise(actors, key, spec.init, spec.log_std))
    own = spec.budget(algo)
    with open_env(spec.env, tickets, own.copies) as env:
        most = _PYTHON_PROBE_STEPS if env.task is None else _PROBE_STEPS
        budget = _shorter(spec.ppo, most // tickets)
        algorithm, taught = find_algorithm(algo), None
        if algorithm.imitates:
            taught = Demonstrations(_any_dataset(spec, arena, budget), torch.zeros_like(key))
        iterate = algorithm.iteration(spec.settings_of(algo), budget, env, population, key, taught)
        batch = budget.batch if own is spec.ppo else own.batch
        training_s = _seconds(iterate) / (tickets * batch)
        obs = env.reset(key)
        steps = batch // own.copies
        act = lambda: rollout(acting.parameters, actors, env, obs, key, steps)  # noqa: E731
        return training_s, _seconds(act) / (tickets * batch)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, once everything is compiled."""
    call()
    begin = time.perf_counter()
    for _ in range(_TIMED_ITERATIONS):
        call()
    return (time.perf_counter() - begin) / _TIMED_ITERATIONS


def _shorter(settings: PPO, most: int) -> PPO:
    """Iterations of at most so many steps per ticket, where halving the horizon leads there."""
    while settings.batch > most and settings.horizon % 2 == 0:
        # As many samples in a minibatch, as long as there are several.
        even = settings.minibatches % 2 == 0
        settings = replace(
            settings,
            horizon=settings.horizon // 2,
            minibatches=settings.minibatches // 2 if even else 1,
        )
    return settings


def _any_dataset(spec: Sweep, arena: Arena, budget: PPO) -> Taught:
    """Of the right shapes: what it holds does not matter to time."""
    env, states = spec.env_spec, spec.bc.states
    if states == "student":
        return Networks(torch.randn(1, arena.size, dtype=torch.float32, device="cpu"))
    steps = budget.batch * (budget.iterations if states == "replay" else 1)
    obs = torch.randn(1, 1, env.observation_dim, dtype=torch.float32, device="cpu")
    target = obs.new_zeros(1, 1, env.action_dim if env.discrete else 2 * env.action_dim)
    if env.discrete:
        target = target.log_softmax(-1)
    kind = History if states == "replay" else Dataset
    return kind(obs.expand(1, steps, -1), target.expand(1, steps, -1))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
