"""At which sizes cases are measured, by suite: see `SUITES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cases import (
    blocked,
    layer_inside,
    level,
    linear_backward,
    linear_forward,
    policy,
    ppo_iteration,
    prune,
    told_apart,
)
from .measure import Case
from .problems import SPARSITIES
from .results import available_cores

_TARGETS = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
_ACTOR_SPARSITIES = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0)
_SYSTEMS = (0.0, 90.0)
_LEVELS = (1, 10, 20)
_DENSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)


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


@dataclass(frozen=True)
class Sizes:
    """How large the cases of a GPU's targets are; launches are tuned for them too.

    Attributes:
        width: of a layer of a population.
        curve: its sparsities.
        wide: width of the one blocked layer.
        wide_batch: its rows.
        policies: tickets of a population of policies.
        policy_batch: rows per policy.
        policy_widths: hidden sizes.
        pruned: tickets and weights of each for pruning.
        agents: tickets of the PPO iteration; 0 leaves it out.
        matrix: side of the product that shows what is possible.
        rounds: samples.
    """

    width: int = 256
    curve: tuple[float, ...] = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
    wide: int = 1024
    wide_batch: int = 8192
    policies: int = 60
    policy_batch: int = 128
    policy_widths: tuple[int, ...] = (64, 128)
    pruned: tuple[int, int] = (1024, 130_000)
    agents: int = 60
    matrix: int = 8192
    rounds: int = 9


REAL = Sizes()
TINY = Sizes(
    width=32,
    curve=(0.0, 90.0),
    wide=64,
    wide_batch=32,
    policies=2,
    policy_batch=8,
    policy_widths=(16,),
    pruned=(2, 100),
    agents=0,
    matrix=64,
    rounds=2,
)
"""For a rehearsal without a GPU."""


# What is asked for: the subject's speed over its strongest peer's, by sparsity, or by width.
_POLICY = {64: 3.0, 128: 2.0}


def targets(device: str = "cuda", sizes: Sizes | None = None) -> list[Case]:
    """What is asked of a GPU, those cases first; small ones elsewhere, for a rehearsal."""
    on_gpu = torch.device(device).type == "cuda"
    sizes = sizes or (REAL if on_gpu else TINY)
    here: dict[str, Any] = {"device": device}
    wide: dict[str, Any] = {"width": sizes.wide, "batch": sizes.wide_batch, **here}
    cases = [blocked(90.0, asked=1.8, **wide)]
    # Triton's interpreter corrupts bfloat16.
    if on_gpu:
        cases.append(blocked(90.0, dtype=torch.bfloat16, precision="bf16", asked=1.8, **wide))
    crowd: dict[str, Any] = {"tickets": sizes.policies, "batch": sizes.policy_batch, **here}
    for width in sizes.policy_widths:
        for s in (0.0, 90.0):
            asked = _POLICY.get(width)
            cases.append(
                policy(s, width=width, loop=False, compiled=on_gpu, cold=True, asked=asked, **crowd)
            )
    tickets, prunable = sizes.pruned
    cases.append(prune(tickets=tickets, prunable=prunable, asked=5.0, **here))
    square: dict[str, Any] = {"inp": sizes.width, "out": sizes.width, "precision": "tf32"}
    cases += [linear_backward(s, asked=0.97, **square, **crowd) for s in sizes.curve]
    return cases + ([told_apart(tickets=sizes.agents, device=device)] if sizes.agents else [])


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "quick": quick,
    "curves": curves,
    "full": full,
    "smoke": smoke,
    "gpu": targets,
}
"""By name: the table of targets; scaling curves; both and more shapes; the harness itself; and what
is asked of a GPU."""


def suite(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite.

    Raises:
        ValueError: no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name](device)
