"""Which configurations are measured: `quick`, the table of targets; `full`, also the curves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sparse_tickets.algos.ppo import PPO

from . import ours
from .measure import Case, Contest
from .peers import (
    jax_ppo,
    loop_dense,
    masked_bmm,
    sb3,
    scipy_csr,
    sparseprop,
    torch_compile,
    torch_csr,
    torch_dense,
)
from .ppo_job import PPOJob, ppo_contender
from .problems import SPARSITIES, LinearProblem, PolicyProblem

__all__ = ["FUSED_DENSE", "SUITES", "suite"]

FUSED_DENSE = "sparse_tickets, run dense"
"""Our own fused kernels told that nothing is pruned: what sparsity alone gains is over this."""

_TARGETS = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
_ACTOR_SPARSITIES = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0)
_SYSTEMS = (0.0, 90.0)


def linear_forward(
    sparsity: float, *, inp: int, out: int, batch: int, tickets: int = 1, device: str = "cpu"
) -> Case:
    """`kernels.linear.linear` against every dense and sparse product torch and SciPy have."""

    def build() -> Contest:
        problem = LinearProblem(tickets, batch, inp, out, sparsity, device=device)
        contest = Contest(ours.linear_forward(problem))
        for peer in (torch_dense, masked_bmm, torch_csr, scipy_csr, sparseprop):
            contest.invite(peer.NAME, partial(peer.linear_forward, problem))
        return contest

    shape = {"P": tickets, "B": batch, "I": inp, "O": out}
    return Case("linear forward", shape, sparsity, build)


def linear_backward(
    sparsity: float, *, inp: int, out: int, batch: int, tickets: int = 1, device: str = "cpu"
) -> Case:
    """The same with gradients for x, weight and bias."""

    def build() -> Contest:
        problem = LinearProblem(tickets, batch, inp, out, sparsity, device=device)
        contest = Contest(ours.linear_backward(problem))
        for peer in (torch_dense, masked_bmm, torch_csr, sparseprop):
            contest.invite(peer.NAME, partial(peer.linear_backward, problem))
        contest.skipped[scipy_csr.NAME] = "SciPy has no product sampled at a mask, which dW is"
        return contest

    shape = {"P": tickets, "B": batch, "I": inp, "O": out}
    return Case("linear forward+backward", shape, sparsity, build)


def policy(
    sparsity: float,
    *,
    tickets: int = 60,
    batch: int = 128,
    width: int = 64,
    device: str = "cpu",
    loop: bool = True,
    compiled: bool = False,
) -> Case:
    """`kernels.mlp.mlp` forward and backward against batched torch, and against itself dense."""
    sizes = (4, width, width, 2)

    def build() -> Contest:
        problem = PolicyProblem(tickets, batch, sizes, sparsity, device=device)
        contest = Contest(ours.policy(problem))
        contest.peers.append(ours.policy(problem, density=1.0, name=FUSED_DENSE))
        contest.invite(masked_bmm.NAME, lambda: masked_bmm.policy(problem))
        contest.invite(torch_dense.NAME, lambda: torch_dense.policy(problem))
        if loop:
            contest.invite(loop_dense.NAME, lambda: loop_dense.policy(problem))
        if compiled:
            contest.invite(torch_compile.NAME, lambda: torch_compile.policy(problem))
        else:
            contest.skipped[torch_compile.NAME] = "tens of seconds of compilation: suite full only"
        return contest

    shape = {"P": tickets, "B": batch, "width": width}
    return Case("policy forward+backward", shape, sparsity, build)


def ppo_iteration(
    sparsity: float, *, tickets: int = 60, device: str = "cpu", systems: bool = False
) -> Case:
    """A whole PPO iteration on CartPole, the actor pruned, against the same code run dense.

    ``systems`` adds other people's: JAX and Stable-Baselines3.
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

    shape = {"P": tickets, "envs": PPO.copies, "steps": PPO.horizon}
    return Case("PPO iteration", shape, sparsity, build, unit="agent-step")


def told_apart(*, tickets: int = 60, sparsity: float = 90.0, device: str = "cpu") -> Case:
    """Batching, fusion and sparsity, one after the other, on the same job."""
    stages = (
        ("loop of dense policies", PPOJob, {"tickets": 1, "backend": "reference"}),
        ("population, dense", PPOJob, {"tickets": tickets, "backend": "reference"}),
        ("population, fused, dense", PPOJob, {"tickets": tickets}),
    )

    def build() -> Contest:
        job = PPOJob(tickets, sparsity, device=device)
        contest = Contest(ppo_contender(job, "population, fused, sparse"))
        for name, make, options in stages:
            contest.peers.append(ppo_contender(make(device=device, **options), name))
        return contest

    shape = {"P": tickets, "envs": PPO.copies, "steps": PPO.horizon}
    return Case("whole job, gains told apart", shape, sparsity, build, unit="agent-step")


def quick(device: str = "cpu") -> list[Case]:
    """The table of targets."""
    at_256: dict[str, Any] = {"inp": 256, "out": 256, "device": device}
    cases = [linear_forward(s, batch=2048, **at_256) for s in _TARGETS]
    cases += [linear_backward(s, batch=2048, **at_256) for s in _TARGETS]
    cases += [linear_forward(s, batch=1, **at_256) for s in _TARGETS]
    cases += [policy(s, device=device) for s in _TARGETS]
    cases += [ppo_iteration(s, device=device, systems=s in _SYSTEMS) for s in _ACTOR_SPARSITIES]
    return [*cases, told_apart(device=device)]


def full(device: str = "cpu") -> list[Case]:
    """`quick`, every sparsity, and curves over population size, width and batch at 90%."""
    cases = quick(device)
    for sparsity in SPARSITIES:
        for width, batch in ((64, 128), (64, 2048), (256, 64), (1024, 64), (1024, 1024)):
            shape: dict[str, Any] = {"inp": width, "out": width, "batch": batch, "device": device}
            cases += [linear_forward(sparsity, **shape), linear_backward(sparsity, **shape)]
        cases.append(policy(sparsity, width=256, tickets=8, device=device))
    cases += [policy(90.0, tickets=p, device=device) for p in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    cases += [
        policy(90.0, tickets=4, width=width, loop=False, device=device)
        for width in (32, 64, 128, 256, 512, 1024)
    ]
    cases += [policy(90.0, batch=batch, device=device) for batch in (16, 64, 512, 2048)]
    cases += [ppo_iteration(90.0, tickets=p, device=device) for p in (1, 4, 16, 64, 256)]
    cases.append(policy(90.0, compiled=True, tickets=60, batch=256, device=device))
    return list({case.label: case for case in cases}.values())


def smoke(device: str = "cpu") -> list[Case]:
    """Every kind of case at its smallest: checks the harness, measures nothing worth keeping."""
    tiny: dict[str, Any] = {"inp": 64, "out": 64, "device": device}
    return [
        linear_forward(90.0, batch=64, **tiny),
        linear_backward(90.0, batch=64, **tiny),
        linear_forward(90.0, batch=1, **tiny),
        policy(90.0, tickets=4, batch=32, device=device),
        ppo_iteration(0.0, tickets=4, device=device, systems=True),
        ppo_iteration(90.0, tickets=4, device=device),
        told_apart(tickets=4, device=device),
    ]


SUITES: dict[str, Callable[[str], list[Case]]] = {"quick": quick, "full": full, "smoke": smoke}


def suite(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite.

    Raises:
        ValueError: no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name](device)
