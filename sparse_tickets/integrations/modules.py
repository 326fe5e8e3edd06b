"""What policies of Stable-Baselines3 need of modules that are not ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["detach_constants", "is_batch_renorm", "set_mode"]


def set_mode(module: nn.Module, mode: bool) -> None:
    """``module.train(mode)``, past the checks of ``nn.Module.__setattr__`` where it is that."""
    module.__dict__["training"] = mode
    for child in module._modules.values():
        if child is None:
            continue
        kind = type(child)
        if kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__:
            set_mode(child, mode)
        else:
            child.train(mode)


def is_batch_renorm(module: nn.Module) -> bool:
    """CrossQ's normalisation, by name: sb3-contrib need not be installed."""
    return any(kind.__name__ == "BatchRenorm" for kind in type(module).__mro__)


def detach_constants(norm: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
    """Keep gradients from what is constant over a batch, as a unit whose inputs are all pruned.

    In training a shift of it changes no output, but the root of its variance has no derivative:
    the gradient that is zero came out as NaN, and went into the unit's bias.
    """
    (x,) = inputs
    return torch.where((x == x[:1]).all(0), x.detach(), x) if norm.training else None
