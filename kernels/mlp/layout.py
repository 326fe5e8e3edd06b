"""How the fused CPU kernels lay out networks: formats, per-thread scratch, packed tickets.

A ticket enters a kernel as a masked row of the arena and is *packed*: only the weights on the mask
remain, in compressed rows (and by column, for the input gradient), followed by the biases and
`log_std`. Weights, gradient and both moments share that order, so the optimiser is one pass over
what exists. Two formats, by `is_sparse`; a wide dense layer stays a full matrix and its gradient is
masked.

Activations are panels ``[features][PANEL]``: eight registers of batch per feature, so that a sparse
row streams eight independent chains of fused multiply-adds per nonzero.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from sparse_tickets.kernels.arena import Net
from sparse_tickets.kernels.vector import LANES

__all__ = [
    "PANEL",
    "Layout",
    "Packed",
    "allocate",
    "build_rows",
    "is_sparse",
    "lay_out",
    "open_scratch",
    "over_tickets",
    "pack",
    "read_row",
    "turn_values",
    "write_row",
]

PANEL = 8 * LANES
"""Batch columns processed together; a larger batch is a sequence of panels."""

NARROW = 8
SPARSE_DENSITY = 0.4

# Columns of `Layout.layers`.
OUT, IN, WEIGHT, BIAS, SPARSE, HIDDEN, X, Y, SUMS, STRIDE, ROWS, COLUMNS, FIELDS = range(13)


class Layout(NamedTuple):
    """Where everything lies; all integers are offsets or counts in elements.

    Attributes:
        layers: ``[L, FIELDS]`` int64, the actor's layers, then the critic's.
        actor_layers: how many belong to the actor.
        relu: whether the activation is relu, not tanh.
        log_std: offset in the arena's row.
        actions: number of `log_std` entries.
        parameters: room for one packed row.
        pointers: room for all row pointers, and for all column pointers.
        x: panel of observations.
        delta: panel of output gradients; the backward pass alternates it with `other`.
        other: see `delta`.
        turned: a transposed panel ``[PANEL][features]``.
        zeros: as many zeros as the widest layer has features, the bias of an input gradient.
        head: a free panel of `head_rows` rows for the loss.
        space: total length of the float scratch.
    """

    layers: np.ndarray
    actor_layers: int
    relu: bool
    log_std: int
    actions: int
    parameters: int
    pointers: int
    x: int
    delta: int
    other: int
    turned: int
    zeros: int
    head: int
    space: int


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


def is_sparse(out: int, inp: int, density: float) -> bool:
    """Whether a layer runs on compressed rows: a function of shape and nominal density alone.

    Narrow layers do at any density: a tile would mostly compute padding.
    """
    return min(out, inp) <= NARROW or density <= SPARSE_DENSITY


def _ceil(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@lru_cache(maxsize=64)
def lay_out(
    nets: tuple[Net, ...],
    prunable: int,
    density: float,
    log_std: int | None = None,
    head_rows: int = 0,
) -> Layout:
    """The layout of one or two networks that read the same observation.

    Args:
        nets: the actor, then the critic if it takes part.
        prunable: N, the length of the mask; layers from there on are dense.
        density: nominal density of the layers under the mask.
        log_std: offset of `log_std`, or None.
        head_rows: rows of scratch the loss needs.
    """
    cursor = 0

    def take(count: int) -> int:
        nonlocal cursor
        cursor += _ceil(count, LANES)
        return cursor - _ceil(count, LANES)

    def take_panel(features: int) -> int:
        # Transposing reads whole registers of features.
        return take(_ceil(features, LANES) * PANEL)

    widest = max(max(net.sizes) for net in nets)
    observation = take_panel(nets[0].sizes[0])
    delta, other = take_panel(widest), take_panel(widest)
    turned = take(_ceil(widest, LANES) * PANEL)
    zeros, head = take(widest), take(head_rows * PANEL)
    # The networks take turns, so they share the panels of their activations.
    depth = max(net.depth for net in nets)
    panels = [
        take_panel(max(net.sizes[layer + 1] for net in nets if layer < net.depth))
        for layer in range(depth)
    ]
    rows, parameters, pointers = [], 0, 0
    for net in nets:
        for layer in range(net.depth):
            out, inp = net.shape(layer)
            masked = net.weights[layer] < prunable
            sparse = is_sparse(out, inp, density if masked else 1.0)
            row = [0] * FIELDS
            row[OUT], row[IN] = out, inp
            row[WEIGHT], row[BIAS] = net.weights[layer], net.biases[layer]
            row[SPARSE], row[HIDDEN] = sparse, layer < net.depth - 1
            row[X], row[Y] = panels[layer - 1] if layer else observation, panels[layer]
            row[STRIDE] = _ceil(inp, LANES)
            row[SUMS] = 0 if sparse else take(out * row[STRIDE])
            row[ROWS] = row[COLUMNS] = pointers
            rows.append(row)
            parameters += out * (inp + 1)
            pointers += max(out, inp) + 1
    actions = 0 if log_std is None else nets[0].sizes[-1]
    # One more than fits: `build_rows` writes a place before it knows whether it is kept.
    parameters = _ceil(parameters + actions + LANES, LANES)
    return Layout(
        layers=np.array(rows, dtype=np.int64),
        actor_layers=nets[0].depth,
        relu=nets[0].activation == "relu",
        log_std=0 if log_std is None else log_std,
        actions=actions,
        parameters=parameters,
        pointers=_ceil(pointers, LANES),
        x=observation,
        delta=delta,
        other=other,
        turned=turned,
        zeros=zeros,
        head=head,
        space=cursor,
    )


def _aligned(rows: int, length: int, dtype: type) -> np.ndarray:
    # A register that straddles two cache lines costs two loads; NumPy aligns to 16 bytes only.
    line = 64 // np.dtype(dtype).itemsize
    flat = np.empty(rows * _ceil(length, line) + line, dtype)
    skip = -(flat.ctypes.data // flat.itemsize) % line
    return flat[skip : skip + rows * _ceil(length, line)].reshape(rows, -1)


def allocate(layout: Layout, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised scratch of every thread: float32 and int32 rows for `open_scratch`."""
    floats = 5 * layout.parameters + layout.space
    integers = 5 * layout.parameters + 2 * layout.pointers + 2 * len(layout.layers) + 1
    return _aligned(threads, floats, np.float32), _aligned(threads, integers, np.int32)


def over_tickets(kernel: Callable, layout: Layout, tickets: int, *arguments: object) -> None:
    """Call ``kernel(layout, floats, integers, begin, end, *arguments)`` on one slice per thread.

    The kernel releases the GIL, and each thread brings its own scratch. Plain threads rather than
    `prange`: Numba optimises everything a parallel loop calls three times more (11 of 29 seconds).

    Args:
        kernel: a Numba function compiled with ``nogil=True``.
        layout: see `Layout`.
        tickets: P; the slices ``[begin, end)`` partition them.
        *arguments: passed on.
    """
    threads = max(1, min(torch.get_num_threads(), tickets))
    floats, integers = allocate(layout, threads)

    def work(thread: int) -> None:
        begin, end = thread * tickets // threads, (thread + 1) * tickets // threads
        kernel(layout, floats[thread], integers[thread], begin, end, *arguments)

    if threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        # Drained, because an exception surfaces only where its result is asked for.
        for _ in pool.map(work, range(threads)):
            pass


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
            if whole or mask_row[position]:
                count += 1
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
        keep = position >= prunable or mask_row[position]
        target[j] = source[position] if keep else np.float32(0.0)


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
