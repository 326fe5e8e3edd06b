"""Whole training steps of a policy, as a program's loop runs them: `sparse-tickets bench`.

A step is zero_grad, forward, loss, backward, clipping by the global norm and Adam. Nothing pauses,
and torch's own operations run in between.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparse_tickets import optim
from sparse_tickets.bench.machine import check_machine, name_machine
from sparse_tickets.ceilings import Neighbours
from sparse_tickets.convert import SparsifyWarning, sparsify_
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import (
    Budget,
    Contender,
    Spread,
    Unverified,
    device_clock,
    interleave,
    mismatch,
    paired,
    pinned_threads,
    verify,
)

__all__ = [
    "ACTIVATIONS",
    "MAX_NORM",
    "Problem",
    "StepBench",
    "StepLine",
    "bench_steps",
    "build_policy",
    "pruned_copy",
    "step_by_torch",
    "step_by_us",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
MAX_NORM = 0.5
"""Global norm by which a step clips its gradients."""

_DENSE, _BY_TORCH, _BY_US = "dense", "torch's Adam", "our Adam"


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


@dataclass(frozen=True)
class StepLine:
    """One sparsity.

    Attributes:
        sparsity: percent pruned.
        dense: seconds of a step of the dense policy, by torch's fused Adam.
        by_torch: of the pruned one by the same Adam.
        by_us: of the pruned one by `sparse_tickets.optim.Adam`, which also clips.
        gain_by_torch: `dense` over `by_torch`, paired within rounds.
        gain_by_us: `dense` over `by_us`, likewise.
    """

    sparsity: float
    dense: Spread
    by_torch: Spread
    by_us: Spread
    gain_by_torch: Spread
    gain_by_us: Spread


@dataclass(frozen=True)
class StepBench:
    """What `bench_steps` found.

    Attributes:
        lines: for every sparsity, ascending.
        busy: share of the cores that other processes used meanwhile.
        what: the policy and the machine, in words.
    """

    lines: tuple[StepLine, ...]
    busy: float
    what: str


def build_policy(problem: Problem, device: str = "cpu") -> nn.Sequential:
    """A dense float32 policy, by torch's own initialisation."""
    layers: list[nn.Module] = []
    for inp, out in zip(problem.sizes, problem.sizes[1:], strict=False):
        layers += [
            nn.Linear(inp, out, dtype=torch.float32, device=device),
            ACTIVATIONS[problem.activation](),
        ]
    return nn.Sequential(*layers[:-1])


def _training_step(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    observation: Tensor,
    target: Tensor,
    *,
    clip: bool,
) -> Callable[[], Tensor]:
    """A step that returns its loss, the mean squared error.

    Args:
        policy: whose parameters `optimizer` has.
        optimizer: see `clip`.
        observation: ``[batch, inputs]``.
        target: ``[batch, outputs]``.
        clip: clip gradients by torch's function; False where the optimiser does.
    """
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


def pruned_copy(policy: nn.Sequential, sparsity: float) -> nn.Sequential:
    """A copy pruned by `sparsify_` to ``sparsity`` percent, without its warnings."""
    policy = copy.deepcopy(policy)
    with warnings.catch_warnings():
        # An action of a small policy may be pruned away; a step costs the same.
        warnings.simplefilter("ignore", SparsifyWarning)
        sparsify_(policy, density=1 - sparsity / 100)
    return policy


def step_by_torch(policy: nn.Module, observation: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """A step by torch's fastest Adam."""
    fastest = torch.optim.Adam(policy.parameters(), lr=1e-4, fused=True)
    return _training_step(policy, fastest, observation, target, clip=True)


def step_by_us(policy: nn.Module, observation: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """A step by our Adam, which also clips."""
    fused = optim.Adam(policy.parameters(), lr=1e-4, max_grad_norm=MAX_NORM)
    return _training_step(policy, fused, observation, target, clip=False)


def bench_steps(
    problem: Problem,
    device: str = "cpu",
    *,
    sparsities: Sequence[float],
    threads: int | None = None,
    budget: Budget | None = None,
    on_line: Callable[[StepLine], None] | None = None,
) -> StepBench:
    """Time steps of a policy pruned by `sparsify_` beside those of the dense one.

    Args:
        problem: its batch is at least 1.
        device: ``cpu`` or a CUDA device.
        sparsities: percents pruned, of `sparsify_`'s own distribution.
        threads: for both sides; torch's current number by default.
        budget: how long to time; its pauses are left out.
        on_line: called with each line as it is measured.

    Raises:
        ValueError: fewer than two sizes or one below 1, a batch below 1, an activation that is not
            in `ACTIVATIONS`, no sparsity or one outside [0, 100), a device that is not there, or
            fewer than one thread.
        Unverified: gradients differ from those of the dense float64 policy: nothing is reported.
    """
    if len(problem.sizes) < 2 or min(problem.sizes) < 1:
        raise ValueError(f"sizes must be two or more, each at least 1, got {problem.sizes}")
    if problem.batch < 1:
        raise ValueError(f"batch must be at least 1, got {problem.batch}")
    if problem.activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {allowed}, got {problem.activation!r}")
    if not sparsities or not all(0 <= sparsity < 100 for sparsity in sparsities):
        raise ValueError(f"sparsities must be some in [0, 100), got {tuple(sparsities)}")
    check_machine(device, threads)
    budget, neighbours = replace(budget or Budget(), settle_seconds=0.0), Neighbours()
    lines = []
    with pinned_threads(torch.get_num_threads() if threads is None else threads):
        where = name_machine(device)
        for sparsity in sorted(set(sparsities)):
            lines.append(_measure(problem, sparsity, device, budget))
            if on_line is not None:
                on_line(lines[-1])
    return StepBench(tuple(lines), neighbours.share(), f"{problem.label}, float32, {where}")


def _measure(problem: Problem, sparsity: float, device: str, budget: Budget) -> StepLine:
    pair = _Pair(problem, sparsity, device)
    errors: dict[str, float] = {}
    dense, *ours = contenders = [pair.contender(name) for name in (_DENSE, _BY_TORCH, _BY_US)]
    for contender in contenders:
        verify(contender, errors)
    timings = interleave(contenders, budget, device_clock(device))
    wall = {name: timing.wall for name, timing in timings.items()}
    times = [Spread.of(wall[contender.name]) for contender in contenders]
    gains = [paired(contender, [dense], wall)[_DENSE] for contender in ours]
    return StepLine(sparsity, *times, *gains)


class _Pair:
    """A policy dense and pruned, what it is shown, and its gradients in float64."""

    def __init__(self, problem: Problem, sparsity: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        self.dense = build_policy(problem, device)
        self.sparse = pruned_copy(self.dense, sparsity)
        self.observation = draw(problem.batch, problem.sizes[0]).to(device)
        self.target = draw(problem.batch, problem.sizes[-1]).to(device)
        self.terms = problem.batch * max(problem.sizes) * len(problem.sizes)

    def contender(self, name: str) -> Contender:
        """The dense policy, or the pruned one by one of two optimisers."""
        policy = copy.deepcopy(self.dense if name == _DENSE else self.sparse)
        take = step_by_us if name == _BY_US else step_by_torch
        step = take(policy, self.observation, self.target)
        return Contender(name, step, partial(self._error, policy))

    def _error(self, policy: nn.Sequential) -> float:
        exact = copy.deepcopy(self.dense).double()
        with torch.no_grad():
            for there, here in zip(exact.parameters(), policy.parameters(), strict=True):
                there.copy_(here)
        (exact(self.observation.double()) - self.target.double()).square().mean().backward()
        policy.zero_grad()
        (policy(self.observation) - self.target).square().mean().backward()
        masks = {layer.weight: layer.mask for layer in policy if isinstance(layer, SparseLinear)}
        found, expected = [], []
        for there, here in zip(exact.parameters(), policy.parameters(), strict=True):
            if there.grad is None or here.grad is None:
                raise Unverified("every parameter must have a gradient, one has none")
            kept = masks.get(here, torch.ones_like(here, dtype=torch.bool))
            expected.append(there.grad.masked_fill(~kept, 0))
            found.append(here.grad)
        return mismatch(found, expected, self.terms)
