"""SAC's updates on a GPU: the networks' passes and Adam in Triton, the losses in torch between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..arena import Net
from ..mlp import mlp
from ..training import Update
from ..transitions import Transitions
from . import reference

if TYPE_CHECKING:
    from . import SACConfig


def sac_update_(
    update: Update[SACConfig], target: Tensor, replay: Transitions, stored: int
) -> Tensor:
    """Statistics ``[5, P]``; see the op."""

    def network(x: Tensor, weight: Tensor, net: Net, mask: Tensor) -> Tensor:
        return mlp(x, weight, net, mask, density=update.density)

    return reference.sac_update_(update, target, replay, stored, network=network)
