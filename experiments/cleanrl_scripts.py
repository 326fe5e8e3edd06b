"""Dense policies by CleanRL's own scripts, as they are, for `cleanrl.py` to compare ours with.

    PYTHON experiments/cleanrl_scripts.py CLONE

``CLONE`` is a clone of CleanRL, ``PYTHON`` an interpreter with what its scripts import (gymnasium
0.29.1, numpy below 2, tensorboard, tyro) and polars; nothing of this library is imported. Each seed
of ``ppo.py`` (on CartPole and Acrobot) and ``dqn.py`` (on CartPole) trains with the script's
defaults but for the number of steps, and of ``dqn.py`` some once more with Huber's loss in place of
the squared error. Kept are
the mean return of the episodes that ended in each of twenty windows of the training, and of 100
fresh episodes of the final weights, by greedy and by sampled actions. Rows go to
``results/cleanrl_scripts.parquet``, seed by seed; those that are there are not trained again.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np
import polars as pl
import torch

RESULTS = Path(__file__).resolve().parent / "results" / "cleanrl_scripts.parquet"
NETWORKS = {"ppo": "agent", "dqn": "q_network"}
HUBER = "Huber loss"
CHANGES = {"": ("", ""), HUBER: ("F.mse_loss", "F.smooth_l1_loss")}
"""What is replaced in a script, and by what."""
RUNS = (
    ("CartPole-v1", "ppo", "", 15),
    ("Acrobot-v1", "ppo", "", 15),
    ("CartPole-v1", "dqn", HUBER, 5),
    ("CartPole-v1", "dqn", "", 15),
)
"""Task, script, change and seeds."""
STEPS, WINDOWS, EPISODES = 100_000, 20, 100


def train(clone: Path, env: str, algo: str, change: str, seed: int) -> dict:
    """Run a script to its end; what its episodes returned, and what its network returns."""
    text = (clone / "cleanrl" / f"{algo}.py").read_text()
    old, new = CHANGES[change]
    if old not in text:
        raise ValueError(f"{algo}.py must have {old!r} for {change}, got a script without")
    script = Path(f"{algo}.py")
    script.write_text(text.replace(old, new) if change else text)
    sys.argv = [script.name, f"--seed={seed}", f"--env-id={env}", f"--total-timesteps={STEPS}"]
    said, begun = io.StringIO(), time.perf_counter()
    with redirect_stdout(said):
        names = runpy.run_path(str(script), run_name="__main__")
    wall = time.perf_counter() - begun
    episodes = re.findall(r"global_step=(\d+), episodic_return=\[?([-\d.]+)", said.getvalue())
    steps, returns = np.array(episodes, dtype=float).T
    window = np.minimum(steps * WINDOWS / STEPS, WINDOWS - 1).astype(int)
    network = names[NETWORKS[algo]]
    return {
        "algo": algo,
        "change": change,
        "env": env,
        "seed": seed,
        "curve": [returns[window == each].mean() for each in range(WINDOWS)],
        "return_final": play(network, env, algo, seed, greedy=True),
        "return_final_sampled": play(network, env, algo, seed, greedy=False),
        "train_steps": STEPS,
        "wall_s": wall,
    }


@torch.no_grad()
def play(network: torch.nn.Module, env: str, algo: str, seed: int, *, greedy: bool) -> float:
    """Mean return of fresh episodes; values are sampled by their softmax."""
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(env)] * EPISODES)
    logits = network.actor if algo == "ppo" else network
    obs, _ = envs.reset(seed=10_000 * (seed + 1))
    total, alive = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while alive.any():
        scores = logits(torch.as_tensor(obs, dtype=torch.float32))
        sampled = torch.distributions.Categorical(logits=scores).sample()
        obs, reward, terminated, truncated, _ = envs.step(
            (scores.argmax(1) if greedy else sampled).numpy()
        )
        total += reward * alive
        alive &= ~(terminated | truncated)
    envs.close()
    return float(total.mean())


def main(clone: Path) -> None:
    sys.path.insert(0, str(clone))
    asked = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "gymnasium", "numpy"))
    table = pl.read_parquet(RESULTS) if RESULTS.exists() else None
    for env, algo, change, seeds in RUNS:
        for seed in range(1, seeds + 1):
            which = {"env": env, "algo": algo, "change": change, "seed": seed}
            if table is not None and len(table.filter(**which)):
                continue
            row = train(clone, env, algo, change, seed) | {"cleanrl": commit, "versions": used}
            print(env, algo, change, seed, row["return_final"], row["wall_s"], flush=True)
            new = pl.DataFrame([row])
            table = new if table is None else pl.concat([table, new])
            table.write_parquet(RESULTS)


if __name__ == "__main__":
    clone = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as place:  # the scripts write their logs where they run
        os.chdir(place)
        main(clone)
