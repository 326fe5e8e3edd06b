"""What a sweep will take, before it runs: cells, time measured on a short probe, disk."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.table import Table

from sparse_tickets.algos import bc, ppo
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.population import Population, initialise
from sparse_tickets.prune import random_mask
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.run import expert_arena
from sparse_tickets.sweep.spec import Sweep

__all__ = ["estimate"]

_PROBE_ITERATIONS = 4


def estimate(spec: Sweep) -> Table:
    """The cells of a sweep, and the time and disk it will take on this machine.

    Times come from training a few iterations at the densest and the sparsest level, so they are
    rough; the kernels compile before the clock starts.

    Raises:
        ValueError: an unknown environment.
    """
    table = Table(title=f"{spec.env}: {spec.levels} levels, {spec.seeds} seeds")
    for column in ("algo", "cells", "agent-steps", "time", "disk"):
        table.add_column(column, justify="left" if column == "algo" else "right")
    seconds_in_all, bytes_in_all, cells_in_all = 0.0, 0, 0
    for algo in spec.algos:
        tickets = [(level, len(tracks)) for level, _, tracks in spec.units(algo)]
        cells = sum(count for _, count in tickets)
        steps = sum(count * spec.train_steps(level) for level, count in tickets)
        widest = max(count for _, count in tickets)
        dense = _seconds_per_step(spec, algo, widest, 1.0)
        sparse = _seconds_per_step(spec, algo, widest, spec.density(spec.levels - 1))
        seconds = sum(
            count * spec.train_steps(level) * (sparse + (dense - sparse) * spec.density(level))
            for level, count in tickets
        )
        disk = sum(count * _ticket_bytes(spec, algo, level) for level, count in tickets)
        if algo == "bc":
            transitions = spec.bc.experts * spec.ppo.steps
            width = spec.env_spec.observation_dim + 2 * spec.env_spec.action_dim
            disk += 4 * transitions * width
            expert_steps = spec.bc.experts * (spec.bc.expert_steps or spec.ppo.steps)
            seconds += expert_steps * _seconds_per_step(spec, "ppo", spec.bc.experts, 1.0)
        table.add_row(algo, f"{cells:,}", f"{steps:,}", _clock(seconds), f"{disk / 1e6:,.1f} MB")
        seconds_in_all, bytes_in_all = seconds_in_all + seconds, bytes_in_all + disk
        cells_in_all += cells
    table.add_section()
    table.add_row(
        "in all",
        f"{cells_in_all:,}",
        f"{total_steps(spec):,}",
        _clock(seconds_in_all),
        f"{bytes_in_all / 1e6:,.1f} MB",
    )
    return table


def _seconds_per_step(spec: Sweep, algo: str, tickets: int, density: float) -> float:
    """Seconds an agent-step takes, its share of the evaluations included."""
    arena = spec.arena(algo)
    key = torch.arange(tickets)
    kept = round(density * arena.prunable)
    mask = random_mask(key, kept, arena)
    budget = replace(spec.ppo, steps=_PROBE_ITERATIONS * spec.ppo.batch)
    evaluation = Evaluation(1, spec.evaluation.episodes, spec.evaluation.final_episodes)
    dataset = _probe_dataset(spec, budget) if algo == "bc" else None
    train_s = evaluate_s = 0.0
    for _ in range(2):  # the first round compiles
        weight = initialise(arena, key, spec.init, spec.log_std)
        population = Population.create(arena, weight, mask, density)
        if dataset is None:
            result = ppo.train(budget, spec.env, population, key, evaluation=evaluation)
        else:
            assignment = torch.zeros(tickets, dtype=torch.int64)
            result = bc.train(
                budget, spec.env, population, key, dataset, assignment, evaluation=evaluation
            )
        train_s = result.train_s
        evaluate_s = result.wall_s - result.train_s
    per_step = train_s / (tickets * budget.steps)
    # One greedy and one sampled evaluation per point, and three final ones.
    episodes = 2 * spec.evaluation.points * spec.evaluation.episodes
    episodes += 3 * spec.evaluation.final_episodes
    probed = 2 * evaluation.episodes + 3 * evaluation.final_episodes
    return per_step + evaluate_s * episodes / probed / (tickets * spec.ppo.steps)


def _probe_dataset(spec: Sweep, budget: ppo.PPO) -> bc.Dataset:
    key = torch.zeros(1, dtype=torch.int64)
    arena = expert_arena(spec)
    experts = bc.Experts(initialise(arena, key, spec.init, spec.log_std), torch.zeros(1), key)
    return bc.demonstrations(experts, spec.env, arena, budget.steps)


def _ticket_bytes(spec: Sweep, algo: str, level: int) -> int:
    """Four weight rows on the support, the rest dense, and the mask's bits."""
    arena = spec.arena(algo)
    return 16 * (spec.kept(algo, level) + arena.size - arena.prunable) + arena.prunable // 8 + 600


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
