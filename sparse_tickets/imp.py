"""Iterative magnitude pruning: train, prune, rewind, repeat (Frankle and Carbin, 2019).

One level of many tracks at once. Training itself is the algorithms' business; this file decides
what each ticket starts a level with: its mask, its weights, and what it is rewound to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.conditions import Condition, draw, find_condition
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.population import Population, initialise
from sparse_tickets.prune import prune_and_rewind_

__all__ = ["Trained", "dense_population", "next_population"]


class Trained(NamedTuple):
    """What the level before left, one row per ticket.

    Attributes:
        weight: ``[P, N]`` trained prunable weights.
        mask: ``[P, N]`` the mask they were trained under.
    """

    weight: Tensor
    mask: Tensor


def dense_population(
    arena: Arena, initial_key: Tensor, scheme: str, log_std: float = 0.0
) -> Population:
    """Level 0: every weight kept, initialised from each seed's key.

    Args:
        arena: the layout.
        initial_key: ``[P]`` int64, keys of (env, seed), the same for every algorithm.
        scheme: a named initialisation.
        log_std: initial log standard deviation of continuous actions.
    """
    return Population.create(arena, initialise(arena, initial_key, scheme, log_std))


def next_population(
    arena: Arena,
    conditions: Sequence[str],
    trained: Trained,
    rewind_point: Parameters,
    key: Tensor,
    *,
    kept: int,
    density: float,
    criterion: str = "magnitude",
    scheme: str = "lecun",
) -> Population:
    """Prune to ``kept`` weights, rewind, and apply each track's condition.

    Every condition restores biases, critic and log_std to the rewind point; permutation, random
    masks and re-initialisation touch the actor's weights alone. A critic under the mask is pruned
    by ``trained`` in every condition, jointly with the actor: conditions ask what the policy's mask
    and values are worth, and a critic they damaged too would be counted as the policy's. Moments
    and step counts are those of the rewind point (zero at initialisation); where a condition
    replaces the actor's weights, the moments of those weights restart at zero.

    Args:
        arena: the layout.
        conditions: the condition of each of the P tickets.
        trained: weights and masks the new masks are derived from; for conditions without a chain
            any mask will do, only its row count matters, unless a critic is under it.
        rewind_point: ``[P, ...]`` the dense parameters each ticket is rewound to.
        key: ``[P]`` int64, the keys of the new level's cells.
        kept: exact number of weights each ticket keeps.
        density: the level's nominal density.
        criterion: which weights stay.
        scheme: initialisation of re-initialised weights.

    Returns:
        The population ready to train.

    Raises:
        ValueError: an unknown condition or criterion, not as many conditions as keys, or shapes
            that do not fit the arena.
    """
    if len(conditions) != len(key):
        raise ValueError(
            f"conditions must be one for each of {len(key)} tickets, got {len(conditions)}"
        )
    population = Population.create(arena, rewind_point.weight, trained.mask, density)
    parameters = population.parameters
    prune_and_rewind_(criterion, trained.weight, parameters, rewind_point, kept, arena)
    # That is mask/weights, the ticket. The other conditions draw a policy from it.
    for name in dict.fromkeys(conditions):
        condition = find_condition(name)
        if not _is_ticket(condition):
            own = [i for i, other in enumerate(conditions) if other == name]
            tickets = torch.tensor(own, dtype=torch.int64, device=key.device)
            _redraw_policy_(condition, tickets, population, rewind_point, key, scheme)
    return population


def _is_ticket(condition: Condition) -> bool:
    """Whether pruning and rewinding is all that a condition asks for."""
    return condition.function is None and (condition.mask, condition.weights) == ("imp", "init")


def _redraw_policy_(
    condition: Condition,
    own: Tensor,
    population: Population,
    rewind_point: Parameters,
    key: Tensor,
    scheme: str,
) -> None:
    """Draw masks and weights of the actors of a condition's own tickets anew."""
    parameters = population.parameters
    net = population.arena.actor
    actor = Arena.build(net.sizes, activation=net.activation, architecture=net.architecture)
    # The actor's weights come first in the arena.
    policy = slice(0, actor.prunable)

    def of_own(rows: Tensor) -> Tensor:
        return rows[:, policy].index_select(0, own)

    key = key.index_select(0, own)
    # On the host: a GPU's logarithms may differ in the last bit, and where a level starts must not
    # depend on the device.
    fresh = initialise(actor, key.cpu(), scheme)[:, policy].to(key.device)
    imp_mask, initial = of_own(parameters.mask), of_own(rewind_point.weight)
    weight, mask = draw(condition, initial, imp_mask, key, fresh, actor)
    if condition.weights == "init":
        m, v = (torch.where(mask, of_own(rows), 0.0) for rows in (rewind_point.m, rewind_point.v))
    else:
        m = v = torch.zeros_like(weight)
    targets = (parameters.weight, parameters.mask, parameters.m, parameters.v)
    for rows, drawn in zip(targets, (weight, mask, m, v), strict=True):
        rows[:, policy].index_copy_(0, own, drawn)
