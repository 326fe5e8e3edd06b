"""What whole jobs of Stable-Baselines3 learn, dense and pruned from the start, seed by seed.

Each run is a file, written when it is complete, so that a stopped set goes on where it was. Greedy
episodes are the same for all: their starts come from one seed.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_tickets.timing import pinned_threads

from .jobs import JOBS, Job, build, check, need_sb3
from .results import RecordFile, choose
from .tables import grid

DENSITIES = (1.0, 0.1, 0.2)
CHECKPOINTS = 5
EPISODES = 10
LAST_EPISODES = 30
_STARTS = 10_000


def _run(job: Job, seed: int, density: float) -> dict[str, Any]:
    """Greedy returns: means along the way, and of every episode at the end; random actions'."""
    model = build(job, seed, density)
    every = job.steps // CHECKPOINTS
    curve: list[float] = []

    def watch(local: Any, _: Any) -> bool:
        if model.num_timesteps % every == 0:
            curve.append(statistics.mean(_evaluate(job, model, EPISODES)))
        return True

    model.learn(job.steps, callback=watch)
    if density < 1:
        check(job.label, model.policy, density)
    final = _evaluate(job, model, LAST_EPISODES)
    return {"curve": curve, "final": final, "random": statistics.mean(_random(job))}


def _evaluate(job: Job, model: Any, episodes: int) -> list[float]:
    """Returns of greedy episodes, whose starts are the same for every model."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    env = make_vec_env(job.env, seed=_STARTS)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, return_episode_rewards=True)
    env.close()
    return [float(value) for value in returns]  # type: ignore[union-attr]


def _random(job: Job) -> list[float]:
    """Returns of episodes of random actions."""
    import gymnasium

    env = gymnasium.make(job.env)
    env.action_space.seed(_STARTS)
    returns = []
    for episode in range(LAST_EPISODES):
        env.reset(seed=_STARTS + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


def run_returns(console: Console, seeds: int = 5, only: str = "", out: Path | None = None) -> Path:
    """Run every job at every density with every seed, one thread; write JSON and a table.

    Args:
        console: where progress and the table go.
        seeds: 0 to this.
        only: jobs whose label contains this. What the file has of other jobs stays.
        out: default: results/jobs/<device>-returns.json, with the table beside it. Runs that it has
            of the same job are not run again.

    Returns:
        The file written.

    Raises:
        ValueError: no job has such a label, or stable-baselines3 is not installed.
    """
    chosen = choose(JOBS, only)
    need_sb3()
    file = RecordFile("jobs", table, seeds, out, "returns")
    known = {_key(record) for record in file.records}
    # Seeds outermost: whatever is there when it is stopped has all jobs and densities.
    for seed, job, density in product(range(seeds), chosen, DENSITIES):
        record: dict[str, Any] = {
            "label": job.label, "job": asdict(job), "seed": seed, "density": density,
        }  # fmt: skip
        if _key(record) in known:
            continue
        with pinned_threads(1):
            record |= _run(job, seed, density)
        file.add(record | {"versions": file.run.versions, "commit": file.run.commit})
        mean = statistics.mean(record["final"])
        console.print(f"{job.label}, {density:.0%}, seed {seed}: {mean:.0f}", highlight=False)
    console.print(str(file), highlight=False, soft_wrap=True)
    return file.path


def _key(record: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps([record["job"], record["seed"], record["density"]], sort_keys=True)


def table(records: list[dict[str, Any]]) -> str:
    """Greedy returns as Markdown: mean and range over seeds, at the end and at the best checkpoint.

    In brackets the share that is reached of what the dense job gains over random actions.
    """
    heads = ["a whole job", "timesteps", "seeds"]
    heads += [each for d in DENSITIES for each in (f"{_name(d)}: end", "best checkpoint")]
    rows = []
    # A job that was made longer is another one, by the same label.
    jobs = dict.fromkeys((record["label"], record["job"]["steps"]) for record in records)
    for label, steps in jobs:
        here = [r for r in records if (r["label"], r["job"]["steps"]) == (label, steps)]
        cells = []
        seeds = len({record["seed"] for record in here})
        dense = _means(here, DENSITIES[0])
        floor = here[0]["random"]
        for density in DENSITIES:
            for found, reference in zip(_means(here, density), dense, strict=True):
                cells.append(_cell(found, reference if density < 1 else [], floor))
        rows.append([label, f"{steps:,}", f"{seeds}", *cells])
    return grid(heads, rows) + "\n"


def _name(density: float) -> str:
    return "dense" if density == 1 else f"{1 - density:.0%} pruned"


def _means(records: list[dict[str, Any]], density: float) -> tuple[list[float], list[float]]:
    """Of each seed the mean return at the end, and at its best checkpoint."""
    here = [record for record in records if record["density"] == density]
    final = [statistics.mean(record["final"]) for record in here]
    return final, [max(record["curve"]) for record in here]


def _cell(found: list[float], dense: list[float], floor: float) -> str:
    if not found:
        return "-"
    mean = statistics.mean(found)
    text = f"{mean:.0f} ({min(found):.0f} to {max(found):.0f})"
    if not dense:
        return text
    return f"{text} [{(mean - floor) / (statistics.mean(dense) - floor):.0%}]"
