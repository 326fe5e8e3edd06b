"""The forward pass of one ticket on a few observations, in Numba: what a rollout does every step.

A batch of E environment copies is far smaller than a minibatch, so the two plans differ in what
fills a register:

- *dense*: `LANES` outputs of one copy. Weights are transposed once to ``[in][out]``, and a tile
  holds 4 copies x `_COLUMNS` registers of outputs, so 4 copies waste no lane.
- *sparse*: `LANES` copies of one output. Activations lie as ``[features][copies]`` without gaps;
  with fewer copies than lanes a row's surplus lanes spill into the next rows, which are written
  after it, and the activation function still runs over full registers.

Both sum over the inputs in ascending order with one fused multiply-add each, starting from the
bias, and a copy never leaves its lane: the plans agree bit for bit, for any E.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from operator import or_
from typing import NamedTuple

import numpy as np

from ..activations_cpu import activate, code_of
from ..arena import Arena, Net, Processor
from ..compiling import njit
from ..mlp.layernorm import EPSILON
from ..mlp.packing import build_rows
from ..tiles_cpu import make_sparse_tile, make_tile
from ..vector import LANES, fma, load, splat, store
from ..vector_math import rsqrt

_ROWS = 4
# Accumulators, the tile's inputs and a broadcast must fit 32 registers, or AVX2's 16.
_COLUMNS = 2 if LANES == 8 else 4
_WIDE = _COLUMNS * LANES

_dense_wide = make_tile(_ROWS, _COLUMNS, accumulate=True)
_dense_narrow = make_tile(_ROWS, 1, accumulate=True)
_sparse_wide = make_sparse_tile(2)
_sparse_narrow = make_sparse_tile(1)

# What follows a layer, added up.
_ACTIVE, _NORMALISED, _ADDS = 1, 2, 4

# No panel of derivatives; and ELU's parameter.
_NOWHERE, _ALPHA = np.int64(0), np.float32(1.0)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

# What a sparse row costs before its first nonzero (its loop ends at an unpredictable length), in
# fused multiply-adds of the dense tile; a nonzero costs one per register.
_ROW_COST = 20


class RolloutNet(NamedTuple):
    """A `Net` as Numba sees it.

    Attributes:
        sizes: features from input to output.
        weights: offset of each layer's weight in a ticket's row.
        biases: offset of each layer's bias.
        stride: the largest size, rounded up to whole registers.
        activation: see `activations_cpu.code_of`.
        follows: what follows each layer: an activation; LayerNorm, before the activation or into
            the next layer; the addition of what went into the LayerNorm before the layer below.
        any_follows: what of that there is at all.
        sparse: run the sparse plan.
    """

    sizes: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    stride: int
    activation: int
    follows: np.ndarray
    any_follows: int
    sparse: bool


class PreparedNet(NamedTuple):
    """One ticket's network laid out for `forward`, with its activations, as offsets in one array.

    One, because each array of a record is counted and passed by itself at every call: with eight of
    them a rollout of four copies took 1.25 times as long.

    Attributes:
        space: all of the floats.
        values: dense: ``[in][padded out]`` of every layer; sparse: the nonzeros, row by row.
        bias: biases of all layers, padded like the outputs if dense.
        x: activations of the current layer.
        y: activations of the next one.
        stream: what a block of a residual network adds to its output.
        scratch: for the sums of LayerNorm.
        column: sparse: the column of each nonzero.
        begin: sparse: where each row begins in `values`, over all layers; one more at the end.
    """

    space: np.ndarray
    values: int
    bias: int
    x: int
    y: int
    stream: int
    scratch: int
    column: np.ndarray
    begin: np.ndarray


def prefers_sparse(sizes: tuple[int, ...], density: float, copies: int) -> bool:
    """Whether sparse rows beat dense tiles: a function of shape and nominal density alone."""
    registers = -(-copies // LANES)
    dense, sparse = 0.0, 0.0
    for inp, out in pairwise(sizes):
        dense += inp * -(-out // LANES) * -(-copies // _ROWS) * _ROWS
        sparse += out * (_ROW_COST + density * inp * registers)
    return sparse < dense


def network(net: Net, arena: Arena, density: float, copies: int) -> RolloutNet:
    """The record of ``net`` for a population of nominal ``density`` and ``copies`` environments.

    Raises:
        ValueError: the kernels do not have it; the message says what of it.
    """
    net.check_kernels(Processor.CPU)
    prunable = net.weights[0] < arena.prunable
    follows = [
        _ACTIVE * net.activates(layer)
        + _NORMALISED * net.is_normalised(layer)
        + _ADDS * (net.adds(layer) is not None)
        for layer in range(net.depth)
    ]
    return RolloutNet(
        np.array(net.sizes, np.int64),
        np.array(net.weights, np.int64),
        np.array(net.biases, np.int64),
        -(-max(net.sizes) // LANES) * LANES,
        code_of(net.function),
        np.array(follows, np.int64),
        reduce(or_, follows, 0),
        prunable and prefers_sparse(net.sizes, density, copies),
    )


@njit(cache=True, inline="always")
def _round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@njit(cache=True)
def prepare(row, mask, net, copies):
    """Lay out one ticket's network for at most ``copies`` observations.

    Args:
        row: ``[size]`` float32, the ticket's parameters.
        mask: ``[N]`` bool; read by the sparse plan only.
        net: `RolloutNet`.
        copies: most observations of any later `forward`.

    Returns:
        `PreparedNet`.
    """
    # Room for the last row's surplus lanes; zeros, because surplus lanes are computed with.
    room = net.stride * _round_up(copies, _ROWS) + 2 * LANES
    y = room
    stream = y + room
    scratch = stream + (room if net.any_follows & _ADDS else 0)
    sums = LANES * LANES + 2 * _round_up(copies, LANES)
    end = scratch + (sums if net.any_follows & _NORMALISED else 0)
    panels = 0, y, stream, scratch
    if net.sparse:
        return _prepare_sparse(row, mask, net, panels, end)
    return _prepare_dense(row, net, panels, end)


@njit(cache=True)
def _prepare_dense(row, net, panels, end):
    x, y, stream, scratch = panels
    sizes = net.sizes
    values_size, bias_size = 0, 0
    for layer in range(sizes.size - 1):
        width = _round_up(sizes[layer + 1], LANES)
        values_size += sizes[layer] * width
        bias_size += width
    values, bias = end, end + values_size
    space = np.zeros(bias + bias_size, np.float32)
    v0, b0 = values, bias
    for layer in range(sizes.size - 1):
        inp, out = sizes[layer], sizes[layer + 1]
        width = _round_up(out, LANES)
        weight = row[net.weights[layer] : net.weights[layer] + out * inp]
        for o in range(out):
            space[b0 + o] = row[net.biases[layer] + o]
            for i in range(inp):
                space[v0 + i * width + o] = weight[o * inp + i]
        v0 += inp * width
        b0 += width
    column, begin = np.empty(0, np.int32), np.empty(0, np.int64)
    return PreparedNet(space, values, bias, x, y, stream, scratch, column, begin)


@njit(cache=True)
def _prepare_sparse(row, mask, net, panels, end):
    x, y, stream, scratch = panels
    sizes = net.sizes
    rows, entries = 0, 0
    for layer in range(sizes.size - 1):
        rows += sizes[layer + 1]
        entries += sizes[layer] * sizes[layer + 1]
    begin, bias, values = np.empty(rows + 1, np.int64), end, end + rows
    column, positions = np.empty(entries + 1, np.int32), np.empty(entries + 1, np.int32)
    count, r = 0, 0
    for layer in range(sizes.size - 1):
        inp, out = sizes[layer], sizes[layer + 1]
        pointer = begin[r : r + out + 1]
        count = build_rows(mask, net.weights[layer], out, inp, pointer, column, positions, count)
        r += out
    space, r = np.zeros(values + count, np.float32), 0
    for layer in range(sizes.size - 1):
        for o in range(sizes[layer + 1]):
            space[bias + r] = row[net.biases[layer] + o]
            r += 1
    for j in range(count):
        space[values + j] = row[positions[j]]
    return PreparedNet(space, values, bias, x, y, stream, scratch, column, begin)


@njit(cache=True)
def forward(net, prepared, obs, count, out):
    """Run the network on the first ``count`` rows of ``obs [E, I]``, writing ``out [E, O]``."""
    if net.sparse:
        _forward_sparse(net, prepared, obs, count, out)
    else:
        _forward_dense(net, prepared, obs, count, out)


@njit(cache=True)
def _add(space, y, stream, size):
    """Add the stream of a residual network to ``size`` numbers at y."""
    for i in range(0, size, LANES):
        store(space, y + i, load(space, y + i) + load(space, stream + i))


@njit(cache=True)
def _keep(space, y, stream, size):
    """Keep ``size`` numbers at y as the stream, where a block leaves it."""
    for i in range(0, size, LANES):
        store(space, stream + i, load(space, y + i))


# LayerNorm adds up a copy's features o by o % LANES, ascending, then the LANES sums: the one order
# that both plans can have.


@njit(cache=True)
def _add_up(space, scratch, sums):
    store(space, scratch, sums)
    total = _ZERO
    for lane in range(LANES):
        total += space[scratch + lane]
    return splat(total)


@njit(cache=True)
def _normalise_copies(space, y, count, stride, features, scratch):
    """LayerNorm of every copy's row at y, in place; beyond the features it has zeros."""
    share = splat(_ONE / np.float32(features))
    end = _round_up(features, LANES)
    for begin in range(y, y + count * stride, stride):
        sums = splat(_ZERO)
        for o in range(begin, begin + end, LANES):
            sums = sums + load(space, o)
        mean = _add_up(space, scratch, sums) * share
        store(space, scratch, mean)
        space[begin + features : begin + end] = space[scratch]
        squares = splat(_ZERO)
        for o in range(begin, begin + end, LANES):
            distance = load(space, o) - mean
            store(space, o, distance)
            squares = fma(distance, distance, squares)
        variance = _add_up(space, scratch, squares)
        scale = rsqrt(fma(variance, share, splat(EPSILON)))
        for o in range(begin, begin + end, LANES):
            store(space, o, load(space, o) * scale)


@njit(cache=True)
def _normalise_features(space, y, z, features, count, scratch):
    """LayerNorm of ``[features][count]`` at y, to z."""
    share = splat(_ONE / np.float32(features))
    means = scratch + LANES * LANES
    scales = means + _round_up(count, LANES)
    for c in range(0, count, LANES):
        space[scratch:means] = _ZERO
        for o in range(features):
            place = scratch + o % LANES * LANES
            store(space, place, load(space, place) + load(space, y + o * count + c))
        mean = _add_rows(space, scratch) * share
        store(space, means + c, mean)
        space[scratch:means] = _ZERO
        for o in range(features):
            distance = load(space, y + o * count + c) - mean
            place = scratch + o % LANES * LANES
            store(space, place, fma(distance, distance, load(space, place)))
        variance = _add_rows(space, scratch)
        store(space, scales + c, rsqrt(fma(variance, share, splat(EPSILON))))
    # Row by row: surplus lanes spill into the next row, which is written after.
    for o in range(features):
        for c in range(0, count, LANES):
            distance = load(space, y + o * count + c) - load(space, means + c)
            store(space, z + o * count + c, distance * load(space, scales + c))


@njit(cache=True)
def _add_rows(space, scratch):
    total = splat(_ZERO)
    for lane in range(LANES):
        total = total + load(space, scratch + lane * LANES)
    return total


@njit(cache=True)
def _forward_dense(net, prepared, obs, count, out):
    sizes, follows, stride = net.sizes, net.follows, net.stride
    keeps = net.any_follows & _ADDS
    space, x, y = prepared.space, prepared.x, prepared.y
    for e in range(count):
        for i in range(sizes[0]):
            space[x + e * stride + i] = obs[e, i]
    v0, b0 = prepared.values, prepared.bias
    for layer in range(sizes.size - 1):
        inp, width = sizes[layer], _round_up(sizes[layer + 1], LANES)
        for first in range(0, count, _ROWS):
            for e in range(first, first + _ROWS):
                for o in range(0, width, LANES):
                    store(space, y + e * stride + o, load(space, b0 + o))
            x0, y0 = x + first * stride, y + first * stride
            o = 0
            while o + _WIDE <= width:
                _dense_wide(
                    space, x0, stride, 1, space, v0 + o, width, space, y0 + o, stride, inp, space, 0
                )
                o += _WIDE
            while o < width:
                _dense_narrow(
                    space, x0, stride, 1, space, v0 + o, width, space, y0 + o, stride, inp, space, 0
                )
                o += LANES
        then = follows[layer]
        if then & _ADDS:
            _add(space, y, prepared.stream, count * stride)
        if keeps and then & _NORMALISED and not then & _ACTIVE:
            _keep(space, y, prepared.stream, count * stride)
        if then & _NORMALISED:
            _normalise_copies(space, y, count, stride, sizes[layer + 1], prepared.scratch)
        if then & _ACTIVE:
            for e in range(count):
                activate(space, y + e * stride, _NOWHERE, width, net.activation, _ALPHA)
        v0 += inp * width
        b0 += width
        x, y = y, x
    for e in range(count):
        for o in range(sizes[-1]):
            out[e, o] = space[x + e * stride + o]


@njit(cache=True)
def _forward_sparse(net, prepared, obs, count, out):
    sizes, follows = net.sizes, net.follows
    keeps = net.any_follows & _ADDS
    space, x, y = prepared.space, prepared.x, prepared.y
    column, begin, values = prepared.column, prepared.begin, prepared.values
    for i in range(sizes[0]):
        for e in range(count):
            space[x + i * count + e] = obs[e, i]
    r = 0
    for layer in range(sizes.size - 1):
        rows = sizes[layer + 1]
        for o in range(rows):
            y0, e, j = y + o * count, 0, begin[r]
            size, start, v = begin[r + 1] - j, space[prepared.bias + r], values + j
            while e + LANES < count:
                _sparse_wide(space, v, column, j, size, space, x + e, count, space, y0 + e, start)
                e += 2 * LANES
            if e < count:
                _sparse_narrow(space, v, column, j, size, space, x + e, count, space, y0 + e, start)
            r += 1
        then = follows[layer]
        if then & _ADDS:
            _add(space, y, prepared.stream, rows * count)
        if keeps and then & _NORMALISED and not then & _ACTIVE:
            _keep(space, y, prepared.stream, rows * count)
        if then & _NORMALISED:
            _normalise_features(space, y, x, rows, count, prepared.scratch)
            x, y = y, x
        if then & _ACTIVE:
            activate(space, y, _NOWHERE, rows * count, net.activation, _ALPHA)
        x, y = y, x
    for e in range(count):
        for o in range(sizes[-1]):
            out[e, o] = space[x + o * count + e]
