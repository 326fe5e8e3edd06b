"""One layer made sparse or dense where it is: its class changes, what refers to it stays valid."""

from __future__ import annotations

from typing import cast

from torch import nn

from sparse_tickets.hooks import untrack
from sparse_tickets.linear import SparseLinear

__all__ = ["make_dense_", "make_sparse_"]


def make_sparse_(linear: nn.Linear) -> SparseLinear:
    """Turn this very ``nn.Linear`` into a `SparseLinear` with nothing pruned.

    Its class changes, not its identity, so every name, hook and optimiser that refers to it or to
    its Parameters stays valid. The caller has checked that its class is ``nn.Linear`` and that
    its weight is a Parameter.
    """
    linear.__class__ = SparseLinear
    sparse = cast(SparseLinear, linear)
    sparse._attach_mask(None)
    return sparse


def make_dense_(layer: SparseLinear) -> nn.Linear:
    """Turn this very layer into a plain ``nn.Linear`` whose pruned weights are zero, but free."""
    layer.apply_mask_()
    untrack(layer)
    del layer.mask
    layer.__dict__.pop("_prepared", None)
    dense = cast(nn.Linear, layer)
    dense.__class__ = nn.Linear
    return dense
