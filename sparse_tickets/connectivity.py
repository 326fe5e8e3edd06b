"""What a mask leaves connected: which weights, inputs, units and actions lie on a path.

At high sparsity a mask drawn at random disconnects the policy long before its last weight is gone:
nominal density then says little, effective density says what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .kernels.arena import Arena
from .kernels.errors import check_dtype, check_shape
from .linear import SparseLinear

__all__ = ["Connectivity", "connectivity", "find_cuts", "flatten", "live_inputs"]


class Connectivity(NamedTuple):
    """How the actors of a population are connected from observation to action.

    Attributes:
        effective_density: ``[P]`` float64, weights on an input-output path, over all its weights.
        has_path: ``[P]`` bool, whether any action depends on any input.
        dead_inputs: ``[P]`` int64, inputs without a path to any action.
        dead_units: ``[P]`` int64, hidden units without a path in or without a path out.
        reachable_actions: ``[P]`` int64, actions with a path from some input.
    """

    effective_density: Tensor
    has_path: Tensor
    dead_inputs: Tensor
    dead_units: Tensor
    reachable_actions: Tensor


def connectivity(mask: Tensor, arena: Arena) -> Connectivity:
    """Follow the actor's masks forwards from the inputs and backwards from the actions.

    Where a residual network adds a block's input to its output, a path goes around the block. That
    LayerNorm lets every unit of a layer tell on all others makes no path.

    Args:
        mask: ``[P, N]`` bool.
        arena: the layout; a critic under the mask is left out.

    Raises:
        ValueError: the mask has a wrong shape.
        TypeError: the mask is not bool.
    """
    alive, edges = _alive(mask, arena)
    tickets = mask.shape[0]
    on_path = torch.zeros(tickets, dtype=torch.int64, device=mask.device)
    for layer, edge in enumerate(edges):
        through = (edge > 0) & alive[layer + 1][:, :, None] & alive[layer][:, None, :]
        on_path += through.sum(dim=(1, 2))
    dead = [(~units).sum(dim=1) for units in alive]
    total = sum(edge[0].numel() for edge in edges) if tickets else 1
    return Connectivity(
        effective_density=on_path.double() / total,
        has_path=alive[-1].any(dim=1),
        dead_inputs=dead[0],
        dead_units=torch.stack([torch.zeros_like(on_path), *dead[1:-1]]).sum(dim=0),
        reachable_actions=alive[-1].sum(dim=1),
    )


def live_inputs(mask: Tensor, arena: Arena) -> Tensor:
    """Which inputs ``[P, features]`` have a path to an action, as `connectivity` follows it.

    Args:
        mask: ``[P, N]`` bool.
        arena: the layout.

    Raises:
        ValueError: the mask has a wrong shape.
        TypeError: the mask is not bool.
    """
    return _alive(mask, arena)[0][0]


def _alive(mask: Tensor, arena: Arena) -> tuple[list[Tensor], list[Tensor]]:
    """Units ``[P, units]`` on a path, inputs first; the layers' masks as float32."""
    check_shape("mask", mask, (mask.shape[0], arena.prunable))
    check_dtype("mask", mask, torch.bool)
    actor, tickets = arena.actor, mask.shape[0]
    # float32 products of zeros and ones: a positive sum means reachable, rounding cannot undo it.
    edges = [actor.weight(mask, layer).float() for layer in range(actor.depth)]

    def found(paths: Tensor, skip: Tensor | None) -> Tensor:
        return (paths if skip is None else paths + skip).gt(0).float()

    # Before layer 0, then after each.
    reached = [torch.ones(tickets, actor.sizes[0], 1, dtype=torch.float32, device=mask.device)]
    for layer, edge in enumerate(edges):
        skipped = actor.adds(layer)
        reached.append(found(edge @ reached[-1], None if skipped is None else reached[skipped + 1]))
    useful = [torch.ones(tickets, actor.sizes[-1], 1, dtype=torch.float32, device=mask.device)]
    readers = {actor.adds(layer): layer for layer in range(actor.depth)}
    for layer, edge in reversed(list(enumerate(edges))):
        reader = readers.get(layer - 1)
        skip = None if reader is None else useful[reader - layer]
        useful.insert(0, found(edge.mT @ useful[0], skip))

    alive = [(a * b).squeeze(2) > 0 for a, b in zip(reached, useful, strict=True)]
    return alive, edges


def find_cuts(module: nn.Module, elementwise: Collection[type[nn.Module]]) -> list[str]:
    """Where the masks of any module cut its outputs off from its inputs, in words.

    A module does not say what feeds what. Within an ``nn.Sequential`` a layer reads the one before;
    elsewhere it may read every earlier layer of its width that ends a sequence, and is taken to be
    cut off only if it is from all of them. An output layer is one whose width no later layer reads.

    Args:
        module: any module.
        elementwise: classes of activations; after another module of a sequence nothing is known.

    Returns:
        One phrase for each layer that keeps nothing or that no path reaches, unless an earlier
        layer is the cause, and for each output layer with rows that depend on no input.
    """
    layers = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    before = dict(_sequences(module, elementwise))
    order = list(layers)
    reached: dict[nn.Linear, Tensor] = {}
    cuts = []
    for index, layer in enumerate(order):
        source = _source(layer, order[:index], before, reached)
        rows = _reach(layer, source)
        reached[layer] = rows
        if not isinstance(layer, SparseLinear) or not layer.mask.numel():
            continue
        if not rows.any():
            if not layer.mask.any():
                cuts.append(f"layer {layers[layer]!r} keeps none of its weights")
            elif source is not None and source.any():
                cuts.append(f"no path reaches through layer {layers[layer]!r}")
            continue
        is_read = layer in before.values() or any(
            later.in_features == layer.out_features for later in order[index + 1 :]
        )
        dead = (~rows).nonzero().flatten().tolist()
        if dead and not is_read:
            shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
            cuts.append(f"rows {shown} of output layer {layers[layer]!r} depend on no input")
    return cuts


def _source(
    layer: nn.Linear,
    earlier: list[nn.Linear],
    before: dict[nn.Linear, nn.Linear | None],
    reached: dict[nn.Linear, Tensor],
) -> Tensor | None:
    """Which of a layer's inputs may depend on the module's; None where all may."""
    if layer in before:
        known = before[layer]
        # Not reached yet is one that is registered later, or the layer itself, used twice.
        return None if known is None else reached.get(known)
    inner = set(before.values())
    ends = [
        reached[other]
        for other in earlier
        if other not in inner and other.out_features == layer.in_features
    ]
    return torch.stack(ends).any(0) if ends else None


def _reach(layer: nn.Linear, source: Tensor | None) -> Tensor:
    """Which outputs depend on an input that may depend on the module's, on the CPU."""
    if not isinstance(layer, SparseLinear):
        alive = source is None or bool(source.any())
        return torch.full((layer.out_features,), alive, dtype=torch.bool, device="cpu")
    edges = layer.mask if source is None else layer.mask & source.to(layer.mask.device)
    return edges.any(1).cpu()


def _sequences(
    module: nn.Module, elementwise: Collection[type[nn.Module]]
) -> Iterator[tuple[nn.Linear, nn.Linear | None]]:
    """Each linear layer after the first of an ``nn.Sequential``, and what it reads, if known."""
    for sequence in module.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        steps = [step for step in flatten(sequence) if type(step) not in elementwise]
        for left, right in pairwise(steps):
            if isinstance(right, nn.Linear):
                known = isinstance(left, nn.Linear) and left.out_features == right.in_features
                yield right, left if known and isinstance(left, nn.Linear) else None


def flatten(sequence: nn.Sequential) -> Iterator[nn.Module]:
    """What a sequence runs one after the other, sequences within it taken apart."""
    for step in sequence:
        if isinstance(step, nn.Sequential):
            yield from flatten(step)
        else:
            yield step
