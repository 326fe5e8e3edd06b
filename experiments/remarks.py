"""What rows say of how their cells were trained, read off the cells themselves."""

from __future__ import annotations

import math

import gymnasium
import polars as pl

from experiments.sweeps import LEVEL, SEEDS
from sparse_tickets.envs import env_spec
from sparse_tickets.sweep.protocols import protocol

__all__ = [
    "budgets",
    "cuts",
    "left_out",
    "levels_of",
    "per_level",
    "setting",
    "solved",
    "unsolved",
]

OFF_POLICY = {"dqn": "DQN", "sac": "SAC"}
"""Algorithms with a budget of their own."""


def per_level(cells: pl.DataFrame, rate: float = LEVEL) -> float:
    """How many levels of a rate, else of the protocol's own, one level of these cells is."""
    first = cells.filter(pl.col("level") == 1)["density"][0]
    return math.log(first) / math.log(1 - rate)


def solved(env: str) -> float | None:
    """The return at which a task counts as solved; known without what simulates it."""
    threshold = gymnasium.spec(env).reward_threshold
    return env_spec(env).solved if threshold is None else threshold


def setting(cells: pl.DataFrame) -> str:
    """What was run, by the cells themselves, and where that is less than the protocol's."""
    pruned = 1 - cells.filter(pl.col("level") == 1)["density"][0]
    levels = cells["level"].max() + 1
    words = (
        f"{cells['env'][0]}, {cells['seed'].n_unique()} seeds, {levels} levels of "
        f"{pruned:.0%} down to {cells['density'].min():.2%}, {budgets(cells)}, "
        f"{len(cells):,} trainings"
    )
    at_once = per_level(cells, protocol(cells["env"][0]).rate)
    apart = f"{at_once:.2g} of its levels at a time" if at_once > 1.1 else ""
    cut = ", ".join(filter(None, [cuts(cells), apart]))
    return f"{words} (cut: {cut})" if cut else words


def unsolved(cells: pl.DataFrame) -> str:
    """A remark where dense policies that learn by reinforcement end below what counts as solved."""
    enough = solved(cells["env"][0])
    dense = cells.filter((pl.col("level") == 0) & (pl.col("algo") != "bc"))
    end = dense["return_final"].to_numpy().mean() if len(dense) else math.inf
    if enough is None or end >= enough:
        return ""
    return f" (dense policies end at {end:.3g}, not at the {enough:g} that counts as solved)"


def left_out(cells: pl.DataFrame) -> str:
    """A remark on which of four conditions and two kinds of controls were not run."""
    run = set(cells.select("condition", "controls").rows())
    shuffled = ("mask/permuted", "permuted/permuted")
    kinds = {kind for condition, kind in run if condition in shuffled}
    random = any(condition == "random/re-init" for condition, _ in run)
    if not kinds and not random:
        return " (tickets alone)"
    found = [f"{kind} controls" for kind in ("own", "ticket") if kind not in kinds]
    found += [] if random else ["random masks"]
    return f" (without {' and '.join(found)})" if found else ""


def budgets(cells: pl.DataFrame) -> str:
    """Steps of a training, those of algorithms with a budget of their own beside the others'."""
    on_policy = cells.filter(~pl.col("algo").is_in(list(OFF_POLICY)))["train_steps"].max()
    found = [f"{on_policy:,} steps"] if on_policy else []
    for algo, name in OFF_POLICY.items():
        steps = cells.filter(pl.col("algo") == algo)["train_steps"].max()
        found += [f"{steps:,} steps of {name}"] if steps else []
    return " and ".join(found)


def cuts(cells: pl.DataFrame) -> str:
    """Where steps and seeds are fewer than the protocol's; empty where they are not."""
    on_policy = cells.filter(~pl.col("algo").is_in(list(OFF_POLICY)))
    found, seeds = [], cells["seed"].n_unique()
    for algo, name in {"ppo": "", **OFF_POLICY}.items():
        here = on_policy if algo == "ppo" else cells.filter(pl.col("algo") == algo)
        full = protocol(cells["env"][0]).settings_of(algo).steps
        steps = here["train_steps"].max()
        if steps and steps < 0.95 * full:
            found.append(f"{steps / full:.0%} of the protocol's steps{f' of {name}' * bool(name)}")
    if seeds < SEEDS:
        found.append(f"{seeds} of {SEEDS} seeds")
    return ", ".join(found)


def levels_of(cells: pl.DataFrame, algo: str) -> list[int]:
    """The levels an algorithm has in these cells."""
    return cells.filter(pl.col("algo") == algo)["level"].unique().sort().to_list()
