"""Exact-k pruning as plain torch: sort stably by score, keep the first k inside the mask."""

from __future__ import annotations

import torch
from torch import Tensor


def prune(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool = False) -> Tensor:
    scores = scores.abs() if magnitude else scores
    order = scores.argsort(dim=1, descending=True, stable=True)
    # A second stable sort puts the pruned last, where no score can move them.
    inside = mask.gather(1, order).to(torch.uint8)
    order = order.gather(1, inside.argsort(dim=1, descending=True, stable=True))
    count = torch.minimum(k, mask.sum(dim=1))
    first = torch.arange(mask.shape[1], device=mask.device) < count[:, None]
    return torch.zeros_like(mask).scatter(1, order, first)
