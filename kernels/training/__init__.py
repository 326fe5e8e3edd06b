"""One training step with a head, on each backend: the frame that every update shares.

Draw a minibatch, run the networks forward, let a *head* turn their outputs into a loss and its
derivative, run them backward, clip and step Adam. PPO and cloning are heads; another algorithm is
one more, in an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..arena import Arena, Net
from ..dispatch import PLAIN_TORCH, Plan, resolve_backend
from ..errors import check_density
from ..mlp import describe_layers

__all__ = ["plan_update"]


def plan_update(
    op: str,
    arena: Arena,
    nets: tuple[Net, ...],
    device: torch.device,
    density: float,
    on_gpu: Callable[[], str],
) -> Plan:
    """What an update does on ``device``, and why.

    Args:
        op: its name.
        arena: of the population.
        nets: those that take part.
        device: where.
        density: nominal, of the networks that are pruned.
        on_gpu: says what Triton's backend does.
    """
    check_density(density)
    backend = resolve_backend(device, arena.actor)
    if backend == "triton":
        return Plan(op, backend, "dense+mask", on_gpu())
    if backend == "reference":
        return Plan(op, backend, "dense+mask", PLAIN_TORCH)
    densities = tuple(density if net.weights[0] < arena.prunable else 1.0 for net in nets)
    return Plan(op, backend, *describe_layers(nets, densities))
