"""What was found out about masks, kept until a mask goes away, with the version it is true of."""

from __future__ import annotations

import threading
import weakref
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_Found = TypeVar("_Found")


class _Entry(NamedTuple, Generic[_Found]):
    """No reference to the mask, or it would never go away."""

    owner: weakref.ref
    version: int
    found: _Found


class KnownMasks(Generic[_Found]):
    """By identity of the tensor that owns the memory, and the view of it. Thread-safe.

    A write through ``mask.data`` moves no version and stays unseen.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple, _Entry[_Found]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, mask: Tensor) -> tuple[_Found, bool] | None:
        """What was kept of this mask, and whether nobody wrote the mask since."""
        owner = _owner(mask)
        entry = self._entries.get(_key(owner, mask))
        if entry is None or entry.owner() is not owner:
            return None
        return entry.found, entry.version == owner._version

    def keep(self, mask: Tensor, version: int, found: _Found) -> None:
        """Keep what was found of a version of the mask."""
        owner = _owner(mask)
        key = _key(owner, mask)

        def forget(gone: weakref.ref) -> None:
            # The identity may belong to a newer tensor by now.
            current = self._entries.get(key)
            if current is not None and current.owner is gone:
                self._entries.pop(key, None)

        with self._lock:
            self._entries[key] = _Entry(weakref.ref(owner, forget), version, found)


def take_snapshot(mask: Tensor) -> Tensor:
    """A contiguous copy of a mask, which nobody writes any more."""
    # Not `clone`: memory that nobody initialised holds other bytes than 0 and 1.
    return mask.detach().contiguous().view(torch.uint8) != 0


def _owner(mask: Tensor) -> Tensor:
    return mask if mask._base is None else mask._base


def _key(owner: Tensor, mask: Tensor) -> tuple:
    return id(owner), mask.storage_offset(), mask.shape, mask.stride()
