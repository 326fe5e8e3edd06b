"""SAC's updates on a GPU: the networks' passes and Adam in Triton, the losses in torch between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arena import Net
from ..mlp import mlp
from . import reference


def sac_update_(*arguments: Any) -> Tensor:
    """Statistics ``[5, P]``; see the op."""
    *_, density = arguments

    def network(x: Tensor, weight: Tensor, net: Net, mask: Tensor) -> Tensor:
        return mlp(x, weight, net, mask, density=density)

    return reference.sac_update_(*arguments, network=network)
