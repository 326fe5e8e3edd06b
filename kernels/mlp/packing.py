"""A ticket packed on its support: index the mask, gather an arena row, scatter it back.

A hidden unit none of whose outputs is left, and that no LayerNorm reads, cannot reach the network's
output: it is *dead*, its activation is read by nobody and its gradient is zero. `pack` finds out
from the output down, for one OR per row, and the products run over the rows that live. In the mask
of a 4-64-64-2 policy, pruned at random, 36% of the last hidden layer lives at 80% and 10% at 95%.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compiling import njit
from .bits import WORD, mask_word, trailing_zeros
from .layout import BIAS, COLUMNS, HIDDEN, IN, NORMAL, OUT, ROWS, SPARSE, WEIGHT

_ZERO = np.float32(0.0)
_NONE = np.uint64(0)
_ONE = np.uint64(1)


class Packed(NamedTuple):
    """One ticket's parameters on its support, and the scratch of the thread that works on it.

    Attributes:
        weight, grad, m, v: ``[parameters]`` float32, in packed order.
        turned: sparse weights in column order.
        space: float32 scratch addressed by `Layout`.
        position: place in the arena's row of each sparse weight.
        column: of each sparse weight.
        turned_row, turned_from: row and packed place of each sparse weight in column order.
        row_begin: first entry of each listed row of every sparse layer, absolute in packed order.
        column_begin: the same for the columns, of the `inputs`, in column order.
        rows: of every layer, the rows that live, ascending, then those that do not.
        every: 0, 1, ... up to the widest layer: a list of all rows.
        live: ``[L]`` how many rows of each layer live.
        begin: ``[2L + 1]``: first packed entry of each weight, each bias, and `log_std`.
        used: a bit per input of the layer at hand.
    """

    weight: np.ndarray
    grad: np.ndarray
    m: np.ndarray
    v: np.ndarray
    turned: np.ndarray
    space: np.ndarray
    position: np.ndarray
    column: np.ndarray
    turned_row: np.ndarray
    turned_from: np.ndarray
    row_begin: np.ndarray
    column_begin: np.ndarray
    rows: np.ndarray
    every: np.ndarray
    live: np.ndarray
    begin: np.ndarray
    used: np.ndarray


@njit(cache=True)
def open_scratch(layout, floats, integers):
    """Name the parts of one thread's scratch, and fill those that are the same for all tickets."""
    n, pointers, depth = layout.parameters, layout.pointers, layout.layers.shape[0]
    lists = integers[4 * n :]
    counts = lists[3 * pointers + layout.widest :]
    every = lists[3 * pointers : 3 * pointers + layout.widest]
    for i in range(layout.widest):
        every[i] = i
    space = floats[5 * n :]
    space[layout.zeros : layout.zeros + layout.widest] = _ZERO
    return Packed(
        floats[0:n],
        floats[n : 2 * n],
        floats[2 * n : 3 * n],
        floats[3 * n : 4 * n],
        floats[4 * n : 5 * n],
        space,
        integers[0:n],
        integers[n : 2 * n],
        integers[2 * n : 3 * n],
        integers[3 * n : 4 * n],
        lists[0:pointers],
        lists[pointers : 2 * pointers],
        lists[2 * pointers : 3 * pointers],
        every,
        counts[0:depth],
        counts[depth : 3 * depth + 1],
        np.empty((layout.widest + WORD - 1) // WORD, np.uint64),
    )


@njit(cache=True)
def _index_rows(mask_row, offset, inp, rows, number, row_begin, columns, positions, count, used):
    """Append the nonzeros of the listed rows; sets in ``used`` the bits of their columns."""
    used[:] = _NONE
    # Unsigned indices need no check for Python's negative ones.
    place = np.uint64(count)
    for k in range(number):
        row_begin[k] = place
        row = offset + rows[k] * inp
        for begin in range(0, inp, WORD):
            word = mask_word(mask_row, row + begin, min(WORD, inp - begin))
            used[begin // WORD] |= word
            while word != _NONE:
                column = begin + trailing_zeros(word)
                columns[place] = column
                positions[place] = row + column
                place += _ONE
                word &= word - _ONE
    row_begin[number] = place
    return np.int64(place)


@njit(cache=True)
def build_rows(mask_row, offset, out, inp, row_pointer, columns, positions, nnz0):
    """Compressed sparse rows of one layer's mask; returns the number of nonzeros so far.

    Args:
        mask_row: ``[N]`` bool, one ticket's mask. A layer at or beyond N is kept whole.
        offset: where the layer's ``[out, inp]`` matrix begins in the ticket's row.
        out: rows.
        inp: columns.
        row_pointer: ``[out + 1]`` ints, written: row o is nonzeros ``pointer[o] ... pointer[o+1]``.
        columns: ints, written from ``nnz0``: the input feature of each nonzero.
        positions: as ``columns``: where in the ticket's row each nonzero lies.
        nnz0: nonzeros already there.
    """
    used, every = np.empty((inp + WORD - 1) // WORD, np.uint64), np.arange(out)
    return _index_rows(
        mask_row, offset, inp, every, out, row_pointer, columns, positions, nnz0, used
    )


@njit(cache=True)
def _list_rows(layout, packed, layer):
    """List a hidden layer's rows: those that live, given what the layer above used, then others."""
    layers = layout.layers
    rows, used = packed.rows[layers[layer, ROWS] :], packed.used
    live, dead = 0, layers[layer, OUT]
    # Tiles compute and read every row, and each tells on the mean and the variance of all.
    whole = not (layers[layer, SPARSE] and layers[layer + 1, SPARSE]) or layers[layer, NORMAL]
    for o in range(layers[layer, OUT]):
        if whole or used[o // WORD] >> np.uint64(o % WORD) & _ONE != _NONE:
            rows[live] = o
            live += 1
        else:
            dead -= 1
            rows[dead] = o
    packed.live[layer] = live


@njit(cache=True)
def pack(layout, packed, mask_row, keep_dead):
    """Index one ticket's support, from the output down; returns the number of packed entries.

    ``keep_dead`` packs what leads to dead units too, behind the rest of its layer: an optimiser's
    moments move such weights although their gradient is zero.
    """
    layers = layout.layers
    depth = layers.shape[0]
    column, position, used = packed.column, packed.position, packed.used
    count = 0
    for layer in range(depth - 1, -1, -1):
        out, inp, offset = layers[layer, OUT], layers[layer, IN], layers[layer, WEIGHT]
        rows = packed.rows[layers[layer, ROWS] :]
        if not layers[layer, HIDDEN]:
            rows[:out] = packed.every[:out]
            packed.live[layer] = out
        packed.begin[layer] = count
        row_begin, live = packed.row_begin[layers[layer, ROWS] :], packed.live[layer]
        if layers[layer, SPARSE]:
            count = _index_rows(
                mask_row, offset, inp, rows, live, row_begin, column, position, count, used
            )
        else:
            count += out * inp
        if layer > 0 and layers[layer - 1, HIDDEN]:
            _list_rows(layout, packed, layer - 1)
        if keep_dead and live < out:
            dead, begin = rows[live:], row_begin[live:]
            count = _index_rows(
                mask_row, offset, inp, dead, out - live, begin, column, position, count, used
            )
    for layer in range(depth):
        packed.begin[depth + layer] = count
        count += layers[layer, OUT]
    packed.begin[2 * depth] = count
    return count + layout.actions


@njit(cache=True)
def inputs(layout, packed, layer):
    """The inputs of a layer whose gradient is wanted, and how many: what lives of the layer below,
    or all observations."""
    layers = layout.layers
    if layer > 0 and layers[layer - 1, HIDDEN]:
        return packed.rows[layers[layer - 1, ROWS] :], packed.live[layer - 1]
    return packed.every, np.int32(layers[layer, IN])


@njit(cache=True)
def _sort_columns(rows, number, row_begin, column, inp, end, turned_row, turned_from):
    """Counting sort of the listed rows' nonzeros, rows ascending; ``end [inp]`` of each column."""
    first = np.uint64(row_begin[0])
    end[: inp + 1] = 0
    for j in range(first, np.uint64(row_begin[number])):
        end[np.uint64(column[j]) + _ONE] += 1
    total = first
    for i in range(inp + 1):
        total += np.uint64(end[i])
        end[i] = total
    for k in range(number):
        row = rows[k]
        for j in range(np.uint64(row_begin[k]), np.uint64(row_begin[k + 1])):
            column_j = np.uint64(column[j])
            place = np.uint64(end[column_j])
            end[column_j] = place + _ONE
            turned_row[place] = row
            turned_from[place] = j


@njit(cache=True)
def turn(layout, packed, to_input):
    """Index the same nonzeros by column.

    The first layer of a network is left out unless ``to_input``.
    """
    layers = layout.layers
    for layer in range(layers.shape[0]):
        below = layer > 0 and layers[layer - 1, HIDDEN]
        if not layers[layer, SPARSE] or not (below or to_input):
            continue
        rows = packed.rows[layers[layer, ROWS] :]
        row_begin = packed.row_begin[layers[layer, ROWS] :]
        column_begin = packed.column_begin[layers[layer, COLUMNS] :]
        _sort_columns(
            rows,
            packed.live[layer],
            row_begin,
            packed.column,
            layers[layer, IN],
            column_begin,
            packed.turned_row,
            packed.turned_from,
        )
        # From every column's end to the begin of each that is listed: the others are empty.
        wanted, number = inputs(layout, packed, layer)
        begin = row_begin[0]
        for k in range(number):
            end = column_begin[wanted[k]]
            column_begin[k] = begin
            begin = end
        column_begin[number] = begin


@njit(cache=True)
def _gather(source, index, target):
    for j in range(index.size):
        target[j] = source[index[j]]


@njit(cache=True)
def _scatter(source, index, target):
    for j in range(index.size):
        target[index[j]] = source[j]


@njit(cache=True)
def _copy_kept(source, keep, target):
    for j in range(keep.size):
        # Read first: a conditional load would be a branch per weight.
        value = source[j]
        target[j] = value if keep[j] else _ZERO


@njit(cache=True)
def turn_values(layout, packed, to_input):
    """Refresh the copy of the sparse weights in column order, of the layers that `turn` indexed."""
    layers = layout.layers
    for layer in range(layers.shape[0]):
        below = layer > 0 and layers[layer - 1, HIDDEN]
        if layers[layer, SPARSE] and (below or to_input):
            row_begin = packed.row_begin[layers[layer, ROWS] :]
            begin, end = row_begin[0], row_begin[packed.live[layer]]
            _gather(packed.weight, packed.turned_from[begin:end], packed.turned[begin:])


@njit(cache=True)
def _span(layout, packed, layer):
    """First packed entry of a layer's weight, and the end: the layer below follows it."""
    end = packed.begin[layer - 1] if layer > 0 else packed.begin[layout.layers.shape[0]]
    return packed.begin[layer], end


@njit(cache=True)
def read_row(layout, packed, mask_row, source, target):
    """Gather an arena row into packed order; zero off the mask of a dense layer."""
    layers = layout.layers
    depth = layers.shape[0]
    for layer in range(depth):
        begin, end = _span(layout, packed, layer)
        weight, bias, out = layers[layer, WEIGHT], layers[layer, BIAS], layers[layer, OUT]
        if layers[layer, SPARSE]:
            _gather(source, packed.position[begin:end], target[begin:])
        elif weight < mask_row.shape[0]:
            _copy_kept(source[weight:], mask_row[weight : weight + end - begin], target[begin:])
        else:
            target[begin:end] = source[weight : weight + end - begin]
        begin = packed.begin[depth + layer]
        target[begin : begin + out] = source[bias : bias + out]
    begin = packed.begin[2 * depth]
    target[begin : begin + layout.actions] = source[layout.log_std :][: layout.actions]


@njit(cache=True)
def write_row(layout, packed, mask_row, source, target):
    """Scatter packed entries back to an arena row, exactly zero off the mask."""
    layers = layout.layers
    depth = layers.shape[0]
    target[: mask_row.shape[0]] = _ZERO
    for layer in range(depth):
        begin, end = _span(layout, packed, layer)
        weight, bias, out = layers[layer, WEIGHT], layers[layer, BIAS], layers[layer, OUT]
        if layers[layer, SPARSE]:
            _scatter(source[begin:], packed.position[begin:end], target)
        elif weight < mask_row.shape[0]:
            # A diverged ticket's NaN must not leave the mask either.
            _copy_kept(source[begin:], mask_row[weight : weight + end - begin], target[weight:])
        else:
            target[weight : weight + end - begin] = source[begin:end]
        begin = packed.begin[depth + layer]
        target[bias : bias + out] = source[begin : begin + out]
    begin = packed.begin[2 * depth]
    target[layout.log_std :][: layout.actions] = source[begin : begin + layout.actions]
