"""The linear layer of a population in plain torch: the formulas every backend is compared with.

The weight is zero off the mask already, so only the weight's gradient needs the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y = x wᵀ + b``: ``[P, B, I], [P, O, I], [P, O] -> [P, B, O]``."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def linear_dx(dy: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """``dx = dy w``: ``[P, B, O], [P, O, I] -> [P, B, I]``."""
    return torch.bmm(dy, weight)


def linear_dw(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``dw = mask ∘ dyᵀ x``: ``[P, B, O], [P, B, I], [P, O, I] -> [P, O, I]``."""
    dense = torch.bmm(dy.mT, x)
    return dense if mask is None else dense.masked_fill(~mask, 0)
