"""Iterative magnitude pruning: train, prune, rewind, repeat (Frankle and Carbin, 2019).

One level of many tracks at once. Training itself is the algorithms' business; this file decides
what each ticket starts a level with: its mask, its weights, and what it is rewound to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.conditions import draw, find_condition
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.update import rewind_
from sparse_tickets.population import Population, initialise
from sparse_tickets.prune import prune_masks

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
        ValueError: an unknown condition or criterion, or shapes that do not fit the arena.
    """
    prunable = arena.prunable
    values = rewind_point.weight[:, :prunable]
    imp_mask = prune_masks(criterion, trained.weight, values, trained.mask, kept, arena)
    fresh = initialise(arena, key, scheme)[:, :prunable]

    # The actor's weights come first in the arena, so its part of a mask is a prefix.
    actor = Arena.build(arena.actor.sizes, activation=arena.actor.activation)
    weight, mask = rewind_point.weight.clone(), imp_mask.clone()
    keeps_values = torch.zeros(len(key), 1, dtype=torch.bool, device=key.device)
    for name in dict.fromkeys(conditions):
        rows = torch.tensor([name == other for other in conditions], device=key.device)
        condition = find_condition(name)
        part = slice(0, actor.prunable)
        drawn, drawn_mask = draw(
            condition, values[rows, part], imp_mask[rows, part], key[rows], fresh[rows, part], actor
        )
        weight[rows, part] = drawn
        mask[rows, part] = drawn_mask
        keeps_values[rows] = condition.weights == "init"

    population = Population.create(arena, weight, mask, density)
    parameters = population.parameters
    m, v = rewind_point.m.clone(), rewind_point.v.clone()
    for moment in (m, v):
        moment[:, : actor.prunable] *= keeps_values
    rewind_(
        parameters.weight,
        weight,
        parameters.m,
        parameters.v,
        parameters.mask,
        initial_m=m,
        initial_v=v,
    )
    parameters.step.copy_(rewind_point.step)
    return population
