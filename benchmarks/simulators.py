"""PPO where the simulator is a Python object: ours beside Stable-Baselines3 and the simulator.

`python -m benchmarks simulators` trains a population on gymnasium's Hopper-v5, LunarLander-v3 and
CartPole-v1 (as an object, not the fused one), stepped in one process and by a worker per core, and
one agent of Stable-Baselines3 by the same settings with one thread. Slices of the programs take
turns: environment, policy and updates all count. Beside them the bare simulator acts at random, in
one process and in one per core: no program that steps it can be faster. Where envpool is installed,
the population trains on its task of that name too, and its bare pool acts at random.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparse_tickets.algos import ppo
from sparse_tickets.ceilings import BUSY, Neighbours
from sparse_tickets.envs import env_spec, open_env, use_workers
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.provenance import versions
from sparse_tickets.timing import pinned_threads

from .jobs import need_sb3
from .results import RecordFile, available_cores, choose, header
from .tables import grid
from .turns import ratio, take_turns

TICKETS = 16


@dataclass(frozen=True)
class SimulatorTask:
    """An environment, and settings by which PPO trains there: of rl-zoo3, with a shorter horizon.

    Args:
        env: gymnasium's id; with its module before it, never the fused task of that name.
        copies: per agent.
        horizon: steps between updates.
        epochs: passes over these steps, in minibatches of 64.
        slices: iterations of a slice, of ours and of Stable-Baselines3.
        steps: of the bare simulator in a slice, of envpool's as many for each core.
    """

    env: str
    copies: int
    horizon: int
    epochs: int
    slices: tuple[int, int]
    steps: int

    @property
    def label(self) -> str:
        return self.env.removeprefix("gymnasium:")

    @property
    def pooled(self) -> str:
        """The name of envpool's task."""
        return f"envpool:{self.label}"

    @property
    def settings(self) -> ppo.PPO:
        batch = self.copies * self.horizon
        return ppo.PPO(
            steps=batch,
            copies=self.copies,
            horizon=self.horizon,
            epochs=self.epochs,
            minibatches=batch // 64,
            learning_rate=3e-4,
            clip_value=False,
            value_coef=1.0,
            entropy_coef=0.0,
        )


TASKS = (
    SimulatorTask("Hopper-v5", 1, 512, 10, (1, 3), 8_000),
    SimulatorTask("LunarLander-v3", 16, 64, 4, (1, 3), 20_000),
    SimulatorTask("gymnasium:CartPole-v1", 8, 32, 20, (2, 3), 40_000),
)


@contextmanager
def _ours(task: SimulatorTask, name: str, workers: int) -> Iterator[Callable[[], int]]:
    """Trains the population for a slice, on the task of that name; returns its agent-steps."""
    settings, key = task.settings, torch.arange(TICKETS)
    arena = policy_arena(env_spec(name))
    population = Population.create(arena, initialise(arena, key))
    with use_workers(workers), open_env(name, TICKETS, task.copies) as env:
        iterate = ppo.Iteration(settings, env, population, key, 0)
        iterate.learning_rate.fill_(settings.learning_rate)

        def run() -> int:
            for _ in range(task.slices[0]):
                iterate()
            return task.slices[0] * TICKETS * settings.batch

        yield run


@contextmanager
def _theirs(task: SimulatorTask) -> Iterator[Callable[[], int]]:
    """The same of one agent of Stable-Baselines3."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    settings = task.settings
    model = PPO(
        "MlpPolicy",
        make_vec_env(task.env, task.copies, seed=0),
        n_steps=settings.horizon,
        batch_size=64,
        n_epochs=settings.epochs,
        device="cpu",
        seed=0,
    )
    steps = task.slices[1] * settings.batch

    def run() -> int:
        with pinned_threads(1):
            model.learn(steps, reset_num_timesteps=False)
        return steps

    yield run
    model.get_env().close()  # type: ignore[union-attr]


@contextmanager
def _bare(task: SimulatorTask, processes: int) -> Iterator[Callable[[], int]]:
    """Random actions in an environment per process, all at once."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:

        def run() -> int:
            each = [pool.submit(_act, task.env, task.steps) for _ in range(processes)]
            return sum(one.result() for one in each)

        yield run


@contextmanager
def _bare_pool(task: SimulatorTask, threads: int) -> Iterator[Callable[[], int]]:
    """Random actions in as many copies as the population has, all in one call of envpool."""
    import envpool
    import numpy as np

    copies = TICKETS * task.copies
    pool = envpool.make_gymnasium(task.label, num_envs=copies, num_threads=threads, seed=0)
    pool.reset()
    pool.action_space.seed(0)
    calls = task.steps * threads // copies
    actions = [np.stack([pool.action_space.sample() for _ in range(copies)]) for _ in range(calls)]

    def run() -> int:
        for action in actions:
            pool.step(action)
        return calls * copies

    yield run


def _act(name: str, steps: int) -> int:
    import gymnasium

    env = gymnasium.make(name, disable_env_checker=True)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(steps)]
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    env.close()
    return steps


def _measure(task: SimulatorTask, rounds: int) -> dict[str, list[float]]:
    """Steps per second of each program, by rounds."""
    cores = available_cores()
    programs = {
        "ours, this process": _ours(task, task.env, 1),
        f"ours, {cores} workers": _ours(task, task.env, cores),
        "simulator, one process": _bare(task, 1),
        f"simulator, {cores} processes": _bare(task, cores),
        "SB3, one agent": _theirs(task),
    }
    if find_spec("envpool"):
        programs[f"ours on envpool, {cores} threads"] = _ours(task, task.pooled, cores)
        programs[f"envpool, {cores} threads"] = _bare_pool(task, cores)
    with ExitStack() as stack:
        running = {name: stack.enter_context(program) for name, program in programs.items()}
        for run in running.values():
            run()
        return take_turns(running, rounds, rates=True)


def run_simulators(
    console: Console, rounds: int = 5, only: str = "", out: Path | None = None
) -> Path:
    """Measure every task; write JSON and a table.

    Args:
        console: where the table goes.
        rounds: slices of each program.
        only: tasks whose environment contains this. What the file has of others stays.
        out: default: results/simulators/<device>-<date>.json, with the table beside it.

    Returns:
        The file written.

    Raises:
        ValueError: no environment has such a name, or stable-baselines3 is not installed.
    """
    chosen = choose(TASKS, only)
    need_sb3()
    file = RecordFile("simulators", table, rounds, out)
    for task in chosen:
        neighbours = Neighbours()
        about = {"task": asdict(task), "tickets": TICKETS, "rates": _measure(task, rounds)}
        about["simulators"] = versions(("gymnasium", "mujoco", "Box2D", "envpool"))
        record = about | {"busy": neighbours.share(), "run": header(file.run)}
        file.add(record, lambda other, env=task.env: other["task"]["env"] == env)
    console.print(str(file), highlight=False, soft_wrap=True)
    return file.path


def table(records: list[dict[str, Any]]) -> str:
    """Steps per second as Markdown: medians of rounds; ratios within rounds, with their range."""
    heads = ["PPO, 64-64 tanh", "program", "steps/s", "vs SB3, one agent", "vs the simulator alone"]
    rows = []
    for record in records:
        rates, name = record["rates"], record["task"]["env"].removeprefix("gymnasium:")
        mark = "~" if record["busy"] > BUSY else ""
        bare = [found for program, found in rates.items() if program.startswith("simulator")]
        alone = max(bare, key=statistics.median)
        for program, found in rates.items():
            is_ours, of_envpool = program.startswith("ours"), "envpool" in program
            if of_envpool:
                alone = next(rates[other] for other in rates if other.startswith("envpool"))
            ratios = [
                _times(found, rates["SB3, one agent"]) if is_ours else "",
                _times(found, alone) if is_ours or program.startswith("SB3") else "",
            ]
            label = f"{program}, {record['tickets']} tickets" if is_ours else program
            rows.append([name, label, f"{mark}{statistics.median(found):,.0f}", *ratios])
    return (
        f"{grid(heads, rows, text=2)}\n\n"
        f"~: other processes used more than {BUSY:.0%} of the cores. SB3 computes with one thread; "
        "as many such processes as there are cores add up to at most as many times its rate. "
        "envpool has simulators of its own; what trains on them is held against those.\n"
    )


def _times(one: list[float], other: list[float]) -> str:
    median, spread = ratio(one, other, 2)
    return f"{median}x {spread}"
