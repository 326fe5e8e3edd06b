"""What PPO's loss and a whole update must compute and move at least."""

from __future__ import annotations

from itertools import pairwise

from ..arena import Arena, Net
from ..cost import Cost

__all__ = ["gradient", "loss", "training_step", "update", "weights"]


def loss(tickets: int, samples: int, actions: int, *, continuous: bool = False) -> Cost:
    """Loss, statistics and gradients with respect to both heads, of one minibatch.

    A launch of its own where networks are too wide for `gradient`. Per sample and action 12
    operations of a softmax, its entropy and their gradients (11 of a Gaussian's), and per sample
    40 of ratio, clipping, value loss and sums.

    Args:
        tickets: P.
        samples: of a ticket's minibatch.
        actions: A.
        continuous: whether actions are vectors.
    """
    flops = samples * (actions * (11 if continuous else 12) + 40)
    action = 4 * actions if continuous else 8
    # Heads in and gradients out; an index, four numbers and the action of each sample.
    moved = samples * (2 * 4 * (actions + 1) + 8 + 4 * 4 + action)
    return Cost(float(tickets * flops), float(tickets * moved))


def gradient(arena: Arena, tickets: int, samples: int) -> Cost:
    """Gradient of a minibatch's loss for every parameter, heads and activations on the chip.

    The launch of narrow networks: it reads the samples through indices, and computes entries off
    the mask, too. The rows of its stretches count as one.

    Args:
        arena: actor and critic.
        tickets: P.
        samples: of a ticket's minibatch.
    """
    continuous = arena.log_std is not None
    actions = arena.actor.sizes[-1]
    heads = loss(1, samples, actions, continuous=continuous)
    flops = samples * sum(training_step(net, 1.0) for net in arena.nets) + heads.flops
    moved = samples * (8 + _sample(arena)) + 2 * 4 * arena.size
    return Cost(tickets * flops, float(tickets * moved))


def update(
    arena: Arena, tickets: int, samples: int, epochs: int, minibatches: int, density: float = 1.0
) -> Cost:
    """All epochs and minibatches of an iteration, the actor's products on its support alone.

    A training step of a network is three products, but for the input's gradient. The fewest bytes:
    each epoch reads the samples once, each minibatch reads and writes weights and moments once.

    Args:
        arena: actor and critic.
        tickets: P.
        samples: S of each ticket.
        epochs: passes over them.
        minibatches: optimiser steps a pass.
        density: of the prunable weights.
    """
    flops, numbers = 0.0, 0.0
    for net in arena.nets:
        share = density if net.weights[0] < arena.prunable else 1.0
        flops += samples * training_step(net, share)
        numbers += share * weights(net) + sum(net.sizes[1:])
    steps = epochs * minibatches
    heads = loss(1, samples, arena.actor.sizes[-1], continuous=arena.log_std is not None)
    adam = 16 * numbers
    # 7 rows of parameters as in `update.cost.adam`.
    return Cost(
        tickets * (epochs * (flops + heads.flops) + steps * adam),
        tickets * (epochs * samples * _sample(arena) + steps * 7 * 4 * numbers),
    )


def _sample(arena: Arena) -> int:
    """Bytes of an observation, four numbers and an action."""
    action = 8 if arena.log_std is None else 4 * arena.actor.sizes[-1]
    return 4 * (arena.actor.sizes[0] + 4) + action


def weights(net: Net) -> int:
    """Weights of a network, biases apart."""
    return sum(inp * out for inp, out in pairwise(net.sizes))


def training_step(net: Net, density: float) -> float:
    """Operations of a sample forward and back."""
    hidden = sum(net.sizes[1:-1])
    products = 6 * weights(net) - 2 * net.sizes[0] * net.sizes[1]
    # Forward an activation is one operation, backward its derivative three.
    return density * products + 4 * hidden + 2 * sum(net.sizes[1:])
