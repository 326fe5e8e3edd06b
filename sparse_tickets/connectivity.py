"""What a mask leaves connected: which weights, inputs, units and actions lie on a path.

At high sparsity a mask drawn at random disconnects the policy long before its last weight is gone:
nominal density then says little, effective density says what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.arena import Arena
from .kernels.errors import check_dtype, check_shape

__all__ = ["Connectivity", "connectivity"]


class Connectivity(NamedTuple):
    """How the actors of a population are connected from observation to action.

    Attributes:
        effective_density: ``[P]`` float64, weights on an input-output path, over all its weights.
        has_path: ``[P]`` bool, whether any action depends on any input.
        dead_inputs: ``[P]`` int64, inputs without a path to any action.
        dead_units: ``[P]`` int64, hidden units without a path in or without a path out.
        reachable_actions: ``[P]`` int64, actions with a path from some input.
    """

    effective_density: Tensor
    has_path: Tensor
    dead_inputs: Tensor
    dead_units: Tensor
    reachable_actions: Tensor


def connectivity(mask: Tensor, arena: Arena) -> Connectivity:
    """Follow the actor's masks forwards from the inputs and backwards from the actions.

    Args:
        mask: ``[P, N]`` bool.
        arena: the layout; a critic under the mask is left out.

    Raises:
        ValueError: the mask has a wrong shape.
        TypeError: the mask is not bool.
    """
    check_shape("mask", mask, (mask.shape[0], arena.prunable))
    check_dtype("mask", mask, torch.bool)
    actor, tickets = arena.actor, mask.shape[0]
    # float32 products of zeros and ones: a positive sum means reachable, rounding cannot undo it.
    edges = [actor.weight(mask, layer).float() for layer in range(actor.depth)]

    reached = [torch.ones(tickets, actor.sizes[0], 1, device=mask.device)]
    for edge in edges:
        reached.append((edge @ reached[-1] > 0).float())
    useful = [torch.ones(tickets, actor.sizes[-1], 1, device=mask.device)]
    for edge in reversed(edges):
        useful.insert(0, (edge.mT @ useful[0] > 0).float())

    alive = [(a * b).squeeze(2) > 0 for a, b in zip(reached, useful, strict=True)]
    on_path = torch.zeros(tickets, dtype=torch.int64, device=mask.device)
    for layer, edge in enumerate(edges):
        through = (edge > 0) & alive[layer + 1][:, :, None] & alive[layer][:, None, :]
        on_path += through.sum(dim=(1, 2))
    dead = [(~units).sum(dim=1) for units in alive]
    total = sum(edge[0].numel() for edge in edges) if tickets else 1
    return Connectivity(
        effective_density=on_path.double() / total,
        has_path=alive[-1].any(dim=1),
        dead_inputs=dead[0],
        dead_units=torch.stack([torch.zeros_like(on_path), *dead[1:-1]]).sum(dim=0),
        reachable_actions=alive[-1].sum(dim=1),
    )
