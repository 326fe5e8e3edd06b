"""Where a population's masks are True: compressed rows and columns, blocks, kept per mask version.

Building costs about a pass over the mask, so a pattern is remembered until its mask is written or
goes away. It is built from a copy of the mask, which another thread may be writing. A population's
mask is known by its version counter, which a write through ``mask.data`` does not move; one
layer's, by its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from .known import KnownMasks

__all__ = ["BLOCKS", "Compressed", "Pattern", "build_pattern", "find_pattern", "take_snapshot"]

BLOCKS = (64, 32, 16)
"""Sizes of square blocks looked for, largest first."""


class Compressed(NamedTuple):
    """Nonzeros of all tickets' rows: of row r those in ``begin[r]:begin[r + 1]``.

    Attributes:
        begin: ``[P * rows + 1]`` int64.
        column: ``[nonzeros]`` int32, within the row, ascending.
        position: ``[nonzeros]`` int64, in the flat weight.
    """

    begin: np.ndarray
    column: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Pattern:
    """The masks of a population.

    Attributes:
        out: O.
        inp: I.
        density: ``[P]`` float64, share of True entries.
        block: ``[P]`` int64, the largest of `BLOCKS` in whose full blocks the mask is made, or 0.
        rows: compressed by output, for all tickets.
        columns: compressed by input, for all tickets.
        snapshot: ``[P, O, I]`` bool, the mask that was read; contiguous, never written.
        choices: formats already chosen for this pattern, by whoever chooses.
    """

    out: int
    inp: int
    density: np.ndarray
    block: np.ndarray
    rows: Compressed
    columns: Compressed
    snapshot: Tensor
    choices: dict[Any, Any] = field(default_factory=dict)


@njit(cache=True, nogil=True)
def _compress(mask, tickets, rows, columns, row_stride, column_stride):
    """Compressed form of ``[P, rows, columns]`` read by strides of one ticket's matrix."""
    size = rows * columns
    begin = np.empty(tickets * rows + 1, np.int64)
    begin[0] = 0
    for p in range(tickets):
        for r in range(rows):
            count = 0
            for c in range(columns):
                count += mask[p * size + r * row_stride + c * column_stride]
            begin[p * rows + r + 1] = begin[p * rows + r] + count
    # One spare entry: the loop below writes ahead and then keeps or overwrites.
    column = np.empty(begin[-1] + 1, np.int32)
    position = np.empty(begin[-1] + 1, np.int64)
    j = 0
    for p in range(tickets):
        for r in range(rows):
            for c in range(columns):
                at = p * size + r * row_stride + c * column_stride
                column[j] = c
                position[j] = at
                j += mask[at]
    return begin, column[:j], position[:j]


@njit(cache=True, nogil=True)
def _is_blocked(mask, start, rows, columns, size):
    """Whether the mask is constant on every square block of this size."""
    if rows % size or columns % size:
        return False
    for r in range(rows):
        for c in range(columns):
            corner = start + r // size * size * columns + c // size * size
            if mask[start + r * columns + c] != mask[corner]:
                return False
    return True


_known: KnownMasks[Pattern] = KnownMasks()


def find_pattern(mask: Tensor) -> Pattern:
    """The pattern of ``mask [P, O, I]``, built where the mask is new or was written.

    Thread-safe: two threads may both build, and either result serves.
    """
    if mask.is_inference():
        return build_pattern(take_snapshot(mask))
    known = _known.find(mask)
    if known is not None and known[1]:
        pattern = known[0]
        if mask.shape[0] > 1 or torch.equal(pattern.snapshot, mask):
            return pattern
    version = mask._version
    pattern = build_pattern(take_snapshot(mask))
    _known.keep(mask, version, pattern)
    return pattern


def take_snapshot(mask: Tensor) -> Tensor:
    """A contiguous copy of a mask, which nobody writes any more."""
    # Not `clone`: memory that nobody initialised holds other bytes than 0 and 1.
    return mask.detach().contiguous().view(torch.uint8) != 0


def build_pattern(snapshot: Tensor) -> Pattern:
    """The pattern of a mask ``[P, O, I]`` that `take_snapshot` returned."""
    tickets, out, inp = snapshot.shape
    flat = snapshot.numpy().view(np.uint8).reshape(-1)
    rows = Compressed(*_compress(flat, tickets, out, inp, inp, 1))
    columns = Compressed(*_compress(flat, tickets, inp, out, 1, inp))
    counts = np.diff(rows.begin[:: max(out, 1)]) if tickets and out else np.zeros(tickets)
    block = np.array([find_block(each) for each in snapshot], np.int64)
    return Pattern(out, inp, counts / max(out * inp, 1), block, rows, columns, snapshot)


def find_block(snapshot: Tensor) -> int:
    """The largest of `BLOCKS` in whose full blocks a mask ``[O, I]`` of `take_snapshot` is made, or
    0."""
    out, inp = snapshot.shape
    flat = snapshot.numpy().view(np.uint8).reshape(-1)
    fitting = (size for size in BLOCKS if flat.size and _is_blocked(flat, 0, out, inp, size))
    return next(fitting, 0)
