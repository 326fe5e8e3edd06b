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

from itertools import pairwise
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
        active: whether an activation follows each layer.
        normalised: whether LayerNorm follows it; before the activation, or into the next layer.
        adds: whether it adds what went into the LayerNorm before the layer below.
        sparse: run the sparse plan.
    """

    sizes: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    stride: int
    activation: int
    active: np.ndarray
    normalised: np.ndarray
    adds: np.ndarray
    sparse: bool


class PreparedNet(NamedTuple):
    """One ticket's network laid out for `forward`, with its activations.

    Attributes:
        values: dense: ``[in][padded out]`` of every layer; sparse: the nonzeros, row by row.
        column: sparse: the column of each nonzero.
        begin: sparse: where each row begins in `values`, over all layers; one more at the end.
        bias: biases of all layers, padded like the outputs if dense.
        x: activations of the current layer.
        y: activations of the next one.
        stream: what a block of a residual network adds to its output.
        scratch: for the sums of LayerNorm.
    """

    values: np.ndarray
    column: np.ndarray
    begin: np.ndarray
    bias: np.ndarray
    x: np.ndarray
    y: np.ndarray
    stream: np.ndarray
    scratch: np.ndarray


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
    prunable, layers = net.weights[0] < arena.prunable, range(net.depth)
    return RolloutNet(
        np.array(net.sizes, np.int64),
        np.array(net.weights, np.int64),
        np.array(net.biases, np.int64),
        -(-max(net.sizes) // LANES) * LANES,
        code_of(net.function),
        np.array([net.activates(layer) for layer in layers]),
        np.array([net.is_normalised(layer) for layer in layers]),
        np.array([net.adds(layer) is not None for layer in layers]),
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
    x, y = np.zeros(room, np.float32), np.zeros(room, np.float32)
    stream = np.zeros(room if net.adds.any() else 0, np.float32)
    sums = LANES * LANES + 2 * _round_up(copies, LANES)
    scratch = np.zeros(sums if net.normalised.any() else 0, np.float32)
    if net.sparse:
        return _prepare_sparse(row, mask, net, x, y, stream, scratch)
    return _prepare_dense(row, net, x, y, stream, scratch)


@njit(cache=True)
def _prepare_dense(row, net, x, y, stream, scratch):
    sizes = net.sizes
    values_size, bias_size = 0, 0
    for layer in range(sizes.size - 1):
        width = _round_up(sizes[layer + 1], LANES)
        values_size += sizes[layer] * width
        bias_size += width
    values, bias = np.zeros(values_size, np.float32), np.zeros(bias_size, np.float32)
    v0, b0 = 0, 0
    for layer in range(sizes.size - 1):
        inp, out = sizes[layer], sizes[layer + 1]
        width = _round_up(out, LANES)
        weight = row[net.weights[layer] : net.weights[layer] + out * inp]
        for o in range(out):
            bias[b0 + o] = row[net.biases[layer] + o]
            for i in range(inp):
                values[v0 + i * width + o] = weight[o * inp + i]
        v0 += inp * width
        b0 += width
    column, begin = np.empty(0, np.int32), np.empty(0, np.int64)
    return PreparedNet(values, column, begin, bias, x, y, stream, scratch)


@njit(cache=True)
def _prepare_sparse(row, mask, net, x, y, stream, scratch):
    sizes = net.sizes
    rows, entries = 0, 0
    for layer in range(sizes.size - 1):
        rows += sizes[layer + 1]
        entries += sizes[layer] * sizes[layer + 1]
    begin, bias = np.empty(rows + 1, np.int64), np.empty(rows, np.float32)
    column, positions = np.empty(entries + 1, np.int32), np.empty(entries + 1, np.int32)
    count, r = 0, 0
    for layer in range(sizes.size - 1):
        inp, out = sizes[layer], sizes[layer + 1]
        pointer = begin[r : r + out + 1]
        count = build_rows(mask, net.weights[layer], out, inp, pointer, column, positions, count)
        for o in range(out):
            bias[r + o] = row[net.biases[layer] + o]
        r += out
    values = np.empty(count, np.float32)
    for j in range(count):
        values[j] = row[positions[j]]
    return PreparedNet(values, column, begin, bias, x, y, stream, scratch)


@njit(cache=True)
def forward(net, prepared, obs, count, out):
    """Run the network on the first ``count`` rows of ``obs [E, I]``, writing ``out [E, O]``."""
    if net.sparse:
        _forward_sparse(net, prepared, obs, count, out)
    else:
        _forward_dense(net, prepared, obs, count, out)


@njit(cache=True)
def _keep_stream(net, prepared, layer, y, size):
    """Add the stream of a residual network to ``y[:size]``, and keep it where blocks leave it."""
    stream = prepared.stream
    if net.adds[layer]:
        for i in range(0, size, LANES):
            store(y, i, load(y, i) + load(stream, i))
    if stream.size and net.normalised[layer] and not net.active[layer]:
        for i in range(0, size, LANES):
            store(stream, i, load(y, i))


# LayerNorm adds up a copy's features o by o % LANES, ascending, then the LANES sums: the one order
# that both plans can have.


@njit(cache=True)
def _add_up(scratch, sums):
    store(scratch, 0, sums)
    total = _ZERO
    for lane in range(LANES):
        total += scratch[lane]
    return splat(total)


@njit(cache=True)
def _normalise_copies(y, count, stride, features, scratch):
    """LayerNorm of every copy's row of ``y``, in place; beyond the features it has zeros."""
    share = splat(_ONE / np.float32(features))
    end = _round_up(features, LANES)
    for begin in range(0, count * stride, stride):
        sums = splat(_ZERO)
        for o in range(begin, begin + end, LANES):
            sums = sums + load(y, o)
        mean = _add_up(scratch, sums) * share
        store(scratch, 0, mean)
        y[begin + features : begin + end] = scratch[0]
        squares = splat(_ZERO)
        for o in range(begin, begin + end, LANES):
            distance = load(y, o) - mean
            store(y, o, distance)
            squares = fma(distance, distance, squares)
        scale = rsqrt(fma(_add_up(scratch, squares), share, splat(EPSILON)))
        for o in range(begin, begin + end, LANES):
            store(y, o, load(y, o) * scale)


@njit(cache=True)
def _normalise_features(y, z, features, count, scratch):
    """LayerNorm of ``y [features][count]``, into z."""
    share = splat(_ONE / np.float32(features))
    means = LANES * LANES
    scales = means + _round_up(count, LANES)
    for c in range(0, count, LANES):
        scratch[:means] = _ZERO
        for o in range(features):
            place = o % LANES * LANES
            store(scratch, place, load(scratch, place) + load(y, o * count + c))
        mean = _add_rows(scratch) * share
        store(scratch, means + c, mean)
        scratch[:means] = _ZERO
        for o in range(features):
            distance, place = load(y, o * count + c) - mean, o % LANES * LANES
            store(scratch, place, fma(distance, distance, load(scratch, place)))
        store(scratch, scales + c, rsqrt(fma(_add_rows(scratch), share, splat(EPSILON))))
    # Row by row: surplus lanes spill into the next row, which is written after.
    for o in range(features):
        for c in range(0, count, LANES):
            distance = load(y, o * count + c) - load(scratch, means + c)
            store(z, o * count + c, distance * load(scratch, scales + c))


@njit(cache=True)
def _add_rows(scratch):
    total = splat(_ZERO)
    for lane in range(LANES):
        total = total + load(scratch, lane * LANES)
    return total


@njit(cache=True)
def _forward_dense(net, prepared, obs, count, out):
    sizes, values, bias = net.sizes, prepared.values, prepared.bias
    x, y = prepared.x, prepared.y
    stride = net.stride
    for e in range(count):
        for i in range(sizes[0]):
            x[e * stride + i] = obs[e, i]
    v0, b0 = 0, 0
    for layer in range(sizes.size - 1):
        inp, width = sizes[layer], _round_up(sizes[layer + 1], LANES)
        for first in range(0, count, _ROWS):
            for e in range(first, first + _ROWS):
                for o in range(0, width, LANES):
                    store(y, e * stride + o, load(bias, b0 + o))
            x0, y0 = first * stride, first * stride
            o = 0
            while o + _WIDE <= width:
                _dense_wide(
                    x, x0, stride, 1, values, v0 + o, width, y, y0 + o, stride, inp, bias, 0
                )
                o += _WIDE
            while o < width:
                _dense_narrow(
                    x, x0, stride, 1, values, v0 + o, width, y, y0 + o, stride, inp, bias, 0
                )
                o += LANES
        _keep_stream(net, prepared, layer, y, count * stride)
        if net.normalised[layer]:
            _normalise_copies(y, count, stride, sizes[layer + 1], prepared.scratch)
        if net.active[layer]:
            for e in range(count):
                activate(y, e * stride, _NOWHERE, width, net.activation, _ALPHA)
        v0 += inp * width
        b0 += width
        x, y = y, x
    for e in range(count):
        for o in range(sizes[-1]):
            out[e, o] = x[e * stride + o]


@njit(cache=True)
def _forward_sparse(net, prepared, obs, count, out):
    sizes, values, column = net.sizes, prepared.values, prepared.column
    begin, bias = prepared.begin, prepared.bias
    x, y = prepared.x, prepared.y
    for i in range(sizes[0]):
        for e in range(count):
            x[i * count + e] = obs[e, i]
    r = 0
    for layer in range(sizes.size - 1):
        rows = sizes[layer + 1]
        for o in range(rows):
            y0, e, j = o * count, 0, begin[r]
            size = begin[r + 1] - j
            while e + LANES < count:
                _sparse_wide(values, j, column, j, size, x, e, count, y, y0 + e, bias[r])
                e += 2 * LANES
            if e < count:
                _sparse_narrow(values, j, column, j, size, x, e, count, y, y0 + e, bias[r])
            r += 1
        _keep_stream(net, prepared, layer, y, rows * count)
        if net.normalised[layer]:
            _normalise_features(y, x, rows, count, prepared.scratch)
            x, y = y, x
        if net.active[layer]:
            activate(y, _NOWHERE, _NOWHERE, rows * count, net.activation, _ALPHA)
        x, y = y, x
    for e in range(count):
        for o in range(sizes[-1]):
            out[e, o] = x[o * count + e]
