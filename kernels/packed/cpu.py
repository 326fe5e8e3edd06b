"""Packed weights on the CPU: packing and unpacking in Numba, products by the CPU's own `linear`.

Tile order is a GPU's: here a layer is unpacked, and `linear` multiplies in the format it would
choose for that mask, compressed rows among others. The masks of a pattern are unpacked once.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..compiling import njit
from ..linear import cpu as linear
from ..threads import count_threads, share
from . import reference
from .layout import Layer

__all__ = ["dw", "dx", "forward", "pack", "unpack"]

# Work per dense weight, in the units of `count_threads`.
_WORK = 64


@njit(cache=True)
def _unpack_ticket(thread, p, values, bits, start, dense, shape):
    """``dense[p, offset:]`` of one layer; shape is `_shape`'s."""
    offset, out, inp, first_tile, first_word, tile_out, tile_in = shape
    tiles_in = (inp + tile_in - 1) // tile_in
    tiles_out = (out + tile_out - 1) // tile_out
    for tile in range(tiles_out * tiles_in):
        rank = start[p, first_tile + tile]
        first_bit = 32 * first_word + tile * tile_out * tile_in
        row = tile // tiles_in * tile_out
        col = tile % tiles_in * tile_in
        for r in range(min(tile_out, out - row)):
            for c in range(min(tile_in, inp - col)):
                bit = first_bit + r * tile_in + c
                at = offset + (row + r) * inp + col + c
                if (bits[p, bit >> 5] >> (bit & 31)) & 1:
                    dense[p, at] = values[p, rank]
                    rank += 1
                else:
                    dense[p, at] = 0


@njit(cache=True)
def _pack_ticket(thread, p, dense, bits, start, values, shape):
    """The other way round: one layer's entries of ``values``."""
    offset, out, inp, first_tile, first_word, tile_out, tile_in = shape
    tiles_in = (inp + tile_in - 1) // tile_in
    tiles_out = (out + tile_out - 1) // tile_out
    for tile in range(tiles_out * tiles_in):
        rank = start[p, first_tile + tile]
        first_bit = 32 * first_word + tile * tile_out * tile_in
        row = tile // tiles_in * tile_out
        col = tile % tiles_in * tile_in
        for r in range(min(tile_out, out - row)):
            for c in range(min(tile_in, inp - col)):
                bit = first_bit + r * tile_in + c
                if (bits[p, bit >> 5] >> (bit & 31)) & 1:
                    values[p, rank] = dense[p, offset + (row + r) * inp + col + c]
                    rank += 1


@njit(cache=True, nogil=True)
def _unpack(threads, values, bits, start, dense, shape):
    share(_unpack_ticket, threads, dense.shape[0], (values, bits, start, dense, shape))


@njit(cache=True, nogil=True)
def _pack(threads, dense, bits, start, values, shape):
    share(_pack_ticket, threads, dense.shape[0], (dense, bits, start, values, shape))


def unpack(
    values: Tensor, bits: Tensor, start: Tensor, layers: tuple[Layer, ...], size: int
) -> Tensor:
    """See `reference.unpack`."""
    dense = values.new_empty(values.shape[0], size)
    for layer in layers:
        _unpack_into(dense, values, bits, start, layer, layer.offset)
    return dense


def pack(
    dense: Tensor, bits: Tensor, start: Tensor, layers: tuple[Layer, ...], width: int
) -> Tensor:
    """See `reference.pack`."""
    values = dense.new_zeros(dense.shape[0], width)
    for layer in layers:
        _pack_from(dense, values, bits, start, layer, layer.offset)
    return values


def forward(
    x: Tensor, values: Tensor, bits: Tensor, start: Tensor, bias: Tensor | None, layer: Layer
) -> Tensor:
    """See `reference.forward`."""
    weight = _unpack_layer(values, bits, start, layer)
    return linear.forward(x, weight, _mask(bits, start, layer), bias)


def dx(dy: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: Layer) -> Tensor:
    """See `reference.dx`."""
    weight = _unpack_layer(values, bits, start, layer)
    return linear.dx(dy, weight, _mask(bits, start, layer))


def dw(
    target: Tensor,
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    layer: Layer,
    squares: Tensor | None = None,
) -> None:
    """See `reference.dw`."""
    dense = linear.dw(dy, x, _mask(bits, start, layer))
    _pack_from(dense.flatten(1), target, bits, start, layer, 0)
    if squares is not None:
        first = layer.first_tile
        squares[:, first : first + layer.tiles] = reference.tile_squares(
            dense.to(squares.dtype), layer
        )


def _unpack_layer(values: Tensor, bits: Tensor, start: Tensor, layer: Layer) -> Tensor:
    weight = values.new_empty(values.shape[0], layer.out * layer.inp)
    _unpack_into(weight, values, bits, start, layer, 0)
    return weight.unflatten(1, (layer.out, layer.inp))


def _unpack_into(
    dense: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: Layer, offset: int
) -> None:
    arrays = _arrays(values, bits, start, dense)
    _unpack(_count_threads(layer, len(dense)), *arrays, _shape(layer, offset))


def _pack_from(
    dense: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: Layer, offset: int
) -> None:
    arrays = _arrays(dense, bits, start, values)
    _pack(_count_threads(layer, len(dense)), *arrays, _shape(layer, offset))


def _count_threads(layer: Layer, tickets: int) -> int:
    return count_threads(tickets, _WORK * tickets * layer.out * layer.inp)


def _arrays(source: Tensor, bits: Tensor, start: Tensor, target: Tensor) -> tuple[np.ndarray, ...]:
    """For the kernels: any strides but the target's, which they write, become contiguous."""
    read = (tensor.detach().contiguous().numpy() for tensor in (source, bits, start))
    return (*read, target.detach().numpy())


def _shape(layer: Layer, offset: int) -> tuple[int, ...]:
    return (
        offset,
        layer.out,
        layer.inp,
        layer.first_tile,
        layer.first_word,
        layer.tile_out,
        layer.tile_in,
    )


# By the pattern's bits: `linear` keeps its formats for as long as it sees the same mask.
_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def _mask(bits: Tensor, start: Tensor, layer: Layer) -> Tensor:
    """``[P, out, inp]`` bool, the same tensor as long as the bits are."""
    with _lock:
        known = _masks.setdefault(bits, {})
    if layer not in known:
        mask = torch.empty(len(bits), layer.out * layer.inp, dtype=torch.bool)
        kept = torch.ones(len(bits), int(start.max()) if start.numel() else 0, dtype=torch.bool)
        _unpack_into(mask, kept, bits, start, layer, 0)
        known[layer] = mask.unflatten(1, (layer.out, layer.inp))
    return known[layer]
