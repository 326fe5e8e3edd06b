"""What the subject of a case must do at least, in the formats that its plan names."""

from __future__ import annotations

from sparse_tickets.ceilings import Cost, layer_cost

from .problems import LinearProblem, PolicyProblem


def linear_cost(problem: LinearProblem, plan: str, *, training: bool) -> Cost:
    """Of all tickets of a layer."""
    return layer_cost(_formats(plan), problem.mask, problem.x.shape[1], training)


def policy_cost(problem: PolicyProblem, plan: str) -> Cost:
    """Of all tickets' networks, forward and backward to the weights.

    Between layers nothing needs to leave the chip: observations, weights and the gradients of
    output and weights are all that must move. The first layer has no input gradient.
    """
    net, formats = problem.arena.actor, _formats(plan).split("/")
    if len(formats) != net.depth:
        formats = [formats[0]] * net.depth
    flops = 0.0
    for layer, format in enumerate(formats):
        mask = net.weight(problem.mask, layer)
        flops += layer_cost(format, mask, problem.batch, training=True).flops
        units = problem.tickets * problem.batch * problem.sizes[layer + 1]
        if layer == 0:
            flops -= layer_cost(format, mask, problem.batch, training=False).flops - units
        if layer < net.depth - 1:
            # A transcendental, and three operations for its derivative.
            flops += 4.0 * units
    kept = int(problem.mask.sum()) + problem.weight.numel() - problem.mask.numel()
    moved = problem.x.numel() + 2 * problem.dy.numel() + kept + problem.weight.numel()
    return Cost(flops, 4.0 * moved + problem.mask.numel())


def _formats(plan: str) -> str:
    """``csr`` of ``linear: cpu/csr (why)``."""
    return plan.split(" (")[0].partition(": ")[2].partition("/")[2]
