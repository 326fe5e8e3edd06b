"""Memory of large results, used again once nobody holds a result in it.

The C library gives a freed result of megabytes back to the system, and the next one is made of
fresh pages: 0.3 ms for 2 MB on the machine this was measured on, three times a product at 99%
sparsity. So a few such buffers are kept here. A tensor made of a NumPy array owns a reference to
it for as long as its storage lives, whoever holds that, views and autograd's saved tensors
included: an array without other references is free.
"""

from __future__ import annotations

import math
from collections import deque
from sys import getrefcount

import numpy as np
import torch
from torch import Tensor

from ..vector import aligned_empty

_LARGE = 1 << 16
"""Elements from which a result is worth keeping: smaller ones stay in the C library's heap."""

_MOST_BUFFERS, _MOST_ELEMENTS = 16, 1 << 24
"""What is kept at most, 64 MB; the longest unused goes first."""

# Taken out while looked at, so that two threads never look at the same one.
_buffers: deque[np.ndarray] = deque()


def is_small(size: int) -> bool:
    """Whether memory for so many elements is not kept."""
    return size < _LARGE


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 CPU tensor of this shape."""
    size = math.prod(shape)
    if not _LARGE <= size <= _MOST_ELEMENTS:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    buffer = _take(size)
    if buffer is None:
        buffer = aligned_empty(size)
        _drop_oldest(size)
    _buffers.append(buffer)
    return torch.from_numpy(buffer.reshape(shape))


def _take(size: int) -> np.ndarray | None:
    """A kept buffer of this size that nobody uses, taken out."""
    for _ in range(len(_buffers)):
        try:
            buffer = _buffers.popleft()
        except IndexError:
            break
        # One reference is this function's, one the question's.
        if buffer.size == size and getrefcount(buffer) == 2:
            return buffer
        _buffers.append(buffer)
    return None


def _drop_oldest(size: int) -> None:
    """Make room for a buffer of this size."""
    kept = list(_buffers)
    while len(kept) >= _MOST_BUFFERS or sum(b.size for b in kept) + size > _MOST_ELEMENTS:
        try:
            _buffers.popleft()
        except IndexError:
            return
        kept.pop(0)
