"""What keeps pruned weights at zero whatever optimiser steps them: one hook for the whole process.

After a step the hook looks up the optimiser's own parameters and visits the sparse layers among
them, so an optimiser without any pays 50 ns a parameter, however many layers the process has.
Layers and optimisers are referred to weakly.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from sparse_tickets.linear import SparseLinear

__all__ = [
    "count_changes",
    "follow",
    "is_kept",
    "keep_",
    "keep_owned_",
    "keep_state_",
    "stepped_optimizers",
    "track",
    "untrack",
]

_owners: dict[int, WeakSet[SparseLinear]] = {}
"""Layers by the identity of their weight; an entry may be out of date, so whoever asks looks."""
_sweep_at = 64
_BLOCK = 1 << 18
"""Elements of a matrix that are looked at together on a CPU."""
_changes = 0
_optimizers: WeakSet[Optimizer] = WeakSet()
_hook: RemovableHandle | None = None
_lock = Lock()


def track(layer: SparseLinear) -> None:
    """Put a layer, with the weight it has now, under the hook; the first one registers it."""
    global _hook, _sweep_at, _changes
    weight = layer._parameters.get("weight")
    with _lock:
        _changes += 1
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_any_step)
        if weight is None:
            return
        _owners.setdefault(id(weight), WeakSet()).add(layer)
        if len(_owners) > _sweep_at:
            for key in [key for key, layers in _owners.items() if not layers]:
                del _owners[key]
            _sweep_at = 2 * len(_owners) + 64


def untrack(layer: SparseLinear) -> None:
    """Leave a layer's weight to its optimisers."""
    global _changes
    with _lock:
        _changes += 1
        owners = _owners.get(id(layer._parameters.get("weight")))
        if owners is not None:
            owners.discard(layer)


def stepped_optimizers() -> tuple[Optimizer, ...]:
    """The optimisers that have stepped a sparse layer and still exist."""
    with _lock:
        return tuple(_optimizers)


def count_changes() -> int:
    """How often a layer came under the hook or left it so far."""
    return _changes


def follow(optimizer: Optimizer) -> dict[int, list[SparseLinear]]:
    """The sparse layers on each weight that an optimiser owns, by the weight's identity.

    From now on its state is zeroed where a mask prunes, as if it had stepped them.
    """
    params = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    found: dict[int, list[SparseLinear]] = {}
    with _lock:
        for at, weight in params.items():
            layers = [
                layer
                for layer in _owners.get(at, ())
                if layer._parameters.get("weight") is weight
                and layer._buffers.get("mask") is not None
            ]
            if layers:
                found[at] = layers
        if found:
            _optimizers.add(optimizer)
    return found


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The global hook; an optimiser that ``keeps_masks`` has done its work."""
    if not getattr(optimizer, "keeps_masks", False):
        keep_owned_(optimizer)


def keep_owned_(optimizer: Optimizer) -> None:
    """Zero what a step did to the pruned weights of its own layers, and to their state."""
    owned = [
        (weight, _owners[id(weight)])
        for group in optimizer.param_groups
        for weight in group["params"]
        if id(weight) in _owners
    ]
    if owned:
        _keep_owned_(optimizer, owned)


@torch.no_grad()
def _keep_owned_(optimizer: Optimizer, owned: list[tuple[Tensor, WeakSet[SparseLinear]]]) -> None:
    # Rows of value, mask and count for one pass over all that lies plainly on the CPU.
    table = array("q")
    for weight, owners in owned:
        with _lock:
            layers = tuple(owners)
        for layer in layers:
            mask = layer._buffers.get("mask")
            if mask is None or layer._parameters.get("weight") is not weight:
                continue
            with _lock:
                _optimizers.add(optimizer)
            if layer.is_dense():
                continue
            shape = weight.shape
            state = optimizer.state.get(weight, {})
            plain = _is_plain(mask, torch.bool) and mask.shape == shape
            for value in (weight, *state.values()):
                if not isinstance(value, Tensor) or value.shape != shape:
                    continue
                if plain and _is_plain(value, torch.float32):
                    table.extend((value.data_ptr(), mask.data_ptr(), mask.numel()))
                else:
                    keep_(value, mask)
    if table:
        from sparse_tickets.kernels.linear.masking import keep_all

        keep_all(table.buffer_info()[0], len(table) // 3)


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Parameter, Tensor)
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_(tensor: Tensor, mask: Tensor) -> None:
    """Zero ``tensor`` off the mask, in place, whatever lay there: NaN as well.

    On a CPU the bitwise product is 20 times as fast as ``masked_fill`` on an irregular mask.
    """
    integer = _INTEGER[tensor.element_size()]
    for part, kept in _rows(tensor, mask):
        part.view(integer).bitwise_and_(kept.to(integer).neg_())


def is_kept(tensor: Tensor, mask: Tensor) -> bool:
    """Whether ``tensor`` is zero off the mask."""
    parts = _rows(tensor, mask)
    return not any(part.masked_fill(kept, 0).count_nonzero() for part, kept in parts)


def _rows(tensor: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both by blocks of rows: what is made of a block needs little memory beside the whole."""
    height = max(1, _BLOCK // max(1, mask.shape[1])) if mask.is_cpu else max(1, mask.shape[0])
    return zip(tensor.split(height), mask.split(height), strict=True)


def keep_state_(optimizer: Optimizer, weight: Tensor, mask: Tensor) -> None:
    """Zero an optimiser's state for pruned weights: its tensors of the weight's shape."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            keep_(value, mask)
