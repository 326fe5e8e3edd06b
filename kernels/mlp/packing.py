"""A ticket packed on its support: index the mask, gather an arena row, scatter it back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from sparse_tickets.kernels.mlp.layout import BIAS, COLUMNS, IN, OUT, ROWS, SPARSE, WEIGHT

__all__ = ["Packed", "build_rows", "open_scratch", "pack", "read_row", "turn_values", "write_row"]


class Packed(NamedTuple):
    """One ticket's parameters on its support, and the scratch of the thread that works on it.

    Attributes:
        weight, grad, m, v: ``[parameters]`` float32, in packed order.
        turned: sparse weights in column order.
        space: float32 scratch addressed by `Layout`.
        position: place in the arena's row of each packed entry.
        column, row: of each sparse weight.
        turned_row, turned_from: row and packed place of each sparse weight in column order.
        row_begin, column_begin: pointers of every sparse layer, absolute in packed order.
        begin: ``[2L + 1]``: first packed entry of each weight, each bias, and `log_std`.
    """

    weight: np.ndarray
    grad: np.ndarray
    m: np.ndarray
    v: np.ndarray
    turned: np.ndarray
    space: np.ndarray
    position: np.ndarray
    column: np.ndarray
    row: np.ndarray
    turned_row: np.ndarray
    turned_from: np.ndarray
    row_begin: np.ndarray
    column_begin: np.ndarray
    begin: np.ndarray


@njit(cache=True)
def open_scratch(layout, floats, integers):
    """Name the parts of one thread's scratch."""
    n, pointers = layout.parameters, layout.pointers
    return Packed(
        floats[0:n],
        floats[n : 2 * n],
        floats[2 * n : 3 * n],
        floats[3 * n : 4 * n],
        floats[4 * n : 5 * n],
        floats[5 * n :],
        integers[0:n],
        integers[n : 2 * n],
        integers[2 * n : 3 * n],
        integers[3 * n : 4 * n],
        integers[4 * n : 5 * n],
        integers[5 * n : 5 * n + pointers],
        integers[5 * n + pointers : 5 * n + 2 * pointers],
        integers[5 * n + 2 * pointers :],
    )


@njit(cache=True)
def build_rows(mask_row, offset, out, inp, row_pointer, columns, positions, nnz0):
    """Compressed sparse rows of one layer's mask; returns the number of nonzeros so far.

    Args:
        mask_row: ``[N]`` bool, one ticket's mask. A layer at or beyond N is kept whole.
        offset: where the layer's ``[out, inp]`` matrix begins in the ticket's row.
        out: rows.
        inp: columns.
        row_pointer: ``[out + 1]`` ints, written: row o is nonzeros ``pointer[o] ... pointer[o+1]``.
        columns: ints, written from ``nnz0``: the input feature of each nonzero; one entry longer
            than the nonzeros, because a place is written before it is known to be kept.
        positions: as ``columns``: where in the ticket's row each nonzero lies.
        nnz0: nonzeros already there.
    """
    whole = offset >= mask_row.shape[0]
    count = nnz0
    for o in range(out):
        row_pointer[o] = count
        for i in range(inp):
            position = offset + o * inp + i
            columns[count] = i
            positions[count] = position
            count += whole or mask_row[position]
    row_pointer[out] = count
    return count


@njit(cache=True)
def _build_columns(packed, row_begin, column_begin, out, inp):
    """The same nonzeros by column, rows ascending: a counting sort."""
    first = row_begin[0]
    column_begin[: inp + 1] = 0
    for j in range(first, row_begin[out]):
        column_begin[packed.column[j] + 1] += 1
    column_begin[0] = first
    for i in range(inp):
        column_begin[i + 1] += column_begin[i]
    for o in range(out):
        for j in range(row_begin[o], row_begin[o + 1]):
            packed.row[j] = o
            place = column_begin[packed.column[j]]
            column_begin[packed.column[j]] = place + 1
            packed.turned_row[place] = o
            packed.turned_from[place] = j
    for i in range(inp, 0, -1):
        column_begin[i] = column_begin[i - 1]
    column_begin[0] = first


@njit(cache=True)
def pack(layout, packed, mask_row):
    """Index one ticket's support; returns the number of packed entries."""
    layers = layout.layers
    depth = layers.shape[0]
    count = 0
    for layer in range(depth):
        out, inp, offset = layers[layer, OUT], layers[layer, IN], layers[layer, WEIGHT]
        packed.begin[layer] = count
        if layers[layer, SPARSE]:
            row_begin = packed.row_begin[layers[layer, ROWS] :]
            column_begin = packed.column_begin[layers[layer, COLUMNS] :]
            count = build_rows(
                mask_row, offset, out, inp, row_begin, packed.column, packed.position, count
            )
            _build_columns(packed, row_begin, column_begin, out, inp)
        else:
            for i in range(out * inp):
                packed.position[count + i] = offset + i
            count += out * inp
    for layer in range(depth):
        packed.begin[depth + layer] = count
        for o in range(layers[layer, OUT]):
            packed.position[count] = layers[layer, BIAS] + o
            count += 1
    packed.begin[2 * depth] = count
    for a in range(layout.actions):
        packed.position[count] = layout.log_std + a
        count += 1
    return count


@njit(cache=True)
def read_row(packed, count, mask_row, source, target):
    """Gather an arena row into packed order; zero off the mask of a dense layer."""
    prunable = mask_row.shape[0]
    for j in range(count):
        position = packed.position[j]
        value = source[position]
        keep = position >= prunable or mask_row[position]
        target[j] = value if keep else np.float32(0.0)


@njit(cache=True)
def write_row(packed, count, mask_row, source, target):
    """Scatter packed entries back to an arena row, exactly zero off the mask."""
    prunable = mask_row.shape[0]
    target[:prunable] = 0.0
    for j in range(count):
        position = packed.position[j]
        # A diverged ticket's NaN must not leave the mask either.
        if position >= prunable or mask_row[position]:
            target[position] = source[j]


@njit(cache=True)
def turn_values(layout, packed):
    """Refresh the copy of the sparse weights in column order."""
    layers = layout.layers
    for layer in range(layers.shape[0]):
        if layers[layer, SPARSE]:
            begin = packed.begin[layer]
            end = packed.row_begin[layers[layer, ROWS] + layers[layer, OUT]]
            for j in range(begin, end):
                packed.turned[j] = packed.weight[packed.turned_from[j]]
