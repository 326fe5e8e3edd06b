"""Tiles of packed weights inside a Triton kernel: load one dense, or store the supported entries.

For any kernel that multiplies by packed weights; `layout` tells how these lie in memory. Pointers
come positioned at one ticket and one layer: ``bits`` at the layer's first byte (as ``*uint8``),
``start`` at its first tile, ``values`` at the ticket's first value. A tile's position depends on
nothing but its number, so grids do not depend on the nonzeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_packed_tile", "store_packed_tile"]


@triton.jit
def _find_octets(bits, start, tile, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr):
    """The bits of a tile, 8 columns an entry, and how many values of the ticket precede them.

    In one dimension: Triton 3.6 and 3.7 fail to turn joined two-dimensional loads into an operand.
    """
    OCTETS: tl.constexpr = TILE_OUT * TILE_IN // 8
    octet = tl.load(bits + tile * OCTETS + tl.arange(0, OCTETS)).to(tl.int32)
    ones = octet - ((octet >> 1) & 0x55)
    ones = (ones & 0x33) + ((ones >> 2) & 0x33)
    ones = (ones + (ones >> 4)) & 0xF
    return octet, tl.load(start + tile) + tl.cumsum(ones, 0) - ones


@triton.jit
def _interleave(e0, e1, e2, e3, e4, e5, e6, e7, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr):
    """``[TILE_OUT, TILE_IN]`` whose eight columns from 8c on are entry c of e0 ... e7."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [TILE_OUT, TILE_IN])


@triton.jit
def load_packed_tile(values, bits, start, tile, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr):
    """One tile ``[TILE_OUT, TILE_IN]`` of a layer, zero off the mask; ``tl.trans`` it at will.

    Args:
        values: pointer to the ticket's packed values; the tile has their dtype.
        bits: pointer to uint8, at the layer's first tile.
        start: pointer to int32, at the layer's first tile.
        tile: number of the tile in its layer, ``row_of_tiles * tiles_in + column_of_tiles``.
        TILE_OUT: the layer's `tile_out`.
        TILE_IN: the layer's `tile_in`.
    """
    octet, rank = _find_octets(bits, start, tile, TILE_OUT, TILE_IN)
    # Pointers that move on by a bit take fewer instructions than ranks made into addresses.
    b0 = octet & 1
    b1 = (octet >> 1) & 1
    b2 = (octet >> 2) & 1
    b3 = (octet >> 3) & 1
    b4 = (octet >> 4) & 1
    b5 = (octet >> 5) & 1
    b6 = (octet >> 6) & 1
    b7 = (octet >> 7) & 1
    p0 = values + rank
    p1 = p0 + b0
    p2 = p1 + b1
    p3 = p2 + b2
    p4 = p3 + b3
    p5 = p4 + b4
    p6 = p5 + b5
    p7 = p6 + b6
    return _interleave(
        tl.load(p0, mask=b0 != 0, other=0.0),
        tl.load(p1, mask=b1 != 0, other=0.0),
        tl.load(p2, mask=b2 != 0, other=0.0),
        tl.load(p3, mask=b3 != 0, other=0.0),
        tl.load(p4, mask=b4 != 0, other=0.0),
        tl.load(p5, mask=b5 != 0, other=0.0),
        tl.load(p6, mask=b6 != 0, other=0.0),
        tl.load(p7, mask=b7 != 0, other=0.0),
        TILE_OUT,
        TILE_IN,
    )


@triton.jit
def store_packed_tile(
    values, bits, start, tile, dense, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr
):
    """Store the supported entries of ``dense [TILE_OUT, TILE_IN]``; see `load_packed_tile`.

    Returns:
        ``dense`` as float32 or wider, zero off the mask, for whoever sums it up.
    """
    octet, r0 = _find_octets(bits, start, tile, TILE_OUT, TILE_IN)
    b0 = octet & 1
    b1 = (octet >> 1) & 1
    b2 = (octet >> 2) & 1
    b3 = (octet >> 3) & 1
    b4 = (octet >> 4) & 1
    b5 = (octet >> 5) & 1
    b6 = (octet >> 6) & 1
    b7 = (octet >> 7) & 1
    r1 = r0 + b0
    r2 = r1 + b1
    r3 = r2 + b2
    r4 = r3 + b3
    r5 = r4 + b4
    r6 = r5 + b5
    r7 = r6 + b6
    rank = _interleave(r0, r1, r2, r3, r4, r5, r6, r7, TILE_OUT, TILE_IN)
    keep = _interleave(b0, b1, b2, b3, b4, b5, b6, b7, TILE_OUT, TILE_IN) != 0
    tl.store(values + rank, dense.to(values.dtype.element_ty), mask=keep)
    return tl.where(keep, dense, 0.0)
