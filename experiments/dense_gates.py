"""Do the trainers reach what they must, dense, before anything is pruned?

Trains PPO and behavioural cloning at level 0 by the protocol (five seeds, full budgets) and holds
them to their gates: each seed's return of PPO over 100 fresh episodes, and cloning's share of its
experts' return. Writes ``results/dense_gates.parquet``, ``figures/dense_gates.png`` and its table
in ``README.md``::

    python experiments/dense_gates.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sparse_tickets import load_results, run_sweep
from sparse_tickets.analysis.figures import save
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.files import write_atomic
from sparse_tickets.sweep.data import read_data
from sparse_tickets.sweep.protocols import protocol

HERE = Path(__file__).parent
SEEDS = 5
CLONING_SHARE = 0.95


@dataclass(frozen=True)
class Gate:
    """What every seed of dense PPO must reach: a mean return over 100 episodes."""

    env: str
    ppo: float


GATES = (
    Gate("CartPole-v1", 475.0),
    Gate("Acrobot-v1", -100.0),
    Gate("Pendulum-v1", -250.0),
    Gate("MountainCar-v0", -120.0),
)


def run_gate(gate: Gate) -> tuple[pl.DataFrame, float]:
    """The level-0 rows of both algorithms, and the experts' mean return."""
    out = HERE.parent / "runs" / f"gates-{gate.env}"
    spec = replace(protocol(gate.env), seeds=SEEDS, levels=1)
    spec = replace(spec, bc=replace(spec.bc, expert_gate=gate.ppo))
    store = run_sweep(spec, out)
    experts = read_data(store, "experts")
    if experts is None:
        raise FileNotFoundError(f"{out} has no experts: run again to train them")
    return load_results(out), float(experts["returns"].mean())


def share_reached(student: float, expert: float, random: float) -> float:
    """A student's return as a share of its expert's, both above the random policy's."""
    return (student - random) / (expert - random)


def draw(frames: dict[str, pl.DataFrame], experts: dict[str, float]) -> Figure:
    """Greedy return against training progress, a line per seed, one panel per environment."""
    figure = Figure(figsize=(2.7 * len(frames), 2.9), dpi=200, layout="constrained")
    for panel, (env, frame) in zip(figure.subplots(1, len(frames)), frames.items(), strict=True):
        for algo, colour in (("ppo", "#0072B2"), ("bc", "#D55E00")):
            curves = np.array(frame.filter(pl.col("algo") == algo)["curve"].to_list())
            steps = frame["train_steps"][0] * (1 + np.arange(curves.shape[1])) / curves.shape[1]
            panel.plot(steps / 1000, curves.T, color=colour, linewidth=0.6, alpha=0.4)
            label = {"ppo": "PPO", "bc": "cloning"}[algo]
            panel.plot(steps / 1000, curves.mean(0), color=colour, linewidth=1.8, label=label)
        panel.axhline(experts[env], color="#333333", linewidth=0.8, linestyle=":", label="experts")
        panel.set_title(env, fontsize=9)
        panel.set_xlabel("thousand steps", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("greedy return", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def row(gate: Gate, frame: pl.DataFrame, expert: float) -> tuple[str, ...]:
    """An environment's cells of the table: returns, and whether they pass."""
    ppo, bc = (frame.filter(algo=algo)["return_final"].to_numpy() for algo in ("ppo", "bc"))
    share = share_reached(bc.mean(), expert, frame["random_return"][0])
    passed = ppo.min() >= gate.ppo and share >= CLONING_SHARE
    returns = (f"{value:.1f}" for value in (ppo.mean(), ppo.min()))
    others = f"{expert:.1f}", f"{bc.mean():.1f}", f"{share:.1%}"
    return (gate.env, *returns, f"{gate.ppo:g}", *others, "passed" if passed else "FAILED")


def with_table(text: str, rows: list[tuple[str, ...]], cells: pl.DataFrame) -> str:
    """The README with these rows, and what trained them, between the marks."""
    names = ("environment", "PPO", "worst seed", "gate", "its experts", "cloning")
    header = (*names, "share of the experts' return", "")
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commits, machines = (
        ", ".join(cells[name].unique().sort().to_list()) for name in ("commit", "processor")
    )
    origin = f"Trained by commit {commits} on {machines}."
    begin, end = (f"<!-- dense_gates:{side} -->" for side in ("begin", "end"))
    if not re.search(f"{begin}.*{end}", text, re.DOTALL):
        raise ValueError(f"the README must hold {begin} and {end}, got neither or one")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{table}\n\n{origin}\n{end}{after}"


def main() -> None:
    frames, experts, rows = {}, {}, []
    for gate in GATES:
        frames[gate.env], experts[gate.env] = run_gate(gate)
        rows.append(row(gate, frames[gate.env], experts[gate.env]))
        print(*rows[-1], sep="  ", flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "figures").mkdir(exist_ok=True)
    cells = pl.concat(frames.values())
    write_parquet(HERE / "results" / "dense_gates.parquet", cells)
    save(draw(frames, experts), HERE / "figures" / "dense_gates.png")
    readme = HERE / "README.md"
    write_atomic(readme, with_table(readme.read_text(encoding="utf-8"), rows, cells).encode())


if __name__ == "__main__":
    main()
