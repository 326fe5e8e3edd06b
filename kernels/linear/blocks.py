"""Masks made of full blocks, as the GPU walks them: `block_pattern`, kept per mask version.

Whether a mask is made of full blocks is in its values, and asking a GPU for values waits for it. So
nobody asks uninvited: `block_pattern` waits once, and from then on `find_blocks` knows that mask by
its identity and version and waits again only after somebody wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import check_data, check_dtype
from .known import KnownMasks

BLOCK_SIZES = (16, 32, 64)
"""Sizes of square blocks: what a tensor core takes at least, up to one output tile."""


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which blocks of ``mask [P, O, I]`` are kept, listed by block row and by block column.

    Every list has room for all blocks of its row, and names the pruned ones after the kept ones: no
    size depends on how many are kept, and nothing but the check for full blocks waits for a GPU.

    Attributes:
        mask: ``[P, O, I]`` bool, constant on every block.
        block: size of the square blocks.
        table: ``[P, O/block + I/block, 1 + max(O, I)/block]`` int32. First the block rows, then the
            block columns. Entry 0 counts the kept blocks; their indices follow, ascending, then
            those of the pruned ones.
        version: of the mask that was read; None if it has none (an inference tensor).
    """

    mask: Tensor
    block: int
    table: Tensor
    version: int | None


# The size of the blocks and their table; None once a mask has no such blocks any more.
_known: KnownMasks[tuple[int, Tensor | None]] = KnownMasks()


def block_pattern(mask: Tensor, block: int) -> BlockPattern:
    """The blocks of a mask; also makes `linear` run blocked on this mask on a GPU.

    Waits for the device, as does the first `linear` after each write to the mask (so write it, and
    run once, before capturing a CUDA graph). That call looks for blocks of the same size again; a
    mask that has lost them runs as any other. A write through ``mask.data`` stays unseen.

    Args:
        mask: ``[P, O, I]`` bool, or ``[O, I]`` for one ticket; True where a weight is kept.
        block: 16, 32 or 64.

    Returns:
        The pattern, for `linear_blocked`.

    Raises:
        TypeError: the mask is not bool.
        ValueError: another block size; a shape that it does not divide; or a mask that is not
            constant on every block.
    """
    if block not in BLOCK_SIZES:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block}")
    if mask.dim() not in (2, 3):
        raise ValueError(f"mask must have shape (P, O, I) or (O, I), got {tuple(mask.shape)}")
    check_dtype("mask", mask, torch.bool)
    check_data("mask", mask)
    mask = mask[None] if mask.dim() == 2 else mask
    table = _build(mask, block)
    if table is None:
        ticket, row, column = _first_mixed(mask, block)
        raise ValueError(
            f"mask must keep or prune every {block} x {block} block whole, got a mixed one at "
            f"row {row * block}, column {column * block} of ticket {ticket}"
        )
    if mask.is_inference():
        return BlockPattern(mask, block, table, None)
    _known.keep(mask, mask._version, (block, table))
    return BlockPattern(mask, block, table, mask._version)


def find_blocks(mask: Tensor) -> BlockPattern | None:
    """The pattern of a mask that `block_pattern` was asked for, if it still is made of blocks.

    Waits for the device only if the mask was written since it was last asked for.
    """
    if not len(_known) or mask.is_inference():
        return None
    known = _known.find(mask)
    if known is None:
        return None
    (block, table), current = known
    if not current:
        table = _build(mask, block)
        _known.keep(mask, mask._version, (block, table))
    return None if table is None else BlockPattern(mask, block, table, mask._version)


def table_shape(tickets: int, out: int, inp: int, block: int) -> tuple[int, ...]:
    """Of `BlockPattern.table`.

    Raises:
        ValueError: the block does not divide the mask.
    """
    if out % block or inp % block:
        raise ValueError(f"mask must be multiples of block={block} wide, got {out} x {inp}")
    rows, columns = out // block, inp // block
    return tickets, rows + columns, 1 + max(rows, columns)


def _split(mask: Tensor, block: int) -> Tensor:
    """``[P, O, I] -> [P, O/block, I/block, block, block]``."""
    return mask.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)


def _build(mask: Tensor, block: int) -> Tensor | None:
    """See `BlockPattern.table`; None if a block is neither kept nor pruned whole."""
    tickets, out, inp = mask.shape
    table = mask.new_zeros(table_shape(tickets, out, inp, block), dtype=torch.int32)
    if not mask.numel():
        return table
    rows = out // block
    blocks = _split(mask, block)
    kept = blocks.all((3, 4))
    if not torch.equal(kept, blocks.any((3, 4))):
        return None
    for lists, matrix in ((table[:, :rows], kept), (table[:, rows:], kept.mT)):
        lists[:, :, 0] = matrix.sum(2)
        order = (~matrix).to(torch.uint8).argsort(dim=2, stable=True)
        lists[:, :, 1 : 1 + matrix.shape[2]] = order
    return table


def _first_mixed(mask: Tensor, block: int) -> list[int]:
    """Ticket, block row and block column of the first block that is neither kept nor pruned."""
    blocks = _split(mask, block)
    mixed: list[int] = (blocks.all((3, 4)) != blocks.any((3, 4))).nonzero()[0].tolist()
    return mixed
