"""Which configurations are measured, by suite: see `SUITES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sparse_tickets.algos.ppo import PPO

from . import ours
from .costs import linear_cost, policy_cost
from .level_job import LevelJob, level_contender, sparsity_of
from .measure import Case, Contest
from .peers import (
    jax_ppo,
    loop_dense,
    masked_bmm,
    sb3,
    scipy_csr,
    sparseprop,
    torch_bsr,
    torch_compile,
    torch_csr,
    torch_dense,
    torch_func,
    torch_semi_structured,
)
from .ppo_job import PPOJob, ppo_contender
from .problems import SPARSITIES, LinearProblem, PolicyProblem
from .results import available_cores

__all__ = ["FUSED_DENSE", "SUITES", "TORCH_LEVEL", "is_ours", "suite"]

FUSED_DENSE = "sparse_tickets, run dense"
"""Our own fused kernels told that nothing is pruned: what sparsity alone gains is over this."""
TORCH_LEVEL = "torch, all tickets at once"
"""The reference backend: the same population as plain batched torch, dense weights times masks."""

_ALL_FUSED = "population, fused, dense"
_ALL_SPARSE = "population, fused, sparse"

_TARGETS = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
_ACTOR_SPARSITIES = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0)
_SYSTEMS = (0.0, 90.0)
_LEVELS = (1, 10, 20)
_DENSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)


def is_ours(name: str) -> bool:
    """Whether a contender runs our kernels; the reference backend is plain torch, and does not."""
    return name.startswith(ours.OURS) or name in (_ALL_FUSED, _ALL_SPARSE)


def linear_forward(
    sparsity: float,
    *,
    inp: int,
    out: int,
    batch: int,
    tickets: int = 1,
    device: str = "cpu",
    block: int = 1,
    two_four: bool = False,
    threads: int | None = None,
) -> Case:
    """`kernels.linear.linear` against every dense and sparse product torch and SciPy have."""

    def build() -> Contest:
        problem = LinearProblem(
            tickets, batch, inp, out, sparsity, device=device, block=block, two_four=two_four
        )
        contest = Contest(ours.linear_forward(problem))
        for peer in (torch_dense, masked_bmm, torch_csr, torch_bsr, scipy_csr, sparseprop):
            contest.invite(peer.NAME, partial(peer.linear_forward, problem))
        if two_four:
            semi = torch_semi_structured
            contest.invite(semi.NAME, partial(semi.linear_forward, problem))
        contest.cost = linear_cost(problem, contest.subject.plan, training=False)
        return contest

    op = "linear forward, 2:4 mask" if two_four else "linear forward"
    shape = _layer_shape(tickets, batch, inp, out, block, threads)
    return Case(op, shape, sparsity, build, cold=True, threads=threads)


def linear_backward(
    sparsity: float,
    *,
    inp: int,
    out: int,
    batch: int,
    tickets: int = 1,
    device: str = "cpu",
    block: int = 1,
    threads: int | None = None,
) -> Case:
    """The same with gradients for x, weight and bias."""

    def build() -> Contest:
        problem = LinearProblem(tickets, batch, inp, out, sparsity, device=device, block=block)
        contest = Contest(ours.linear_backward(problem))
        for peer in (torch_dense, masked_bmm, torch_csr, torch_bsr, sparseprop):
            contest.invite(peer.NAME, partial(peer.linear_backward, problem))
        contest.skipped[scipy_csr.NAME] = "SciPy has no product sampled at a mask, which dW is"
        contest.cost = linear_cost(problem, contest.subject.plan, training=True)
        return contest

    shape = _layer_shape(tickets, batch, inp, out, block, threads)
    return Case("linear forward+backward", shape, sparsity, build, cold=True, threads=threads)


def _layer_shape(
    tickets: int, batch: int, inp: int, out: int, block: int, threads: int | None
) -> dict[str, int]:
    shape = {"P": tickets, "B": batch, "I": inp, "O": out}
    return shape | ({"block": block} if block > 1 else {}) | _with(threads)


def _with(threads: int | None) -> dict[str, int]:
    return {} if threads is None else {"threads": threads}


def layer_inside(
    sparsity: float, *, width: int = 256, batch: int = 2048, tickets: int = 2, device: str = "cpu"
) -> Case:
    """What one more layer costs within `kernels.mlp.mlp`, relu included, forward.

    Two tickets, since `mlp` gives a ticket to a thread. Seven layers less three, per layer.
    """

    def build() -> Contest:
        deep, shallow = (
            PolicyProblem(tickets, batch, (width,) * (depth + 1), sparsity, "relu", device)
            for depth in (7, 3)
        )
        contest = Contest(ours.layer_inside(deep, shallow))
        contest.peers.append(torch_dense.layer_inside(deep, shallow))
        return contest

    shape = {"P": tickets, "B": batch, "width": width}
    return Case("layer inside a policy, forward", shape, sparsity, build, unit="layer")


def policy(
    sparsity: float,
    *,
    tickets: int = 60,
    batch: int = 128,
    width: int = 64,
    device: str = "cpu",
    loop: bool = True,
    compiled: bool = False,
    threads: int | None = None,
) -> Case:
    """`kernels.mlp.mlp` forward and backward against batched torch, and against itself dense."""
    sizes = (4, width, width, 2)

    def build() -> Contest:
        problem = PolicyProblem(tickets, batch, sizes, sparsity, device=device)
        contest = Contest(ours.policy(problem))
        contest.peers.append(ours.policy(problem, density=1.0, name=FUSED_DENSE))
        for peer in (masked_bmm, torch_dense, torch_func):
            contest.invite(peer.NAME, partial(peer.policy, problem))
        if loop:
            contest.invite(loop_dense.NAME, lambda: loop_dense.policy(problem))
        if compiled:
            contest.invite(torch_compile.NAME, lambda: torch_compile.policy(problem))
        else:
            contest.skipped[torch_compile.NAME] = "tens of seconds of compilation: suite full only"
        contest.cost = policy_cost(problem, contest.subject.plan)
        return contest

    shape = {"P": tickets, "B": batch, "width": width} | _with(threads)
    # A compiled case has peers of its own: its label must differ.
    op = "policy forward+backward" + (", compiled too" if compiled else "")
    return Case(op, shape, sparsity, build, threads=threads)


def ppo_iteration(
    sparsity: float,
    *,
    tickets: int = 60,
    device: str = "cpu",
    systems: bool = False,
    threads: int | None = None,
    level: int | None = None,
) -> Case:
    """A whole PPO iteration on CartPole, the actor pruned, against the same code run dense.

    ``systems`` adds other people's: JAX and Stable-Baselines3; ``level`` names the sparsity.
    """

    def build() -> Contest:
        job = PPOJob(tickets, sparsity, device=device)
        contest = Contest(ppo_contender(job, ours.OURS))
        if sparsity:
            dense = PPOJob(tickets, sparsity, device=device, nominal=1.0)
            contest.peers.append(ppo_contender(dense, FUSED_DENSE))
        if systems:
            contest.invite(jax_ppo.NAME, lambda: jax_ppo.ppo(job))
            contest.invite(sb3.NAME, lambda: sb3.ppo(job.settings, job.env_name))
        return contest

    shape = {"P": tickets, "envs": PPO.copies, "steps": PPO.horizon} | _with(threads)
    op = "PPO iteration"
    if level is not None:
        op, shape = "PPO iteration, level by level", shape | {"level": level}
    return Case(op, shape, sparsity, build, unit="agent-step", threads=threads)


def level(level: int, *, tickets: int = 60, iterations: int = 4, device: str = "cpu") -> Case:
    """A whole level: prune, rewind, train some iterations, evaluate; all tickets at once."""

    def build() -> Contest:
        def job(**options: Any) -> LevelJob:
            return LevelJob(tickets, level, iterations=iterations, device=device, **options)

        contest = Contest(level_contender(job()))
        contest.peers.append(level_contender(job(nominal=1.0), FUSED_DENSE))
        contest.peers.append(level_contender(job(backend="reference"), TORCH_LEVEL))
        return contest

    shape = {"P": tickets, "iterations": iterations}
    name = "whole level: prune + rewind + train"
    return Case(name, shape, sparsity_of(level), build)


def told_apart(*, tickets: int = 60, sparsity: float = 90.0, device: str = "cpu") -> Case:
    """Batching, fusion and sparsity, one after the other, on the same job."""
    stages = (
        ("loop of dense policies", PPOJob, {"tickets": 1, "backend": "reference"}),
        ("population, dense", PPOJob, {"tickets": tickets, "backend": "reference"}),
        (_ALL_FUSED, PPOJob, {"tickets": tickets}),
    )

    def build() -> Contest:
        job = PPOJob(tickets, sparsity, device=device)
        contest = Contest(ppo_contender(job, _ALL_SPARSE))
        for name, make, options in stages:
            contest.peers.append(ppo_contender(make(device=device, **options), name))
        return contest

    shape = {"P": tickets, "envs": PPO.copies, "steps": PPO.horizon}
    return Case("whole job, gains told apart", shape, sparsity, build, unit="agent-step")


def quick(device: str = "cpu") -> list[Case]:
    """The table of targets."""
    at_256: dict[str, Any] = {"inp": 256, "out": 256, "device": device}
    cases = [linear_forward(s, batch=2048, **at_256) for s in _TARGETS]
    cases += [layer_inside(s, device=device) for s in _TARGETS]
    cases += [linear_backward(s, batch=2048, **at_256) for s in _TARGETS]
    cases += [linear_forward(s, batch=1, **at_256) for s in _TARGETS]
    cases += [policy(s, device=device) for s in _TARGETS]
    cases += [ppo_iteration(s, device=device, systems=s in _SYSTEMS) for s in _ACTOR_SPARSITIES]
    cases += [level(k, device=device) for k in _LEVELS]
    return [*cases, told_apart(device=device)]


def curves(device: str = "cpu") -> list[Case]:
    """Cost against population, width, batch, density and threads; the rest held, at 90%."""
    at_256: dict[str, Any] = {"inp": 256, "out": 256, "device": device}
    cases = [policy(90.0, tickets=p, device=device) for p in (1, 4, 16, 64, 256, 1024)]
    cases += [ppo_iteration(90.0, tickets=p, device=device) for p in (1, 4, 16, 64, 256, 1024)]
    for width in (32, 64, 128, 256, 512, 1024):
        square: dict[str, Any] = {"inp": width, "out": width, "device": device}
        cases.append(linear_forward(90.0, batch=256, **square))
        cases.append(policy(90.0, tickets=4, width=width, loop=False, device=device))
    cases += [linear_forward(90.0, batch=b, **at_256) for b in (1, 4, 16, 64, 256, 1024, 4096)]
    cases += [policy(90.0, batch=b, device=device) for b in (8, 32, 128, 512, 2048)]
    cases += [linear_forward(s, batch=512, **at_256) for s in _DENSITIES]
    cases += [linear_backward(s, batch=512, **at_256) for s in _DENSITIES]
    for k in range(20):
        cases.append(ppo_iteration(round(100 * (1 - 0.8**k), 2), level=k, device=device))
    for threads in (
        t for t in (1, 2, 4, 8, 16, 32, 64) if device == "cpu" and t <= available_cores()
    ):
        cases.append(linear_forward(90.0, batch=2048, threads=threads, **at_256))
        cases.append(policy(90.0, threads=threads, device=device))
        cases.append(ppo_iteration(90.0, threads=threads, device=device))
    return _distinct(cases)


def full(device: str = "cpu") -> list[Case]:
    """`quick`, `curves`, every sparsity at more shapes, full blocks, 2:4, and torch.compile."""
    cases = quick(device) + curves(device)
    for width, batch in ((64, 128), (256, 64), (1024, 64), (1024, 1024)):
        shape: dict[str, Any] = {"inp": width, "out": width, "batch": batch, "device": device}
        for sparsity in SPARSITIES:
            cases += [linear_forward(sparsity, **shape), linear_backward(sparsity, **shape)]
    blocks: dict[str, Any] = {"inp": 1024, "out": 1024, "batch": 256, "device": device}
    for sparsity in SPARSITIES:
        cases.append(linear_forward(sparsity, block=16, **blocks))
        cases.append(policy(sparsity, width=256, tickets=8, device=device))
    cases.append(linear_forward(50.0, two_four=True, **blocks))
    cases.append(policy(90.0, compiled=True, device=device))
    return _distinct(cases)


def _distinct(cases: list[Case]) -> list[Case]:
    return list({case.label: case for case in reversed(cases)}.values())[::-1]


def smoke(device: str = "cpu") -> list[Case]:
    """Every kind of case at its smallest: checks the harness, measures nothing worth keeping."""
    tiny: dict[str, Any] = {"inp": 64, "out": 64, "device": device}
    return [
        linear_forward(90.0, batch=64, **tiny),
        linear_backward(90.0, batch=64, **tiny),
        linear_forward(90.0, batch=1, **tiny),
        linear_forward(50.0, batch=64, block=16, **tiny),
        linear_forward(50.0, batch=64, two_four=True, **tiny),
        linear_forward(90.0, batch=64, threads=1, **tiny),
        layer_inside(90.0, width=128, batch=256, device=device),
        policy(90.0, tickets=4, batch=32, device=device),
        ppo_iteration(0.0, tickets=4, device=device, systems=True),
        ppo_iteration(90.0, tickets=4, device=device),
        level(10, tickets=4, iterations=1, device=device),
        told_apart(tickets=4, device=device),
    ]


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "quick": quick,
    "curves": curves,
    "full": full,
    "smoke": smoke,
}
"""By name: the table of targets; scaling curves; both and more shapes; the harness itself."""


def suite(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite.

    Raises:
        ValueError: no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name](device)
