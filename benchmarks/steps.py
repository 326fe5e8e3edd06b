"""Whole training steps in plain loops, as programs run them: ``python -m benchmarks steps``.

A step is zero_grad, forward, loss, backward, clipping by the global norm and Adam; nothing pauses,
nothing is repeated warm, and torch's own operations run in between. Policies take turns, a stretch
of steps each, so that all see the same machine. A policy is timed only if its losses over the first
steps are those of dense weights times the mask from the same start.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_tickets import optim, sparsify_
from sparse_tickets.convert import SparsifyWarning
from sparse_tickets.files import write_atomic
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import pinned_threads

from .results import RESULTS, provenance

__all__ = ["run_steps", "table"]

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
CHECKED_STEPS = 5
MAX_NORM = 0.5


@dataclass(frozen=True)
class Problem:
    """A policy and the batch it is trained on; batch 0 is acting on one row without gradients."""

    sizes: tuple[int, ...]
    activation: str
    batch: int

    @property
    def label(self) -> str:
        shape = "-".join(map(str, self.sizes))
        return f"{shape} {self.activation}, {f'batch {self.batch}' if self.batch else 'acting'}"


PROBLEMS = (
    Problem((4, 64, 64, 2), "tanh", 64),
    Problem((17, 64, 64, 6), "tanh", 64),
    Problem((17, 256, 256, 6), "relu", 64),
    Problem((17, 256, 256, 6), "relu", 256),
    Problem((17, 256, 256, 6), "relu", 2048),
    Problem((17, 64, 64, 6), "tanh", 0),
    Problem((17, 256, 256, 6), "relu", 0),
)

Step = Callable[[], Tensor]


class _Masked(nn.Module):
    """``weight * mask``, recomputed at every use."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _policy(problem: Problem) -> nn.Sequential:
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[problem.activation]
    layers: list[nn.Module] = []
    for inp, out in zip(problem.sizes, problem.sizes[1:], strict=False):
        layers += [nn.Linear(inp, out), activation()]
    return nn.Sequential(*layers[:-1])


def _contenders(problem: Problem, sparsity: float, compiled: bool) -> dict[str, Step]:
    """By name, the steps of equal policies; ``w * mask`` is the reference for all but ``dense``."""
    torch.manual_seed(0)
    dense = _policy(problem)
    sparse = copy.deepcopy(dense)
    with warnings.catch_warnings():
        # At 99% an action of a small policy may be pruned away; a step costs the same.
        warnings.simplefilter("ignore", SparsifyWarning)
        sparsify_(sparse, density=1 - sparsity)
    masked = copy.deepcopy(dense)
    for layer, twin in zip(masked, sparse, strict=True):
        if isinstance(twin, SparseLinear):
            parametrize.register_parametrization(layer, "weight", _Masked(twin.mask))
    observation = torch.randn(problem.batch or 1, problem.sizes[0])
    target = torch.randn(problem.batch or 1, problem.sizes[-1])
    policies = {"dense": dense, "w * mask": masked, "ours, torch's Adam": sparse}
    if compiled:
        policies["dense, compiled"] = torch.compile(copy.deepcopy(dense))
    if not problem.batch:
        policies["ours"] = policies.pop("ours, torch's Adam")
        return {name: _act(policy, observation) for name, policy in policies.items()}
    own = copy.deepcopy(sparse)
    steps = {name: _train(policy, observation, target) for name, policy in policies.items()}
    fused = optim.Adam(own.parameters(), lr=1e-4, max_grad_norm=MAX_NORM)
    steps["ours, our Adam"] = _step(own, fused, observation, target, clip=False)
    return steps


def _act(policy: nn.Module, observation: Tensor) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return policy(observation)

    return step


def _train(policy: nn.Module, observation: Tensor, target: Tensor) -> Step:
    fastest = torch.optim.Adam(policy.parameters(), lr=1e-4, fused=True)
    return _step(policy, fastest, observation, target, clip=True)


def _step(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    observation: Tensor,
    target: Tensor,
    clip: bool,
) -> Step:
    parameters = list(policy.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = (policy(observation) - target).square().mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.detach()

    return step


def _check(label: str, steps: dict[str, Step]) -> None:
    """Run the first steps of all, which also compiles what compiles.

    Raises:
        RuntimeError: a policy does not do what dense weights times the mask do.
    """
    found = {
        name: torch.stack([step() for _ in range(CHECKED_STEPS)]) for name, step in steps.items()
    }
    for name, values in found.items():
        reference = found["dense" if name.startswith("dense") else "w * mask"]
        if not torch.allclose(values, reference, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{label}: {name} gives {values}, the reference {reference}")


def _time(steps: dict[str, Step], rounds: int, stretch_s: float) -> dict[str, list[float]]:
    """Seconds per step of each, one number a round."""
    counts = {}
    for name, step in steps.items():
        begin = time.perf_counter()
        for _ in range(20):
            step()
        counts[name] = max(1, int(stretch_s * 20 / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                step()
            times[name].append((time.perf_counter() - begin) / counts[name])
    return times


def run_steps(
    console: Console,
    rounds: int = 7,
    stretch_s: float = 0.1,
    compiled: bool = True,
    only: str = "",
    out: Path | None = None,
) -> Path:
    """Time every problem at every sparsity with one thread and with two; write JSON and a table.

    Args:
        console: where progress and the table go.
        rounds: turns of every policy.
        stretch_s: seconds of a turn.
        compiled: time `torch.compile` too; needs a C++ compiler.
        only: problems whose label contains this.
        out: default: results/steps/<device>-<date>.json, with the table beside it.

    Returns:
        The file written.

    Raises:
        ValueError: no problem has such a label.
    """
    chosen = [problem for problem in PROBLEMS if only in problem.label]
    if not chosen:
        raise ValueError(f"only must be part of one of {[p.label for p in PROBLEMS]}, got {only!r}")
    run = provenance("steps", "cpu", None, rounds)
    records = []
    for problem in chosen:
        for sparsity in SPARSITIES:
            for threads in (1, 2):
                with pinned_threads(threads):
                    torch.compiler.reset()
                    steps = _contenders(problem, sparsity, compiled)
                    _check(problem.label, steps)
                    times = _time(steps, rounds, stretch_s)
                records.append(
                    {"problem": asdict(problem), "label": problem.label, "sparsity": sparsity}
                    | {"threads": threads, "seconds": times}
                )
        console.print(f"{problem.label}: done", highlight=False)
    header = {
        k: v for k, v in asdict(run).items() if k not in ("records", "refused", "counts", "parts")
    }
    path = out or RESULTS / "steps" / f"{run.device}-{run.date[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"run": header, "records": records}, indent=1) + "\n"
    write_atomic(path, data.encode())
    text = table(records)
    write_atomic(path.with_suffix(".md"), text.encode())
    console.print(text, highlight=False, soft_wrap=True)
    return path


def table(records: list[dict]) -> str:
    """Ratios as Markdown: the fastest peer's time over ours, each at its better thread count."""
    share = " | ".join(f"{sparsity:.0%}" for sparsity in SPARSITIES)
    lines = [
        f"| a whole step, weights pruned | ours | {share} |",
        "| --- | --- |" + " ---: |" * len(SPARSITIES),
    ]
    for label in dict.fromkeys(record["label"] for record in records):
        here = [record for record in records if record["label"] == label]
        for name in [n for n in here[0]["seconds"] if n.startswith("ours")]:
            cells = [_ratio([r for r in here if r["sparsity"] == s], name) for s in SPARSITIES]
            lines.append(
                f"| {label} | {name.removeprefix('ours').strip(', ')} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def _ratio(records: list[dict], ours: str) -> str:
    best: dict[str, float] = {}
    for record in records:
        for name, seconds in record["seconds"].items():
            best[name] = min(best.get(name, float("inf")), statistics.median(seconds))
    peer = min(value for name, value in best.items() if not name.startswith("ours"))
    return f"{peer / best[ours]:.2f}x"
