"""`torch.topk` of the scores inside the mask, scattered into a new mask: exactly k per ticket."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import PruneProblem

NAME = "torch.topk"


def prune(problem: PruneProblem) -> Contender:
    """All tickets at once."""
    mask, scores, kept = problem.mask, problem.scores, problem.kept

    def run() -> Tensor:
        best = torch.where(mask, scores, -1.0).topk(kept, dim=1, sorted=False).indices
        return torch.zeros_like(mask).scatter_(1, best, True)

    return problem.contender(NAME, run)
