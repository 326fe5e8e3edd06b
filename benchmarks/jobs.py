"""Whole jobs of Stable-Baselines3, dense and with one line more: ``python -m benchmarks jobs``.

A job is a program as its users write it: build the model, ``learn``, evaluate. The other program
has ``sparsify_(model, density=0.1)`` after the first line. For each seed both run in turn, with one
thread and with two; a time is that of ``learn`` from the first step to the last, environment,
replay buffer and all; a tenth of a job comes before, so that all is compiled. A ratio takes each
side at its better number of threads, and is marked where other processes used more than
5% of the cores meanwhile.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_tickets.ceilings import BUSY, Neighbours
from sparse_tickets.convert import SparsifyWarning
from sparse_tickets.files import write_atomic
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import pinned_threads

from .results import RESULTS, provenance

__all__ = ["JOBS", "Job", "run_jobs", "table"]

DENSITY = 0.1
EPISODES = 20


@dataclass(frozen=True)
class Job:
    """An algorithm on an environment; what is not said here is Stable-Baselines3's default."""

    algorithm: str
    env: str
    steps: int
    width: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        batch = self.options["batch_size"]
        return f"{self.algorithm}, {self.env}, {self.width}-{self.width}, batch {batch}"


JOBS = (
    Job("PPO", "CartPole-v1", 30_720, 64, {"batch_size": 64}),
    Job(
        "DQN",
        "CartPole-v1",
        20_000,
        256,
        {
            "batch_size": 128,
            "learning_rate": 6.3e-4,
            "train_freq": 4,
            "learning_starts": 1000,
            "target_update_interval": 250,
            "exploration_final_eps": 0.04,
        },
    ),
    Job("SAC", "Pendulum-v1", 4_000, 256, {"batch_size": 256, "learning_rate": 1e-3}),
    Job("TD3", "Pendulum-v1", 4_000, 256, {"batch_size": 256}),
)


def _run(job: Job, seed: int, threads: int, sparse: bool) -> tuple[float, float]:
    """Seconds of ``learn``, and the mean return of greedy episodes after it."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.evaluation import evaluate_policy

    from sparse_tickets.integrations.sb3 import sparsify_

    with pinned_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        model = getattr(sb3, job.algorithm)(
            "MlpPolicy",
            job.env,
            seed=seed,
            device="cpu",
            policy_kwargs={"net_arch": [job.width, job.width]},
            **job.options,
        )
        if sparse:
            sparsify_(model, density=DENSITY)
        begin = time.perf_counter()
        model.learn(job.steps)
        seconds = time.perf_counter() - begin
        if sparse:
            _check(job.label, model.policy)
        returns, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=EPISODES)
    return seconds, float(returns)  # type: ignore[arg-type]


def _check(label: str, policy: Any) -> None:
    """
    Raises:
        RuntimeError: a pruned weight is not zero after training, or more than asked for are left.
    """
    layers = [layer for layer in policy.modules() if isinstance(layer, SparseLinear)]
    moved = sum(int(layer.weight.data[~layer.mask].count_nonzero()) for layer in layers)
    kept = sum(int(layer.mask.count_nonzero()) for layer in layers)
    total = sum(layer.mask.numel() for layer in layers)
    if moved or kept > 1.01 * DENSITY * total:
        raise RuntimeError(
            f"{label}: {kept} of {total} weights are left, {moved} pruned ones moved"
        )


def run_jobs(
    console: Console,
    seeds: int = 2,
    threads: tuple[int, ...] = (1, 2),
    only: str = "",
    scale: float = 1.0,
    out: Path | None = None,
) -> Path:
    """Run each job dense and sparse, in turn; write JSON and a table.

    Args:
        console: where progress and the table go.
        seeds: runs of each with each number of threads.
        threads: numbers of threads.
        only: jobs whose label contains this. What the file has of other jobs stays.
        scale: factor on the timesteps of every job.
        out: default: results/jobs/<device>-<date>.json, with the table beside it.

    Returns:
        The file written.

    Raises:
        ValueError: no job has such a label, or stable-baselines3 is not installed.
    """
    chosen = [job for job in JOBS if only in job.label]
    if not chosen:
        raise ValueError(f"only must be part of one of {[j.label for j in JOBS]}, got {only!r}")
    if find_spec("stable_baselines3") is None:
        raise ValueError("stable-baselines3 is not installed: install sparse-tickets[sb3]")
    run = provenance("jobs", "cpu", None, seeds)
    path = out or RESULTS / "jobs" / f"{run.device}-{run.date[:10]}.json"
    header = {
        key: value
        for key, value in asdict(run).items()
        if key in ("device", "date", "hardware", "versions", "commit")
    }
    records = json.loads(path.read_text()) if path.exists() else []
    for job in chosen:
        job = replace(job, steps=int(job.steps * scale))
        for name in ("dense", "sparse"):
            _run(replace(job, steps=job.steps // 10), 0, threads[0], name == "sparse")
        runs = []
        for seed in range(seeds):
            for count in threads:
                for name in ("dense", "sparse"):
                    neighbours = Neighbours()
                    seconds, returns = _run(job, seed, count, name == "sparse")
                    runs.append(
                        {"name": name, "seed": seed, "threads": count, "seconds": seconds}
                        | {"return": returns, "busy": neighbours.share()}
                    )
        record = {"label": job.label, "job": asdict(job), "density": DENSITY, "run": header}
        records = [r for r in records if r["label"] != job.label] + [record | {"runs": runs}]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(records, indent=1) + "\n").encode())
        write_atomic(path.with_suffix(".md"), table(records).encode())
        console.print(f"{job.label}: done", highlight=False)
    console.print(table(records), highlight=False, soft_wrap=True)
    return path


def table(records: list[dict]) -> str:
    """Seconds, their ratio and returns as Markdown: medians and means over seeds."""
    lines = [
        "| a whole job | steps | seeds | dense, s | 90% pruned, s | gain | dense, return "
        "| 90% pruned, return |",
        "| --- |" + " ---: |" * 7,
    ]
    for record in records:
        sides = [_side(record["runs"], name) for name in ("dense", "sparse")]
        (dense, dense_return), (sparse, sparse_return) = sides
        mark = "~" if any(run["busy"] > BUSY for run in record["runs"]) else ""
        seeds = len({run["seed"] for run in record["runs"]})
        lines.append(
            f"| {record['label']} | {record['job']['steps']:,} | {seeds} | {dense:.1f} "
            f"| {sparse:.1f} | {mark}{dense / sparse:.2f}x | {dense_return} | {sparse_return} |"
        )
    return "\n".join(lines) + "\n"


def _side(runs: list[dict], name: str) -> tuple[float, str]:
    """Median seconds at the better number of threads; the returns, mean and range over runs."""
    here = [run for run in runs if run["name"] == name]
    counts = {run["threads"] for run in here}
    seconds = min(
        statistics.median(run["seconds"] for run in here if run["threads"] == count)
        for count in counts
    )
    returns = [run["return"] for run in here]
    mean = statistics.mean(returns)
    return seconds, f"{mean:.0f} ({min(returns):.0f} to {max(returns):.0f})"
