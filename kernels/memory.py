"""Memory that an op writes: nobody else's (`check_separate`), and autograd hears of it.

And what a function does to it that a module is cast by (`loses_values`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor


def check_separate(
    written: Mapping[str, Tensor], read: Mapping[str, Tensor | None] | None = None
) -> None:
    """Raise ``ValueError`` if a tensor that is written shares memory with any other.

    Of a strided tensor everything from its first to its last entry counts as its memory. Those
    only read may share theirs with one another.
    """
    spans = sorted((*_span(tensor), name) for name, tensor in written.items() if tensor.numel())
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{other} must not share memory with {one}")
    for name, tensor in (read or {}).items():
        if tensor is None or not tensor.numel():
            continue
        low, high = _span(tensor)
        for begin, end, other in spans:
            if low < end and begin < high:
                raise ValueError(f"{name} must not share memory with {other}")


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd, which does not see below the dispatcher, that these were written."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * tensor.itemsize


def loses_values(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether a function of tensors gives others back, as ``to_empty`` does.

    Asked with bits that nobody could have left in memory before, and that any dtype holds.
    """
    probe = torch.frombuffer(bytearray(os.urandom(256)), dtype=torch.uint8).to(device) & 1
    with torch.no_grad():
        return not torch.equal(fn(probe.clone()).to(probe), probe)
