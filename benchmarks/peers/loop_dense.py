"""One policy after the other as plain `F.linear` calls: a population without batching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_tickets.timing import Contender, mismatch

from ..problems import PolicyProblem

__all__ = ["NAME", "policy"]

NAME = "loop of torch dense"


def policy(problem: PolicyProblem) -> Contender:
    """Each ticket forward and backward by itself."""
    activation = torch.tanh if problem.activation == "tanh" else torch.relu
    stacked = problem.layers()
    policies = [
        [leaf[ticket].detach().clone().requires_grad_() for w, b, _ in stacked for leaf in (w, b)]
        for ticket in range(problem.tickets)
    ]

    def run() -> list[tuple[Tensor, ...]]:
        results = []
        for leaves, x, dy in zip(policies, problem.x, problem.dy, strict=True):
            y = x
            for layer in range(0, len(leaves), 2):
                y = F.linear(y, leaves[layer], leaves[layer + 1])
                if layer < len(leaves) - 2:
                    y = activation(y)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        return results

    def error() -> float:
        y, *gradients = (torch.stack(field) for field in zip(*run(), strict=True))
        results = (y, problem.gather(gradients))
        return mismatch(results, problem.forward_backward, problem.terms)

    return Contender(NAME, run, error)
