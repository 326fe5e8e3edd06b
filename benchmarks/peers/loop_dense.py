"""One policy after the other as plain `F.linear` calls: a population without batching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import PolicyProblem

NAME = "loop of torch dense"


def policy(problem: PolicyProblem) -> Contender:
    """Each ticket forward and backward by itself."""
    stacked, activate = problem.layers(), problem.activate
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
                    y = activate(y)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        return results

    def stack(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        y, *gradients = (torch.stack(field) for field in zip(*results, strict=True))
        return y, problem.gather(gradients)

    return problem.contender(NAME, run, stack)
