"""Cases by kind: which contenders meet, on which inputs. `suites` says at which sizes.

Every case runs on a CPU or a GPU. Where float32 products may be TF32 a case has a ``precision``,
the same for all contenders, and its op names it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparse_tickets.algos.ppo import PPO
from sparse_tickets.ceilings import Cost, layer_cost

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
    torch_topk,
)
from .ppo_job import PPOJob, ppo_contender
from .problems import LinearProblem, PolicyProblem, PruneProblem

FUSED_DENSE = "sparse_tickets, run dense"
"""Our own fused kernels told that nothing is pruned: what sparsity alone gains is over this."""
TORCH_LEVEL = "torch, all tickets at once"
"""The reference backend: the same population as plain batched torch, dense weights times masks."""

_ALL_FUSED = "population, fused, dense"
_ALL_SPARSE = "population, fused, sparse"


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
    precision: str = "",
    asked: float | None = None,
) -> Case:
    """The same with gradients for x, weight and bias."""

    def build() -> Contest:
        problem = LinearProblem(
            *(tickets, batch, inp, out, sparsity),
            device=device,
            block=block,
            precision=precision or "ieee",
        )
        contest = Contest(ours.linear_backward(problem))
        for peer in (torch_dense, masked_bmm, torch_csr, torch_bsr, sparseprop):
            contest.invite(peer.NAME, partial(peer.linear_backward, problem))
        contest.skipped[scipy_csr.NAME] = "SciPy has no product sampled at a mask, which dW is"
        contest.cost = linear_cost(problem, contest.subject.plan, training=True)
        return contest

    shape = _layer_shape(tickets, batch, inp, out, block, threads)
    op = "linear forward+backward" + (f", {precision}" if precision else "")
    return Case(
        *(op, shape, sparsity, build),
        cold=True,
        threads=threads,
        precision=precision,
        asked=asked,
    )


def _layer_shape(
    tickets: int, batch: int, inp: int, out: int, block: int = 1, threads: int | None = None
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
    cold: bool = False,
    asked: float | None = None,
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
    return Case(op, shape, sparsity, build, cold=cold, threads=threads, asked=asked)


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


def told_apart(*, tickets: int = 60, device: str = "cpu") -> Case:
    """Batching, fusion and sparsity, one after the other, on the same job."""
    sparsity = 90.0
    stages: dict[str, dict[str, Any]] = {
        "loop of dense policies": {"tickets": 1, "backend": "reference"},
        "population, dense": {"tickets": tickets, "backend": "reference"},
        _ALL_FUSED: {"tickets": tickets},
    }

    def build() -> Contest:
        job = PPOJob(tickets, sparsity, device=device)
        contest = Contest(ppo_contender(job, _ALL_SPARSE))
        for name, options in stages.items():
            contest.peers.append(ppo_contender(PPOJob(device=device, **options), name))
        return contest

    shape = {"P": tickets, "envs": PPO.copies, "steps": PPO.horizon}
    return Case("whole job, gains told apart", shape, sparsity, build, unit="agent-step")


def blocked(
    sparsity: float,
    *,
    width: int,
    batch: int,
    block: int = 32,
    dtype: torch.dtype = torch.float32,
    precision: str = "tf32",
    device: str = "cpu",
    asked: float | None = None,
) -> Case:
    """One wide layer whose mask is made of blocks, against the dense products of its precision."""

    def build() -> Contest:
        problem = LinearProblem(
            *(1, batch, width, width, sparsity),
            dtype=dtype,
            device=device,
            precision=precision if dtype == torch.float32 else "ieee",
            block=block,
        )
        contest = Contest(ours.backward_blocked(problem, block))
        for peer in (torch_dense, masked_bmm):
            contest.invite(peer.NAME, partial(peer.linear_backward, problem))
        item = problem.x.element_size()
        contest.cost = layer_cost(f"blocked-{block}", problem.mask, batch, True, item)
        return contest

    shape = _layer_shape(1, batch, width, width, block)
    op = f"linear forward+backward, blocked, {precision}"
    return Case(op, shape, sparsity, build, cold=True, precision=precision, asked=asked)


def prune(*, tickets: int, prunable: int, device: str = "cpu", asked: float | None = None) -> Case:
    """The next level's masks: 20% of what is left of half the weights."""

    def build() -> Contest:
        problem = PruneProblem(tickets, prunable, 50.0, round(0.4 * prunable), device)
        contest = Contest(ours.prune_to(problem))
        # Scores, masks and counts, each read or written once; nothing is computed.
        contest.cost = Cost(0, tickets * (6 * prunable + 8))
        contest.peers.append(torch_topk.prune(problem))
        return contest

    shape = {"P": tickets, "N": prunable}
    return Case("prune", shape, 60.0, build, cold=True, asked=asked)
