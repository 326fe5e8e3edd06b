"""Where packed weights lie: layer by layer in tiles, and the pattern of a population's masks.

Each layer's ``[out, inp]`` weight is cut into tiles of up to 64 x 64, row of tiles by row of tiles.
A ticket's values are its nonzeros tile by tile, row-major inside a tile, without gaps. To find them
a pattern keeps one bit a weight in the same order (tiles at the edge are padded with zero bits) and
the number of nonzeros before each tile. So a tile's bits and values are contiguous, and the forward
product, dX and dW all read the one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import check_data, check_dtype, check_integer

__all__ = ["MAX_TILE", "PackedLayer", "PackedPattern", "build_pattern", "lay_out"]

MAX_TILE = 64
"""Largest side of a tile; the smallest is 16, which tensor cores ask for."""


@dataclass(frozen=True)
class PackedLayer:
    """Where one weight matrix lies.

    Attributes:
        offset: first entry of ``[out, inp]``, row-major, in a dense row of the arena.
        out: O.
        inp: I.
        first_tile: of the layer, in `PackedPattern.start`.
        first_word: of the layer, in `PackedPattern.bits`.
    """

    offset: int
    out: int
    inp: int
    first_tile: int
    first_word: int

    @property
    def tile_out(self) -> int:
        """Rows of a tile."""
        return _tile_side(self.out)

    @property
    def tile_in(self) -> int:
        """Columns of a tile."""
        return _tile_side(self.inp)

    @property
    def tiles_out(self) -> int:
        """Tiles from the first output to the last."""
        return -(-self.out // self.tile_out)

    @property
    def tiles_in(self) -> int:
        """Tiles from the first input to the last."""
        return -(-self.inp // self.tile_in)

    @property
    def tiles(self) -> int:
        """Tiles of the layer."""
        return self.tiles_out * self.tiles_in

    @property
    def words(self) -> int:
        """32-bit words of the layer's bits."""
        return self.tiles * self.tile_out * self.tile_in // 32


@dataclass(frozen=True)
class PackedPattern:
    """Where the masks of P tickets are True: a snapshot that later writes to the mask do not reach.

    Attributes:
        bits: ``[P, words]`` int32, a bit a weight in tile order, lowest bit first.
        start: ``[P, tiles + 1]`` int32, nonzeros before each tile; the last entry counts them all.
        count: ``[P]`` int64, nonzeros of each ticket.
        width: k, the length of a row of values: at least every count.
        layers: the weight matrices in order of offset.
    """

    bits: Tensor
    start: Tensor
    count: Tensor
    width: int
    layers: tuple[PackedLayer, ...]

    @property
    def tickets(self) -> int:
        """P."""
        return self.bits.shape[0]

    @property
    def size(self) -> int:
        """N, the length of a row of the mask."""
        return sum(layer.out * layer.inp for layer in self.layers)

    @property
    def shapes(self) -> list[int]:
        """``out, inp`` of every layer in one list: with it `lay_out` gives the layers again."""
        return [size for layer in self.layers for size in (layer.out, layer.inp)]


@cache
def lay_out(*shapes: int) -> tuple[PackedLayer, ...]:
    """The layers of consecutive ``out, inp`` pairs."""
    layers: list[PackedLayer] = []
    offset = first_tile = first_word = 0
    for out, inp in zip(shapes[::2], shapes[1::2], strict=True):
        layers.append(PackedLayer(offset, out, inp, first_tile, first_word))
        offset += out * inp
        first_tile += layers[-1].tiles
        first_word += layers[-1].words
    return tuple(layers)


def build_pattern(
    mask: Tensor, layers: Sequence[tuple[int, int, int]], *, width: int | None = None
) -> PackedPattern:
    """Remember where a mask is True.

    Args:
        mask: ``[P, N]`` bool, on any device.
        layers: ``(offset, out, inp)`` of every weight matrix as `Arena.prunable_layers` gives them:
            one after the other, N entries in all.
        width: k, the length of a row of values. None takes the largest count, for which the host
            waits for the device. Every ticket of a level has the same count, so it is known.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the layers do not cover the mask, or N is 2**31 or more; on the CPU, if a count
            exceeds `width`.
        RuntimeError: on a GPU and later, if a count exceeds `width`: a device-side assertion.
    """
    check_dtype("mask", mask, torch.bool)
    check_data("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (P, N), got {tuple(mask.shape)}")
    laid = lay_out(*(size for _, out, inp in layers for size in (out, inp)))
    _check_layers(mask, layers, laid)
    if width is not None:
        width = check_integer("width", width, 0, 1 << 31)

    tickets = mask.shape[0]
    bits = [mask.new_empty(tickets, 0, dtype=torch.uint8)]
    counts = [mask.new_zeros(tickets, 1, dtype=torch.int32)]
    for layer in laid:
        tiles = _tile(mask[:, layer.offset : layer.offset + layer.out * layer.inp], layer)
        counts.append(tiles.sum(2, dtype=torch.int32))
        bits.append(_pack_bits(tiles))
    start = torch.cat(counts, 1).cumsum(1, dtype=torch.int32)
    count = start[:, -1].long()
    largest = count.amax() if tickets else count.new_zeros(())
    if width is None:
        width = int(largest)
    elif mask.is_cuda:
        torch._assert_async(largest <= width, "a ticket has more nonzeros than the pattern's width")
    elif int(largest) > width:
        raise ValueError(f"width must be at least the largest count {int(largest)}, got {width}")
    return PackedPattern(torch.cat(bits, 1).view(torch.int32), start, count, width, laid)


def _tile_side(size: int) -> int:
    """16, 32 or 64, whichever first holds ``size``; else 64."""
    return min(MAX_TILE, max(16, 1 << max(size - 1, 0).bit_length()))


def _check_layers(
    mask: Tensor, layers: Sequence[tuple[int, int, int]], laid: tuple[PackedLayer, ...]
) -> None:
    size = mask.shape[1]
    if any(min(out, inp) < 1 for _, out, inp in layers):
        raise ValueError(f"layers must be of at least one output and input, got {list(layers)}")
    if [offset for offset, _, _ in layers] != [layer.offset for layer in laid]:
        raise ValueError(f"layers must lie one after the other from 0, got {list(layers)}")
    covered = sum(layer.out * layer.inp for layer in laid)
    if covered != size:
        raise ValueError(f"layers must cover the mask's {size} entries, got {covered}")
    if size >= 2**31:
        raise ValueError(f"mask must have fewer than 2**31 entries a ticket, got {size}")


def _tile(mask: Tensor, layer: PackedLayer) -> Tensor:
    """``[P, out * inp] -> [P, tiles, tile_out * tile_in]``, padded with False."""
    padded = mask.new_zeros(
        len(mask), layer.tiles_out * layer.tile_out, layer.tiles_in * layer.tile_in
    )
    padded[:, : layer.out, : layer.inp] = mask.unflatten(1, (layer.out, layer.inp))
    tiles = padded.unflatten(2, (-1, layer.tile_in)).unflatten(1, (-1, layer.tile_out))
    return tiles.transpose(2, 3).flatten(3).flatten(1, 2)


def _pack_bits(tiles: Tensor) -> Tensor:
    """``[P, tiles, entries]`` bool ``-> [P, tiles * entries / 8]`` uint8, lowest bit first."""
    place = 1 << torch.arange(8, dtype=torch.uint8, device=tiles.device)
    octets = tiles.flatten(1).unflatten(1, (-1, 8)).view(torch.uint8)
    return (octets * place).sum(2, dtype=torch.uint8)
