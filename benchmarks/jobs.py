"""Whole jobs of Stable-Baselines3 as users write them, dense and with one line more.

The other program has ``sparsify_(model, density)`` after the line that builds the model.
`python -m benchmarks jobs` times ``learn``, environment, replay buffer and all, by slices: both
models learn on from where they are, a slice each in turn, so that both see the same machine. Before
the first slice they have warmed up. What they learn is `job_returns`'s matter.
"""

from __future__ import annotations

import json
import statistics
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_tickets.ceilings import BUSY, Neighbours
from sparse_tickets.convert import SparsifyWarning
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import pinned_threads

from .results import RecordFile, choose, header, versions_in_words
from .tables import grid
from .turns import take_turns

DENSITY = 0.1
"""What is left in the models that are timed."""


@dataclass(frozen=True)
class Job:
    """An algorithm on an environment; what is not said here is Stable-Baselines3's default.

    Args:
        algorithm: its class's name.
        env: gymnasium's id.
        steps: timesteps of the whole job.
        width: of both hidden layers.
        warm: timesteps before the first slice that is timed.
        slice: timesteps of a slice.
        noise: deviation of a normal noise on actions.
        options: arguments of the algorithm.
    """

    algorithm: str
    env: str
    steps: int
    width: int
    warm: int
    slice: int
    noise: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        batch = self.options["batch_size"]
        return f"{self.algorithm}, {self.env}, {self.width}-{self.width}, batch {batch}"


# Hyper-parameters after rl-zoo3, where the defaults do not solve the task.
JOBS = (
    Job("PPO", "CartPole-v1", 30_720, 64, 2048, 2048, options={"batch_size": 64}),
    Job(
        *("DQN", "CartPole-v1", 50_000, 256, 1280, 2560),
        options={
            "batch_size": 128,
            "learning_rate": 2.3e-3,
            "buffer_size": 100_000,
            "learning_starts": 1000,
            "train_freq": 256,
            "gradient_steps": 128,
            "target_update_interval": 10,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04,
        },
    ),
    Job(
        *("SAC", "Pendulum-v1", 6_000, 256, 400, 150),
        options={"batch_size": 256, "learning_rate": 1e-3},
    ),
    Job(
        *("TD3", "Pendulum-v1", 8_000, 256, 800, 300),
        noise=0.1,
        options={"batch_size": 256, "learning_starts": 600, "gamma": 0.98},
    ),
)


def need_sb3() -> None:
    """Raise ``ValueError`` where stable-baselines3 is not installed."""
    if find_spec("stable_baselines3") is None:
        raise ValueError("stable-baselines3 is not installed: install sparse-tickets[sb3]")


def build(job: Job, seed: int, density: float) -> Any:
    """A model as the job says; at a density of 1 without the other line."""
    import numpy as np
    import stable_baselines3 as sb3
    from stable_baselines3.common.noise import NormalActionNoise

    from sparse_tickets.integrations.sb3 import sparsify_

    noise: dict[str, Any] = {}
    if job.noise:
        # Every task here that has noise has one action.
        noise = {"action_noise": NormalActionNoise(np.zeros(1), np.full(1, job.noise))}
    model = getattr(sb3, job.algorithm)(
        "MlpPolicy",
        job.env,
        seed=seed,
        device="cpu",
        policy_kwargs={"net_arch": [job.width, job.width]},
        **noise,
        **job.options,
    )
    if density < 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsifyWarning)
            sparsify_(model, density)
    return model


def check(label: str, policy: Any, density: float) -> None:
    """
    Raises:
        RuntimeError: a pruned weight is not zero after training, or more than asked for are left.
    """
    layers = [layer for layer in policy.modules() if isinstance(layer, SparseLinear)]
    moved = sum(int(layer.weight.data[~layer.mask].count_nonzero()) for layer in layers)
    kept = sum(int(layer.mask.count_nonzero()) for layer in layers)
    total = sum(layer.mask.numel() for layer in layers)
    if moved or kept > 1.01 * density * total:
        raise RuntimeError(
            f"{label}: {kept} of {total} weights are left, {moved} pruned ones moved"
        )


def run_jobs(
    console: Console,
    rounds: int = 5,
    threads: tuple[int, ...] = (1, 2),
    only: str = "",
    out: Path | None = None,
) -> Path:
    """Time the jobs dense and 90% pruned, slice by slice in turn; write JSON and a table.

    Args:
        console: where progress and the table go.
        rounds: slices of each model with each number of threads.
        threads: numbers of threads.
        only: jobs whose label contains this. What the file has of other jobs stays.
        out: default: results/jobs/<device>-<date>.json, with the table beside it.

    Returns:
        The file written.

    Raises:
        ValueError: no job has such a label, or stable-baselines3 is not installed.
    """
    chosen = choose(JOBS, only)
    need_sb3()
    file = RecordFile("jobs", table, rounds, out)
    for job in chosen:
        runs = []
        for count in threads:
            with pinned_threads(count):
                models = {"dense": build(job, 0, 1.0), "sparse": build(job, 0, DENSITY)}
                for model in models.values():
                    model.learn(job.warm)
                slices = {
                    name: partial(model.learn, job.slice, reset_num_timesteps=False)
                    for name, model in models.items()
                }
                neighbours = Neighbours()
                seconds = take_turns(slices, rounds)
                check(job.label, models["sparse"].policy, DENSITY)
            runs.append({"threads": count, "seconds": seconds, "busy": neighbours.share()})
        add_job(file, job.label, asdict(job), runs)
        console.print(f"{job.label}: done", highlight=False)
    console.print(str(file), highlight=False, soft_wrap=True)
    return file.path


def add_job(file: RecordFile, label: str, job: dict[str, Any], runs: list[dict]) -> None:
    """Write what `table` shows of a program, in the place of what the file has of it."""
    about = {"label": label, "job": job, "density": DENSITY, "run": header(file.run)}
    file.add(about | {"runs": runs}, lambda other: other["label"] == label)


def table(records: list[dict]) -> str:
    """Milliseconds of 1,000 timesteps and their ratio as Markdown.

    A side's time is the median of its slices at its better number of threads. A ratio is marked
    where other processes used more than 5% of the cores meanwhile.
    """
    heads = ["ms per 1,000 timesteps", "dense", "90% pruned", "gain", "1 thread", "2 threads"]
    rows = []
    for record in records:
        scale = 1e6 / record["job"]["slice"]
        medians = {
            run["threads"]: {n: scale * statistics.median(s) for n, s in run["seconds"].items()}
            for run in record["runs"]
        }
        dense, sparse = (min(m[name] for m in medians.values()) for name in ("dense", "sparse"))
        each = [
            f"{medians[n]['dense'] / medians[n]['sparse']:.2f}x" if n in medians else "-"
            for n in (1, 2)
        ]
        mark = "~" if any(run["busy"] > BUSY for run in record["runs"]) else ""
        gain = f"{mark}{dense / sparse:.2f}x"
        rows.append([record["label"], f"{dense:,.0f}", f"{sparse:,.0f}", gain, *each])
    return grid(heads, rows) + "\n"


def measured(path: Path) -> str:
    """The table of a file, and where it comes from."""
    records = json.loads(path.read_text())
    runs = [record["run"] for record in records]
    found = (f"{run['hardware']}; {versions_in_words(run['versions'])}" for run in runs)
    machines = "; ".join(dict.fromkeys(found))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    dates = ", ".join(dict.fromkeys(run["date"][:10] for run in runs))
    return (
        f"{table(records)}\nMeasured on {machines}; commit {commits}; {dates}. Each side with one "
        "thread or two, whichever is faster; ~: other processes used more than "
        f"{BUSY:.0%} of the cores."
    )
