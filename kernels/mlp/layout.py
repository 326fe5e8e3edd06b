"""How the fused CPU kernels lay out networks: formats, per-thread scratch, packed tickets.

A ticket enters a kernel as a masked row of the arena and is *packed*: only the weights on the mask
remain, in compressed rows (and by column, for the input gradient), the output layer's first,
followed by the biases and `log_std`. Weights, gradient and both moments share that order, so the
optimiser is one pass over what exists. Two formats, by `is_sparse`; a wide dense layer stays a full
matrix and its gradient is masked.

Activations are panels ``[features][PANEL]``: eight registers of batch per feature, so that a sparse
row streams eight independent chains of fused multiply-adds per nonzero. Where a derivative cannot
be read off the output, a hidden layer has a second panel for it (KEPT); where LayerNorm follows,
one of normalised features and a row of reciprocal deviations (NORMAL, DEVIATION). X of the next
layer is the panel that it reads of these. ADDED is the Y that the end of a residual network's block
adds to its own. None of these panels lies at 0, which says that there is none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..activations import ACTIVATIONS
from ..activations_cpu import code_of
from ..arena import Net, Processor
from ..threads import count_threads
from ..vector import LANES

PANEL = 8 * LANES
"""Batch columns processed together; a larger batch is a sequence of panels."""

NARROW = 8
SPARSE_DENSITY = 0.55
SPARSE_DENSITY_WIDE = 0.42
CACHED_WIDTH = 128
# Work of packing a ticket, in forward passes of one sample through all of its weights.
_PACKING = 32

# Columns of `Layout.layers`.
(
    OUT, IN, WEIGHT, BIAS, SPARSE, HIDDEN, ACTIVE, X, Y, ADDED, NORMAL, DEVIATION, KEPT, SUMS,
    STRIDE, ROWS, COLUMNS, FIELDS,
) = range(18)  # fmt: skip


class Layout(NamedTuple):
    """Where everything lies; all integers are offsets or counts in elements.

    Attributes:
        layers: ``[L, FIELDS]`` int64, the actor's layers, then the critic's.
        actor_layers: how many belong to the actor.
        activation: see `activations_cpu.code_of`.
        log_std: offset in the arena's row.
        actions: number of `log_std` entries.
        parameters: room for one packed row.
        pointers: room for all row pointers, for all column pointers, and for all lists of rows.
        widest: the most features between two layers.
        x: panel of observations.
        delta: panel of output gradients; the backward pass alternates it with `other`.
        other: see `delta`.
        stream: panel of the gradient that passes a block of a residual network by, or 0.
        turned: a transposed panel ``[PANEL][features]``.
        zeros: as many zeros as the widest layer has features, the bias of an input gradient.
        head: a free panel of `head_rows` rows for the loss.
        space: total length of the float scratch.
    """

    layers: np.ndarray
    actor_layers: int
    activation: int
    log_std: int
    actions: int
    parameters: int
    pointers: int
    widest: int
    x: int
    delta: int
    other: int
    stream: int
    turned: int
    zeros: int
    head: int
    space: int


def is_sparse(out: int, inp: int, density: float) -> bool:
    """Whether a layer runs on compressed rows: a function of shape and nominal density alone.

    Narrow layers do at any density: a tile would mostly compute padding. The thresholds are where
    an update broke even on an AVX-512 core; they are lower once the panels that a sparse row reads
    at random no longer fit the first-level cache.
    """
    cached = max(out, inp) <= CACHED_WIDTH
    threshold = SPARSE_DENSITY if cached else SPARSE_DENSITY_WIDE
    return min(out, inp) <= NARROW or density <= threshold


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

    Raises:
        ValueError: the kernels do not have a network; the message says what of it.
    """
    cursor = 0

    def take(count: int) -> int:
        nonlocal cursor
        cursor += _ceil(count, LANES)
        return cursor - _ceil(count, LANES)

    def take_panel(features: int) -> int:
        # Transposing reads whole registers of features.
        return take(_ceil(features, LANES) * PANEL)

    for net in nets:
        net.check_kernels(Processor.CPU)
    widest = max(max(net.sizes) for net in nets)
    observation = take_panel(nets[0].sizes[0])
    delta, other = take_panel(widest), take_panel(widest)
    residual = any(net.adds(layer) is not None for net in nets for layer in range(net.depth))
    stream = take_panel(widest) if residual else 0
    turned = take(_ceil(widest, LANES) * PANEL)
    zeros, head = take(widest), take(head_rows * PANEL)
    # The networks take turns, so they share the panels of their activations.
    depth = max(net.depth for net in nets)
    widths = [
        max(net.sizes[layer + 1] for net in nets if layer < net.depth) for layer in range(depth)
    ]
    panels, activation = [take_panel(width) for width in widths], nets[0].function
    code, keeps = code_of(activation), not ACTIVATIONS[activation].by_output
    kept = [take_panel(width) if keeps else 0 for width in widths[:-1]]
    normal, deviation = [0] * depth, [0] * depth
    for layer, width in enumerate(widths):
        if any(layer < net.depth and net.is_normalised(layer) for net in nets):
            normal[layer], deviation[layer] = take_panel(width), take(PANEL)
    rows, parameters, pointers = [], 0, 0
    for net in nets:
        read = observation
        for layer in range(net.depth):
            out, inp = net.shape(layer)
            masked = net.weights[layer] < prunable
            sparse = is_sparse(out, inp, density if masked else 1.0)
            row = [0] * FIELDS
            row[OUT], row[IN] = out, inp
            row[WEIGHT], row[BIAS] = net.weights[layer], net.biases[layer]
            row[SPARSE], row[HIDDEN] = sparse, layer < net.depth - 1
            row[ACTIVE], row[X], row[Y] = net.activates(layer), read, panels[layer]
            skipped = net.adds(layer)
            row[ADDED] = 0 if skipped is None else panels[skipped]
            if net.is_normalised(layer):
                row[NORMAL], row[DEVIATION] = normal[layer], deviation[layer]
            row[KEPT] = kept[layer] if row[ACTIVE] else 0
            read = panels[layer] if row[ACTIVE] else row[NORMAL]
            row[STRIDE] = _ceil(inp, LANES)
            row[SUMS] = 0 if sparse else take(out * row[STRIDE])
            row[ROWS] = row[COLUMNS] = pointers
            rows.append(row)
            parameters += out * (inp + 1)
            pointers += max(out, inp) + 1
    actions = 0 if log_std is None else nets[0].sizes[-1]
    parameters = _ceil(parameters + actions, LANES)
    return Layout(
        layers=np.array(rows, dtype=np.int64),
        actor_layers=nets[0].depth,
        activation=code,
        log_std=0 if log_std is None else log_std,
        actions=actions,
        parameters=parameters,
        pointers=_ceil(pointers, LANES),
        widest=widest,
        x=observation,
        delta=delta,
        other=other,
        stream=stream,
        turned=turned,
        zeros=zeros,
        head=head,
        space=cursor,
    )


def _aligned(rows: int, length: int, dtype: type) -> np.ndarray:
    # A register that straddles two cache lines costs two loads; NumPy aligns to 16 bytes only.
    line = 64 // np.dtype(dtype).itemsize
    flat: np.ndarray = np.empty(rows * _ceil(length, line) + line, dtype)
    skip = -(flat.ctypes.data // flat.itemsize) % line
    return flat[skip : skip + rows * _ceil(length, line)].reshape(rows, -1)


def allocate(layout: Layout, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised scratch of every thread: float32 and int32 rows for `open_scratch`."""
    floats = 5 * layout.parameters + layout.space
    integers = 4 * layout.parameters + 3 * layout.pointers + layout.widest
    integers += 3 * len(layout.layers) + 1
    return _aligned(threads, floats, np.float32), _aligned(threads, integers, np.int32)


def prepare(layout: Layout, tickets: int, passes: float) -> tuple[int, np.ndarray, np.ndarray]:
    """How many threads work on the tickets, and each one's scratch as `allocate` returns it.

    Args:
        layout: see `Layout`.
        tickets: P.
        passes: samples times forward passes, or what comes to the same work, per ticket.
    """
    threads = count_threads(tickets, tickets * layout.parameters * (passes + _PACKING))
    return threads, *allocate(layout, threads)
