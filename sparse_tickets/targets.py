"""Target networks: the masks of the network they follow, whatever prunes it and whenever."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from sparse_tickets.casting import make_sparse_
from sparse_tickets.linear import SparseLinear
from sparse_tickets.sequential import make_fused_

__all__ = ["tie_masks_"]


@torch.no_grad()
def tie_masks_(target: nn.Module, online: nn.Module) -> nn.Module:
    """Give a target network the masks of the online network, as the very same tensors.

    From then on who prunes the online network prunes the target, so an average of the two carries
    no pruned weight. Call it again after pruning, to zero at once what the target still holds off
    its masks (until then its layers leave it out as they read), and after moving either network
    to another device, which copies the masks.

    Args:
        target: a module built like ``online``, changed in place: where ``online`` has a
            `SparseLinear`, its ``nn.Linear`` becomes one, on the same Parameters, and sequences
            of them are run in one call, as by `sparsify_`.
        online: the module that is trained and pruned.

    Returns:
        The target.

    Raises:
        ValueError: a sparse layer of one has no linear layer of its shape, or a dense one, under
            that name in the other.

    Example:
        >>> online, target = nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.Linear(4, 8))
        >>> make_sparse_(online[0]).prune_(0.5).density
        0.5
        >>> tie_masks_(target, online)[0].density
        0.5
    """
    pairs = _pair(target, online)
    for follower, layer in pairs:
        sparse = follower if isinstance(follower, SparseLinear) else make_sparse_(follower)
        if layer.mask.device == sparse.weight.device:
            sparse.mask = layer.mask
        else:
            sparse.set_mask_(layer.mask)
        sparse.apply_mask_()
    make_fused_(target)
    return target


def _pair(target: nn.Module, online: nn.Module) -> list[tuple[nn.Linear, SparseLinear]]:
    """Layers of the same name, all checked before the first is changed."""
    followers = dict(target.named_modules())
    pairs = []
    for name, layer in online.named_modules():
        follower = followers.get(name)
        if not isinstance(layer, SparseLinear):
            if isinstance(follower, SparseLinear):
                raise ValueError(
                    f"layer {name!r} must be sparse in both networks or in neither, got it sparse "
                    "in target alone: sparsify_ the online network"
                )
            continue
        convertible = type(follower) is nn.Linear or isinstance(follower, SparseLinear)
        if not convertible or cast(nn.Linear, follower).weight.shape != layer.weight.shape:
            raise ValueError(
                f"target must hold an nn.Linear of shape {tuple(layer.weight.shape)} (out, in) "
                f"named {name!r} as online does, got {_describe(follower)}"
            )
        pairs.append((cast(nn.Linear, follower), layer))
    if not pairs:
        raise ValueError("online must hold a SparseLinear, got none: sparsify_ it first")
    return pairs


def _describe(module: nn.Module | None) -> str:
    if module is None:
        return "nothing"
    shape = f" of shape {tuple(module.weight.shape)}" if isinstance(module, nn.Linear) else ""
    return f"{type(module).__name__}{shape}"
