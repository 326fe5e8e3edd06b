"""What the subject of a case must do at least, from the ops' own `Cost`s and the plan that ran."""

from __future__ import annotations

from sparse_tickets.kernels.cost import Cost

from .problems import LinearProblem, PolicyProblem

__all__ = ["linear_cost", "policy_cost"]


def linear_cost(problem: LinearProblem, plan: str, *, training: bool) -> Cost | None:
    """Of all tickets of a layer in the format that ``plan`` names."""
    return None


def policy_cost(problem: PolicyProblem, plan: str) -> Cost | None:
    """Of all tickets' networks forward and backward, layers in the formats ``plan`` names."""
    return None
