"""What cloning's loss and a whole update must compute and move at least."""

from __future__ import annotations

from ..arena import Arena
from ..cost import Cost
from ..ppo.cost import training_step, weights

__all__ = ["loss", "update"]


def loss(tickets: int, samples: int, actions: int, *, continuous: bool = False) -> Cost:
    """Loss and gradient with respect to the student's outputs, of one minibatch.

    Per sample and action 12 operations of a softmax, the divergence and its gradient (15 of
    Gaussians'); per sample 3 of a logarithm, a quotient and a sum (1, the sum).

    Args:
        tickets: P.
        samples: of a ticket's minibatch.
        actions: A.
        continuous: whether actions are vectors.
    """
    flops = samples * (15 * actions + 1 if continuous else 12 * actions + 3)
    # Outputs in and gradients out; of each sample its row, and one or two targets an action.
    moved = samples * (4 * actions * (4 if continuous else 3) + 8)
    return Cost(float(tickets * flops), float(tickets * moved))


def update(arena: Arena, tickets: int, updates: int, batch: int, density: float = 1.0) -> Cost:
    """Consecutive updates, the student's products on its support alone.

    A training step is three products, but for the input's gradient. The fewest bytes: each sample
    and its target read once, each update reads and writes weights and moments once. Nothing of a
    critic counts.

    Args:
        arena: of the students.
        tickets: P.
        updates: optimiser steps.
        batch: samples of each.
        density: of the prunable weights.
    """
    net, continuous = arena.actor, arena.log_std is not None
    actions = net.sizes[-1]
    head = loss(1, batch, actions, continuous=continuous)
    numbers = density * weights(net) + sum(net.sizes[1:]) + actions * continuous
    # 16 operations a number and 7 rows of parameters as in `update.cost.adam`.
    flops = batch * training_step(net, density) + head.flops + 16 * numbers
    moved = batch * 4 * (net.sizes[0] + actions * (1 + continuous)) + 7 * 4 * numbers
    return Cost(tickets * updates * flops, tickets * updates * moved)
