"""What acting must compute and move: networks and physics.

The few operations of a draw are left out, and so are restarts, whose number depends on the
policies.
"""

from __future__ import annotations

from itertools import pairwise

from ..arena import Arena, Net
from ..cost import Cost
from ..dynamics import Task, cost

__all__ = ["evaluate", "forward", "rollout"]


def forward(net: Net) -> float:
    """Operations of one observation's way through a network; an activation is one."""
    products = sum(2 * inp * out for inp, out in pairwise(net.sizes))
    return products + sum(net.sizes[1:-1])


def rollout(arena: Arena, task: Task, tickets: int, steps: int, copies: int) -> Cost:
    """A rollout that nothing truncates: T steps, each observation valued once.

    Parameters are read once, states and observations once in and once out; of each step
    observation, action, log-probability, reward, two flags and, with a critic, two values are kept.
    """
    lanes, samples = tickets * copies, tickets * steps * copies
    action = 8 if task.discrete else 4 * task.action_dim
    flops = samples * (forward(arena.actor) + _physics(task))
    kept = 4 * task.observation_dim + action + 4 + 4 + 2
    if arena.critic is not None:
        flops += (samples + lanes) * forward(arena.critic)
        kept += 4 + 4
    carried = 2 * (8 * task.state_dim + 4 * task.observation_dim + 4)
    weights = 4 * sum(_parameters(net) for net in arena.nets)
    if arena.log_std is not None:
        weights += 4 * arena.actor.sizes[-1]
    return Cost(flops, tickets * weights + lanes * carried + samples * kept)


def evaluate(arena: Arena, task: Task, tickets: int, copies: int, length: float) -> Cost:
    """One episode of ``length`` steps in every copy: the actor in, one return out."""
    lanes = tickets * copies
    flops = lanes * length * (forward(arena.actor) + _physics(task))
    return Cost(flops, 4 * tickets * _parameters(arena.actor) + 4 * lanes)


def _physics(task: Task) -> float:
    """Operations of one copy's step and its scaled observation."""
    return cost.step(task, 1).flops + cost.observe(task, 1).flops + 2 * task.observation_dim


def _parameters(net: Net) -> int:
    return sum((inp + 1) * out for inp, out in pairwise(net.sizes))
