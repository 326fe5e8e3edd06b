"""Packed weights in plain torch: the formulas every backend is compared with.

``bits [P, words]`` and ``start [P, tiles + 1]`` are a `PackedPattern`'s; ``layer`` tells where one
weight matrix lies in them. All but `place` go by way of the dense matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_sound
from .layout import PackedLayer

__all__ = ["dw", "dx", "forward", "pack", "place", "tile_squares", "unpack", "unpack_layer"]


def place(bits: Tensor, start: Tensor, layer: PackedLayer, width: int) -> tuple[Tensor, Tensor]:
    """Where a layer is supported, ``[P, out, inp]`` bool, and which of width values lies there."""
    words = bits[:, layer.first_word : layer.first_word + layer.words]
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    kept = (words.unsqueeze(2) >> shift) & 1
    kept = kept.reshape(len(bits), layer.tiles, layer.tile_out * layer.tile_in)
    check_sound(kept, start, layer, width)
    first = start[:, layer.first_tile : layer.first_tile + layer.tiles].unsqueeze(2)
    index = first + kept.cumsum(2) - kept

    def untile(tiles: Tensor) -> Tensor:
        sides = (layer.tiles_out, layer.tiles_in, layer.tile_out, layer.tile_in)
        matrix = tiles.reshape(len(bits), *sides).transpose(2, 3).flatten(3).flatten(1, 2)
        return matrix[:, : layer.out, : layer.inp]

    return untile(kept).bool(), untile(index)


def unpack_layer(values: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer) -> Tensor:
    """One weight matrix ``[P, out, inp]``, zero off the mask."""
    mask, index = place(bits, start, layer, values.shape[1])
    # A value more, for the entries that have none.
    padded = torch.cat([values, values.new_zeros(len(values), 1)], 1)
    index = index.masked_fill(~mask, values.shape[1])
    return padded.gather(1, index.flatten(1)).view(mask.shape)


def unpack(
    values: Tensor, bits: Tensor, start: Tensor, layers: tuple[PackedLayer, ...], size: int
) -> Tensor:
    """``[P, k] -> [P, size]``, zero off the mask."""
    dense = [unpack_layer(values, bits, start, layer).flatten(1) for layer in layers]
    return torch.cat([values.new_empty(len(values), 0), *dense], 1)


def pack(
    dense: Tensor, bits: Tensor, start: Tensor, layers: tuple[PackedLayer, ...], width: int
) -> Tensor:
    """``[P, size or more] -> [P, k]``, zero beyond the nonzeros."""
    values = dense.new_zeros(len(dense), width)
    for layer in layers:
        matrix = dense[:, layer.offset : layer.offset + layer.out * layer.inp]
        _pack_layer(values, matrix.unflatten(1, (layer.out, layer.inp)), bits, start, layer)
    return values


def forward(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    bias: Tensor | None,
    layer: PackedLayer,
) -> Tensor:
    """``y = x wᵀ + b``: ``[P, B, inp], [P, k], [P, out] -> [P, B, out]``."""
    weight = unpack_layer(values, bits, start, layer)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def dx(dy: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer) -> Tensor:
    """``dx = dy w``: ``[P, B, out], [P, k] -> [P, B, inp]``."""
    return torch.bmm(dy, unpack_layer(values, bits, start, layer))


def dw(
    target: Tensor,
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    layer: PackedLayer,
    squares: Tensor | None = None,
) -> None:
    """``target = dyᵀ x`` on the mask: the layer's entries of ``target [P, k]`` alone, in place.

    Also the sums of their squares by tile: the layer's entries of ``squares [P, tiles]``.
    """
    dense = torch.bmm(dy.mT, x)
    _pack_layer(target, dense, bits, start, layer)
    if squares is not None:
        mask, _ = place(bits, start, layer, target.shape[1])
        kept = dense.masked_fill(~mask, 0).to(squares.dtype)
        first = layer.first_tile
        squares[:, first : first + layer.tiles] = tile_squares(kept, layer)


def tile_squares(dense: Tensor, layer: PackedLayer) -> Tensor:
    """Sums of squares by tile: ``[P, out, inp] -> [P, tiles]``."""
    right = layer.tiles_in * layer.tile_in - layer.inp
    below = layer.tiles_out * layer.tile_out - layer.out
    tiles = torch.nn.functional.pad(dense.square(), (0, right, 0, below))
    tiles = tiles.unflatten(2, (-1, layer.tile_in)).unflatten(1, (-1, layer.tile_out))
    return tiles.sum((2, 4)).flatten(1)


def _pack_layer(
    values: Tensor, matrix: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer
) -> None:
    """Store the supported entries of ``matrix [P, out, inp]`` among the values."""
    mask, index = place(bits, start, layer, values.shape[1])
    ticket = torch.arange(len(values), device=values.device)[:, None, None].expand_as(index)
    values[ticket[mask], index[mask]] = matrix[mask]
