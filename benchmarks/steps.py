"""Whole training steps in plain loops, as programs run them: ``python -m benchmarks steps``.

A step is zero_grad, forward, loss, backward, clipping by the global norm and Adam; nothing pauses,
nothing is repeated warm, and torch's own operations run in between. Policies take turns, a stretch
of steps each, so that all see the same machine; `torch.compile` and SparseLab live in processes of
their own. A policy is timed only if its losses over the first steps are those of dense weights
times the mask from the same start. What is torch's in a step with torch's Adam is timed too: no
policy, however fast, takes less.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_tickets.bench.steps import (
    MAX_NORM,
    Problem,
    build_policy,
    pruned_copy,
    step_by_torch,
    step_by_us,
)
from sparse_tickets.files import write_atomic
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import pinned_threads

from .apart import Apart, Step, Turn, take
from .peers import sparselab
from .results import RESULTS, choose, provenance, versions_in_words
from .tables import grid

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
CHECKED_STEPS = 5
DENSE, COMPILED = "dense", "dense, compiled"
TORCH_PARTS, LEFT = "torch's own parts alone", "the most with torch's Adam"
"""What of a step is left to torch where forward, backward and hook take no time."""


_BY_TORCH, _BY_US = "ours, torch's Adam", "ours, our Adam"
_WHAT_IS_LEFT = """\
With torch's Adam a step keeps what is torch's: zero_grad, the loss and its gradient, clipping by
the norm and Adam itself, on gradients of the dense shapes. Timed with an output and gradients that
cost nothing, so with no forward pass, no backward pass and no hook, these parts are what no policy
can be faster than: the fastest peer's time over theirs is the most to gain.
"""


PROBLEMS = (
    Problem((4, 64, 64, 2), "tanh", 64),
    Problem((17, 64, 64, 6), "tanh", 64),
    Problem((17, 256, 256, 6), "relu", 64),
    Problem((17, 256, 256, 6), "relu", 256),
    Problem((17, 256, 256, 6), "relu", 2048),
    Problem((17, 64, 64, 6), "tanh", 0),
    Problem((17, 256, 256, 6), "relu", 0),
)


class _Masked(nn.Module):
    """``weight * mask``, recomputed at every use."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _Start:
    """What all policies of a problem start from, and what they are shown."""

    def __init__(self, problem: Problem, sparsity: float = 0.0) -> None:
        torch.manual_seed(0)
        self.dense = build_policy(problem)
        self.observation = torch.randn(problem.batch or 1, problem.sizes[0])
        self.target = torch.randn(problem.batch or 1, problem.sizes[-1])
        self.trains = problem.batch > 0
        self.sparse = pruned_copy(self.dense, 100 * sparsity)

    def step(self, policy: nn.Module) -> Step:
        """A step of a policy: acting, or training with torch's fastest Adam."""
        if not self.trains:
            return _act(policy, self.observation)
        return step_by_torch(policy, self.observation, self.target)

    def own_step(self) -> Step:
        """A step of a sparse policy with our Adam."""
        return step_by_us(copy.deepcopy(self.sparse), self.observation, self.target)

    def torch_parts(self) -> Step:
        """What is torch's in `step`: an output and gradients that cost nothing, in dense shapes."""
        parameters = list(copy.deepcopy(self.dense).parameters())
        gradients = [1e-3 * torch.randn_like(parameter) for parameter in parameters]
        output = torch.randn_like(self.target).requires_grad_()
        fastest = torch.optim.Adam(parameters, lr=1e-4, fused=True)

        def step() -> Tensor:
            fastest.zero_grad()
            output.grad = None
            loss = (output - self.target).square().mean()
            loss.backward()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            fastest.step()
            return loss.detach()

        return step

    def masked(self) -> nn.Module:
        policy = copy.deepcopy(self.dense)
        for layer, twin in zip(policy, self.sparse, strict=True):
            if isinstance(twin, SparseLinear):
                parametrize.register_parametrization(layer, "weight", _Masked(twin.mask))
        return policy


def compiled_step(problem: Problem, sparsity: float) -> Step:
    """Of the dense policy, under `torch.compile`."""
    start = _Start(problem)
    return start.step(torch.compile(start.dense))


def sparselab_step(problem: Problem, sparsity: float) -> Step:
    """Of a policy of SparseLab's layers with our masks."""
    start = _Start(problem, sparsity)
    layers = zip(start.dense, start.sparse, strict=True)
    policy = nn.Sequential(
        *(
            sparselab.layer(layer, twin.mask) if isinstance(twin, SparseLinear) else layer
            for layer, twin in layers
        )
    )
    sparselab.follow_torch()
    return start.step(policy)


def _contenders(
    problem: Problem, threads: int, apart: dict[str, Apart]
) -> dict[tuple[str, float], Turn]:
    """By name and sparsity, the turns of policies that start alike; dense ones are pruned by 0."""
    dense = _Start(problem)
    turns = {(DENSE, 0.0): take(dense.step(dense.dense))}
    if COMPILED in apart:
        turns[COMPILED, 0.0] = apart[COMPILED].turn(problem, 0.0, threads)
    for sparsity in SPARSITIES:
        start = _Start(problem, sparsity)
        turns["w * mask", sparsity] = take(start.step(start.masked()))
        turns["ours" if not problem.batch else _BY_TORCH, sparsity] = take(start.step(start.sparse))
        if problem.batch:
            turns[_BY_US, sparsity] = take(start.own_step())
        if sparselab.NAME in apart:
            turns[sparselab.NAME, sparsity] = apart[sparselab.NAME].turn(problem, sparsity, threads)
    return turns


def _act(policy: nn.Module, observation: Tensor) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return policy(observation)

    return step


def _check(label: str, turns: dict[tuple[str, float], Turn]) -> None:
    """Take the first steps of all, which also compiles what compiles.

    Raises:
        RuntimeError: a policy does not do what dense weights times the mask do.
    """
    found = {
        key: torch.stack([turn(1)[1] for _ in range(CHECKED_STEPS)]) for key, turn in turns.items()
    }
    for (name, sparsity), values in found.items():
        reference = found["w * mask", sparsity]
        if not torch.allclose(values, reference, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{label}: {name} gives {values}, the reference {reference}")


def _time(
    turns: dict[tuple[str, float], Turn], rounds: int, stretch_s: float
) -> dict[tuple[str, float], list[float]]:
    """Seconds per step of each, one number a round."""
    counts = {key: max(1, int(stretch_s * 20 / turn(20)[0])) for key, turn in turns.items()}
    times: dict[tuple[str, float], list[float]] = {key: [] for key in turns}
    for _ in range(rounds):
        for key, turn in turns.items():
            times[key].append(turn(counts[key])[0] / counts[key])
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

    A file of the same commit keeps its other problems, so that a run can be made in parts.

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
    chosen = choose(PROBLEMS, only)
    run = provenance("steps", "cpu", None, rounds)
    path = out or RESULTS / "steps" / f"{run.device}-{run.date[:10]}.json"
    records = _others(path, run.commit, chosen)
    apart = {COMPILED: Apart(compiled_step)} if compiled else {}
    if find_spec("sparselab") and find_spec("threadpoolctl"):
        apart[sparselab.NAME] = Apart(sparselab_step)
    try:
        for problem in chosen:
            for threads in (1, 2):
                with pinned_threads(threads):
                    turns = _contenders(problem, threads, apart)
                    _check(problem.label, turns)
                    if problem.batch:
                        # It has no policy whose losses could be checked.
                        turns[TORCH_PARTS, 0.0] = take(_Start(problem).torch_parts())
                    times = _time(turns, rounds, stretch_s)
                for sparsity in SPARSITIES:
                    # What is dense is so at any sparsity.
                    seconds = {
                        name: values
                        for (name, level), values in times.items()
                        if level == sparsity or name in (DENSE, COMPILED, TORCH_PARTS)
                    }
                    records.append(
                        {"problem": asdict(problem), "label": problem.label, "sparsity": sparsity}
                        | {"threads": threads, "seconds": seconds}
                    )
            console.print(f"{problem.label}: done", highlight=False)
    finally:
        for peer in apart.values():
            peer.close()
    order = [problem.label for problem in PROBLEMS]
    records.sort(key=lambda record: order.index(record["label"]))
    about = {k: v for k, v in asdict(run).items() if k not in ("records", "refused", "parts")}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"run": about, "records": records}, indent=1) + "\n"
    write_atomic(path, data.encode())
    text = f"{table(records)}\n{times_table(records)}"
    write_atomic(path.with_suffix(".md"), text.encode())
    console.print(text, highlight=False, soft_wrap=True)
    return path


def _others(path: Path, commit: str | None, chosen: list[Problem]) -> list[dict]:
    """Of a file of this commit the records of problems that are not chosen."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    labels = [problem.label for problem in chosen]
    if data["run"]["commit"] != commit:
        return []
    return [record for record in data["records"] if record["label"] not in labels]


def table(records: list[dict]) -> str:
    """Ratios as Markdown: the fastest peer's time over ours, each at its better thread count."""
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        here = [record for record in records if record["label"] == label]
        for name in [n for n in here[0]["seconds"] if not _is_peer(n)]:
            cells = [_ratio([r for r in here if r["sparsity"] == s], name) for s in SPARSITIES]
            whose = LEFT if name == TORCH_PARTS else name.removeprefix("ours").strip(", ")
            rows.append([label, whose, *cells])
    return _grid("a whole step", "ours", rows)


def times_table(records: list[dict]) -> str:
    """Microseconds of a step as Markdown, of each contender at its better thread count."""
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        here = [record for record in records if record["label"] == label]
        best = [_best([r for r in here if r["sparsity"] == s]) for s in SPARSITIES]
        for name in best[0]:
            rows.append([label, name, *(f"{1e6 * found[name]:,.0f}" for found in best)])
    return _grid("microseconds of a step", "of", rows)


def lost(path: Path) -> str:
    """The steps of a file that the fastest peer makes faster, in a sentence."""
    records = json.loads(path.read_text())["records"]
    found, steps = [], 0
    for label, sparsity in dict.fromkeys((r["label"], r["sparsity"]) for r in records):
        best = _best([r for r in records if (r["label"], r["sparsity"]) == (label, sparsity)])
        for name in (name for name in best if name.startswith("ours")):
            steps += 1
            if (gain := _gain(best, name)) < 1:
                what = f"{label} at {sparsity:.0%}, {name.removeprefix('ours').strip(', ')}"
                found.append(f"{what} ({gain:.2f}x)")
    if not found:
        return f"Of the {steps} kinds of steps above none was slower than the fastest peer's."
    return f"Of the {steps} kinds of steps above {len(found)} were slower: {'; '.join(found)}."


def left(path: Path) -> str:
    """What torch's own optimiser leaves to gain, as Markdown; nothing where it was not measured."""
    records = json.loads(path.read_text())["records"]
    rows = []
    for label in dict.fromkeys(r["label"] for r in records if TORCH_PARTS in r["seconds"]):
        cells = []
        for sparsity in (0.0, 0.9, 0.99):
            here = [r for r in records if (r["label"], r["sparsity"]) == (label, sparsity)]
            best = _best(here)
            cells.append(f"{1e6 * (best[_BY_TORCH] - best[TORCH_PARTS]):,.0f}")
        peer = min(seconds for name, seconds in best.items() if _is_peer(name))
        times = [f"{1e6 * seconds:,.0f}" for seconds in (peer, best[TORCH_PARTS])]
        rows.append([label, *times, f"{_gain(best, TORCH_PARTS):.2f}x", *cells])
    if not rows:
        return ""
    heads = ["microseconds of a step", "fastest peer", TORCH_PARTS, "the most to gain"]
    table = grid([*heads, "ours above them, 0% pruned", "90%", "99%"], rows)
    return f"{_WHAT_IS_LEFT}\n{table}\n"


def _grid(what: str, whose: str, rows: list[list[str]]) -> str:
    heads = [f"{what}, weights pruned", whose, *(f"{sparsity:.0%}" for sparsity in SPARSITIES)]
    return grid(heads, rows, text=2) + "\n"


def measured(path: Path) -> str:
    """The ratios of a file, and where they come from."""
    data = json.loads(path.read_text())
    run, records = data["run"], data["records"]
    peers = [name for name in records[0]["seconds"] if _is_peer(name)]
    versions = versions_in_words(run["versions"])
    return (
        f"{table(records)}\nMeasured on {run['hardware']}; {versions}; commit {run['commit']}; "
        f"{run['date'][:10]}. Peers: {'; '.join(peers)}; each with one thread or two, whichever is "
        f"faster. Times: [{path.stem}](benchmarks/results/steps/{path.stem}.md)."
    )


def _ratio(records: list[dict], ours: str) -> str:
    return f"{_gain(_best(records), ours):.2f}x"


def _gain(best: dict[str, float], ours: str) -> float:
    """The fastest peer's time over one of ours."""
    return min(value for name, value in best.items() if _is_peer(name)) / best[ours]


def _is_peer(name: str) -> bool:
    return not name.startswith("ours") and name != TORCH_PARTS


def _best(records: list[dict]) -> dict[str, float]:
    """Median seconds of each contender at its better thread count."""
    best: dict[str, float] = {}
    for record in records:
        for name, seconds in record["seconds"].items():
            best[name] = min(best.get(name, float("inf")), statistics.median(seconds))
    return best
