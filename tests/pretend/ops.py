"""ATen's ops on the pretended device: computed on the host, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import host
from .faults import DeviceFault, capture, wait

__all__ = ["to_host"]

_WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
}
_INDEXES = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}


def to_host(tensor: Tensor) -> Tensor:
    """The same memory as a host tensor."""
    return host.to_host(tensor) if tensor.is_cuda else tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch calls for every op that has no implementation of its own on the device."""
    _check(op, args, kwargs)
    args = _with_tensors(op, args)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    written = _tensors(_written(op, args, kwargs))

    # An empty output may be given another size, for which the host needs memory of its own.
    outgrown: list[tuple[Tensor, Tensor]] = []

    def on_host(tensor: Tensor) -> Tensor:
        if tensor.is_cuda and tensor.numel() == 0 and any(tensor is other for other in written):
            outgrown.append((tensor, torch.empty(tensor.shape, dtype=tensor.dtype)))
            return outgrown[-1][1]
        return to_host(tensor)

    inputs = tree_map_only(Tensor, on_host, (args, kwargs))
    with torch.no_grad():
        if capture and not _is_view(op):
            outputs = _foretell(op, inputs, [mine for _, mine in outgrown])
            capture[-1].steps.append(_step(op, inputs, _tensors(outputs)))
        else:
            outputs = op(*inputs[0], **inputs[1])
    for tensor, mine in outgrown:
        if mine.shape != tensor.shape:
            host.adopt(tensor, mine)
    return _results(op, args, kwargs, outputs)


def _check(op: Any, args: Any, kwargs: Any) -> None:
    """Refuse what mixes devices, and note what waits."""
    name = op.name()
    if name == "aten::copy_":
        target, source = args[:2]
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if not target.is_cuda:
            wait("a copy to the host")
        elif not source.is_cuda and waits:
            wait("a copy from the host")
        return
    if name in _WAITS:
        wait(name)
    if name in _INDEXES:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                wait(f"{name} with a mask")
            if index is not None and not index.is_cuda:
                wait(f"{name} with an index on the host")
        return
    places = [
        tensor.device for tensor in _tensors((args, kwargs)) if tensor.is_cuda or tensor.dim()
    ]
    if len(set(places)) > 1:
        raise DeviceFault(f"{name}: all tensors must be on the same device, got {places}")


def _with_tensors(op: Any, args: Any) -> tuple[Any, ...]:
    """Numbers that torch handed to the op as tensors arrive as numbers: make them tensors again."""
    floats = [tensor.dtype for tensor in _tensors(args) if tensor.is_floating_point()]
    result = list(args)
    for place, argument in enumerate(op._schema.arguments[: len(args)]):
        value = args[place]
        if isinstance(value, (int, float)) and str(argument.type) == "Tensor":
            dtype = floats[0] if isinstance(value, float) and floats else None
            result[place] = torch.tensor(value, dtype=dtype)
    return tuple(result)


def _written(op: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes."""
    return [
        args[place] if place < len(args) and not argument.kwarg_only else kwargs[argument.name]
        for place, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _is_view(op: Any) -> bool:
    """Whether an op only looks at its input in another way."""
    returns = [result.alias_info for result in op._schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


def _foretell(op: Any, inputs: Any, outgrown: list[Tensor]) -> Any:
    """What an op would return, without a number in it, as when a graph is captured."""

    def shape(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, shape, inputs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    outputs = op(*args, **kwargs)
    given = tree_leaves(inputs)
    for tensor in outgrown:
        place = next(number for number, leaf in enumerate(given) if leaf is tensor)
        foretold = tree_leaves((args, kwargs))[place]
        tensor.resize_(foretold.shape).as_strided_(foretold.shape, foretold.stride())
    return tree_map_only(Tensor, _poisoned, outputs)


def _poisoned(like: Tensor) -> Tensor:
    result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    if result.is_floating_point():
        result.fill_(float("nan"))
    return result


def _step(op: Any, inputs: Any, outputs: list[Tensor]) -> Callable[[], None]:
    """What a replay does in an op's place: what it writes stays where the capture saw it."""
    keep = [] if _writes_all(op) else outputs

    def step() -> None:
        results = _tensors(op(*inputs[0], **inputs[1]))
        for place, result in zip(keep, results, strict=bool(keep)):
            place.copy_(result)

    return step


def _writes_all(op: Any) -> bool:
    """Whether an op returns nothing but arguments that it wrote."""
    returns = [result.alias_info for result in op._schema.returns]
    return all(info is not None and info.is_write for info in returns)


def _results(op: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
    """The outputs on the device; of what was written, the arguments themselves."""
    returns = op._schema.returns
    written = iter(_written(op, args, kwargs))
    results = [
        next(written)
        if result.alias_info is not None and result.alias_info.is_write
        else tree_map_only(Tensor, host.to_device, output)
        for result, output in zip(
            returns, outputs if len(returns) > 1 else (outputs,), strict=False
        )
    ]
    if not returns:
        return None
    return results[0] if len(returns) == 1 else tuple(results)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return _compute(torch.ops.aten.copy_.default, target, source, non_blocking)


_everything = torch.library.Library("_", "IMPL")
_everything.fallback(_compute, "CUDA")
# ATen's own asks the device how to copy before it comes here.
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("copy_", _copy, "CUDA")
