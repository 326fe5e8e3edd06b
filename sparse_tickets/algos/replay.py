"""One iteration of training as a CUDA graph: hundreds of launches for the price of one.

At 60 tickets of width 64 a kernel takes microseconds, about as long as its launch. A graph is
captured anew by every training, since masks and memory are its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeGuard

import torch

from sparse_tickets.envs import ClassicEnv, Env
from sparse_tickets.kernels import imitation, ppo, rollout
from sparse_tickets.population import Population

__all__ = ["can_replay", "can_replay_cloning", "replayed"]

SWITCH = "SPARSE_TICKETS_GRAPHS"
"""Environment variable; 0 launches every kernel by itself."""


def can_replay(env: Env, population: Population) -> TypeGuard[ClassicEnv]:
    """Whether an iteration of PPO is all kernels that a graph can hold.

    Raises:
        ValueError: ``SPARSE_TICKETS_GRAPHS`` is neither 0 nor 1.
    """
    if not (_is_wanted(env.device) and isinstance(env, ClassicEnv)):
        return False
    plans = (
        rollout.plan(population.arena, env, env.device, density=population.density),
        ppo.plan(population.arena, env.device, density=population.density),
    )
    return all(plan.backend == "triton" for plan in plans)


def can_replay_cloning(population: Population) -> bool:
    """Whether an iteration of cloning is; see `can_replay`."""
    device = population.parameters.weight.device
    if not _is_wanted(device):
        return False
    plan = imitation.plan(population.arena, device, density=population.density)
    return plan.backend == "triton"


def _is_wanted(device: torch.device) -> bool:
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1, got {switch!r}")
    return switch == "1" and device.type == "cuda"


def replayed(step: Callable[[], object]) -> Callable[[], None]:
    """``step`` on a GPU, launched at its first call, captured at its second, replayed from then on.

    Args:
        step: must find and leave its state in the same memory at every call, and neither wait for
            the device nor decide by what is on it.
    """
    graph: torch.cuda.CUDAGraph | None = None
    warm = False

    def advance() -> None:
        nonlocal graph, warm
        if not warm:
            # Kernels compile here, which a capture must not see; on another stream, as torch asks.
            here, apart = torch.cuda.current_stream(), torch.cuda.Stream()
            apart.wait_stream(here)
            with torch.cuda.stream(apart):
                step()
            here.wait_stream(apart)
            warm = True
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        graph.replay()

    return advance
