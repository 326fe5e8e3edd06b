"""A network forward and backward in Numba: `forward` and `backward` of a packed ticket, then `mlp`.

Both walk the layers of one network over one panel of the batch and touch nothing but the thread's
scratch (see `layout`); the PPO and cloning kernels put their loss between them. Per panel of B
columns a dense layer costs ``2 * out * inp * B`` FLOPs forward and twice that backward, a sparse
one its share of nonzeros. The reduction order depends on shapes and nominal density alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparse_tickets.kernels.arena import Net
from sparse_tickets.kernels.mlp.layout import (
    COLUMNS,
    HIDDEN,
    IN,
    OUT,
    PANEL,
    ROWS,
    SPARSE,
    STRIDE,
    SUMS,
    WEIGHT,
    X,
    Y,
    build_rows,
    lay_out,
    open_scratch,
    over_tickets,
    pack,
    read_row,
    turn_values,
    write_row,
)
from sparse_tickets.kernels.vector import (
    LANES,
    fma,
    load,
    make_sparse_tile,
    make_tile,
    maximum,
    splat,
    store,
    sum_each,
    sum_lanes,
    tanh,
    transpose,
)

__all__ = [
    "backward",
    "build_rows",
    "clear_gradient",
    "collect_gradient",
    "forward",
    "gather",
    "mlp",
]

# Accumulators, one row of inputs and a broadcast must fit the registers: 32, but 16 on AVX2.
_WIDE = 2 if LANES == 8 else 4
_ZERO = np.float32(0.0)
# Not the literal 1, which Numba would compile a product of its own for.
_UNIT = np.int64(1)
FIRST = np.int64(0)

_tile_6 = make_tile(6, _WIDE)
_tile_4 = make_tile(4, _WIDE)
_tile_1 = make_tile(1, _WIDE)
_tile_6_narrow = make_tile(6, 1)
_tile_1_narrow = make_tile(1, 1)
_add_tile_6 = make_tile(6, _WIDE, accumulate=True)
_add_tile_4 = make_tile(4, _WIDE, accumulate=True)
_add_tile_1 = make_tile(1, _WIDE, accumulate=True)
_add_tile_6_narrow = make_tile(6, 1, accumulate=True)
_add_tile_1_narrow = make_tile(1, 1, accumulate=True)
_sparse_tile_8 = make_sparse_tile(8)
_sparse_tile_1 = make_sparse_tile(1)


def _make_product(tile_6, tile_4, tile_1, tile_6_narrow, tile_1_narrow):
    """A product of any size from tiles: arguments of `make_tile`; LANES divides `width`."""

    @njit(cache=True)
    def product(a, a0, ar, ad, x, x0, xd, y, y0, ys, rows, depth, width, bias, b0):
        wide = width // (_WIDE * LANES) * (_WIDE * LANES)
        for c in range(0, wide, _WIDE * LANES):
            r = 0
            while r + 6 <= rows:
                tile_6(
                    a,
                    a0 + r * ar,
                    ar,
                    ad,
                    x,
                    x0 + c,
                    xd,
                    y,
                    y0 + r * ys + c,
                    ys,
                    depth,
                    bias,
                    b0 + r,
                )
                r += 6
            while r + 4 <= rows:
                tile_4(
                    a,
                    a0 + r * ar,
                    ar,
                    ad,
                    x,
                    x0 + c,
                    xd,
                    y,
                    y0 + r * ys + c,
                    ys,
                    depth,
                    bias,
                    b0 + r,
                )
                r += 4
            while r < rows:
                tile_1(
                    a,
                    a0 + r * ar,
                    ar,
                    ad,
                    x,
                    x0 + c,
                    xd,
                    y,
                    y0 + r * ys + c,
                    ys,
                    depth,
                    bias,
                    b0 + r,
                )
                r += 1
        for c in range(wide, width, LANES):
            r = 0
            while r + 6 <= rows:
                tile_6_narrow(
                    a,
                    a0 + r * ar,
                    ar,
                    ad,
                    x,
                    x0 + c,
                    xd,
                    y,
                    y0 + r * ys + c,
                    ys,
                    depth,
                    bias,
                    b0 + r,
                )
                r += 6
            while r < rows:
                tile_1_narrow(
                    a,
                    a0 + r * ar,
                    ar,
                    ad,
                    x,
                    x0 + c,
                    xd,
                    y,
                    y0 + r * ys + c,
                    ys,
                    depth,
                    bias,
                    b0 + r,
                )
                r += 1

    return product


_product = _make_product(_tile_6, _tile_4, _tile_1, _tile_6_narrow, _tile_1_narrow)
_add_product = _make_product(
    _add_tile_6, _add_tile_4, _add_tile_1, _add_tile_6_narrow, _add_tile_1_narrow
)


@njit(cache=True)
def _sparse_product(values, index, begin, rows, x, x0, y, y0, width, bias, b0):
    """``rows`` compressed rows times a panel."""
    if width == PANEL:
        for r in range(rows):
            _sparse_tile_8(
                values, index, begin[r], begin[r + 1], x, x0, PANEL, y, y0 + r * PANEL, bias[b0 + r]
            )
        return
    for c in range(0, width, LANES):
        for r in range(rows):
            _sparse_tile_1(
                values,
                index,
                begin[r],
                begin[r + 1],
                x,
                x0 + c,
                PANEL,
                y,
                y0 + r * PANEL + c,
                bias[b0 + r],
            )


@njit(cache=True)
def _flush(grad, j, partial):
    """Add the lane sums of the registers in ``partial`` to the `LANES` gradients that end at j."""
    first = j + 1 - LANES
    store(grad, first, load(grad, first) + sum_each(partial, 0))


@njit(cache=True)
def _sparse_gradient(grad, column, begin, rows, delta, delta0, x, x0, width, partial):
    """``grad[j] += delta[row] . x[column]`` over the nonzeros, `LANES` to a reduction."""
    slot = 0
    for r in range(rows):
        d0 = delta0 + r * PANEL
        if width == PANEL:
            a, b = load(delta, d0), load(delta, d0 + LANES)
            c, d = load(delta, d0 + 2 * LANES), load(delta, d0 + 3 * LANES)
            e, f = load(delta, d0 + 4 * LANES), load(delta, d0 + 5 * LANES)
            g, h = load(delta, d0 + 6 * LANES), load(delta, d0 + 7 * LANES)
            for j in range(begin[r], begin[r + 1]):
                k = x0 + column[j] * PANEL
                even = fma(c, load(x, k + 2 * LANES), a * load(x, k))
                odd = fma(d, load(x, k + 3 * LANES), b * load(x, k + LANES))
                even = fma(e, load(x, k + 4 * LANES), even)
                odd = fma(f, load(x, k + 5 * LANES), odd)
                even = fma(g, load(x, k + 6 * LANES), even)
                odd = fma(h, load(x, k + 7 * LANES), odd)
                store(partial, slot * LANES, even + odd)
                slot += 1
                if slot == LANES:
                    _flush(grad, j, partial)
                    slot = 0
        else:
            for j in range(begin[r], begin[r + 1]):
                k = x0 + column[j] * PANEL
                total = load(delta, d0) * load(x, k)
                for i in range(LANES, width, LANES):
                    total = fma(load(delta, d0 + i), load(x, k + i), total)
                store(partial, slot * LANES, total)
                slot += 1
                if slot == LANES:
                    _flush(grad, j, partial)
                    slot = 0
    for s in range(slot):
        grad[begin[rows] - slot + s] += sum_lanes(load(partial, s * LANES))


@njit(cache=True)
def _activate(space, y, rows, width, relu):
    for r in range(y, y + rows * PANEL, PANEL):
        if relu:
            for c in range(r, r + width, LANES):
                store(space, c, maximum(load(space, c), splat(_ZERO)))
        else:
            for c in range(r, r + width, LANES):
                store(space, c, tanh(load(space, c)))


@njit(cache=True)
def _deactivate(space, delta, y, rows, width, relu):
    """Multiply the gradient by the activation's derivative, which its output ``y`` tells."""
    for r in range(0, rows * PANEL, PANEL):
        if relu:
            for c in range(r, r + width):
                space[delta + c] = space[delta + c] if space[y + c] > _ZERO else _ZERO
        else:
            for c in range(r, r + width, LANES):
                value, gradient = load(space, y + c), load(space, delta + c)
                store(space, delta + c, fma(splat(_ZERO) - gradient * value, value, gradient))


@njit(cache=True)
def places(layout, packed, layer):
    """Where a layer's weight and bias begin in packed order."""
    bias = layout.layers.shape[0] + layer
    # int64, as every other offset: each mixture of types would compile the products once more.
    return np.int64(packed.begin[layer]), np.int64(packed.begin[bias])


@njit(cache=True)
def forward(layout, packed, first, last, width):
    """Run layers ``[first, last)`` over a panel of ``width`` columns, a multiple of LANES.

    Reads the panel `Layout.x`; the output is the panel Y of the last layer.
    """
    layers, space = layout.layers, packed.space
    for layer in range(first, last):
        out, inp, x, y = layers[layer, OUT], layers[layer, IN], layers[layer, X], layers[layer, Y]
        begin, bias = places(layout, packed, layer)
        weight = packed.weight
        if layers[layer, SPARSE]:
            rows = packed.row_begin[layers[layer, ROWS] :]
            _sparse_product(
                weight, packed.column, rows, out, space, x, space, y, width, weight, bias
            )
        else:
            _product(
                weight,
                begin,
                inp,
                _UNIT,
                space,
                x,
                PANEL,
                space,
                y,
                PANEL,
                out,
                inp,
                width,
                weight,
                bias,
            )
        if layers[layer, HIDDEN]:
            _activate(space, y, out, width, layout.relu)


@njit(cache=True)
def backward(layout, packed, first, last, columns, width, to_input):
    """Add the gradient of layers ``[first, last)``, given that of the output in `Layout.delta`.

    Columns from ``columns`` to ``width`` of that panel must be zero, and those of the activations
    finite. Returns the offset of the panel with the input's gradient, if ``to_input``.
    """
    layers, space, grad = layout.layers, packed.space, packed.grad
    here, there = layout.delta, layout.other
    for layer in range(last - 1, first - 1, -1):
        out, inp, x = layers[layer, OUT], layers[layer, IN], layers[layer, X]
        begin, bias = places(layout, packed, layer)
        for o in range(out):
            total = load(space, here + o * PANEL)
            for c in range(LANES, width, LANES):
                total = total + load(space, here + o * PANEL + c)
            grad[bias + o] += sum_lanes(total)
        if layers[layer, SPARSE]:
            rows = packed.row_begin[layers[layer, ROWS] :]
            partial = space[layout.turned :]
            _sparse_gradient(grad, packed.column, rows, out, space, here, space, x, width, partial)
        else:
            stride, sums, turned = layers[layer, STRIDE], layers[layer, SUMS], layout.turned
            for i in range(0, inp, LANES):
                for c in range(0, width, LANES):
                    transpose(
                        space, x + i * PANEL + c, PANEL, space, turned + c * stride + i, stride
                    )
            _add_product(
                space,
                here,
                PANEL,
                _UNIT,
                space,
                turned,
                stride,
                space,
                sums,
                stride,
                out,
                columns,
                stride,
                space,
                0,
            )
        if layer > first or to_input:
            if layers[layer, SPARSE]:
                turned_begin = packed.column_begin[layers[layer, COLUMNS] :]
                _sparse_product(
                    packed.turned,
                    packed.turned_row,
                    turned_begin,
                    inp,
                    space,
                    here,
                    space,
                    there,
                    width,
                    space,
                    layout.zeros,
                )
            else:
                _product(
                    packed.weight,
                    begin,
                    _UNIT,
                    inp,
                    space,
                    here,
                    PANEL,
                    space,
                    there,
                    PANEL,
                    inp,
                    out,
                    width,
                    space,
                    layout.zeros,
                )
            if layer > first:
                _deactivate(space, there, x, inp, width, layout.relu)
            here, there = there, here
    return here


@njit(cache=True)
def clear_gradient(layout, packed, count):
    """Zero what `backward` adds to, and the zeros it reads."""
    packed.grad[:count] = _ZERO
    layers = layout.layers
    for layer in range(layers.shape[0]):
        begin = layout.zeros
        packed.space[begin : begin + layers[layer, IN]] = _ZERO
        if not layers[layer, SPARSE]:
            begin = layers[layer, SUMS]
            packed.space[begin : begin + layers[layer, OUT] * layers[layer, STRIDE]] = _ZERO


@njit(cache=True)
def collect_gradient(layout, packed, mask_row):
    """Move the dense layers' gradients into packed order, zero off the mask."""
    layers = layout.layers
    for layer in range(layers.shape[0]):
        if layers[layer, SPARSE]:
            continue
        out, inp, stride = layers[layer, OUT], layers[layer, IN], layers[layer, STRIDE]
        masked = layers[layer, WEIGHT] < mask_row.shape[0]
        for o in range(out):
            sums = packed.space[layers[layer, SUMS] + o * stride :]
            grad = packed.grad[packed.begin[layer] + o * inp :]
            if masked:
                keep = mask_row[layers[layer, WEIGHT] + o * inp :]
                for i in range(inp):
                    grad[i] = sums[i] if keep[i] else _ZERO
            else:
                for i in range(inp):
                    grad[i] = sums[i]


@njit(cache=True)
def gather(space, panel, source, index, columns, width):
    """Rows ``source[index[:columns]]`` of ``[samples, features]`` as a panel with a zero tail."""
    for feature in range(source.shape[1]):
        row = panel + feature * PANEL
        for c in range(columns):
            space[row + c] = source[index[c], feature]
        for c in range(columns, width):
            space[row + c] = _ZERO


@njit(cache=True)
def _read_panel(space, panel, source, begin, columns, width):
    """Rows ``[begin, begin + columns)`` of ``source [B, features]`` as a panel with a zero tail."""
    for feature in range(source.shape[1]):
        row = panel + feature * PANEL
        for c in range(columns):
            space[row + c] = source[begin + c, feature]
        for c in range(columns, width):
            space[row + c] = _ZERO


@njit(cache=True)
def _write_panel(space, panel, target, begin, columns):
    for feature in range(target.shape[1]):
        for c in range(columns):
            target[begin + c, feature] = space[panel + feature * PANEL + c]


@njit(cache=True, nogil=True)
def _forward(layout, floats, integers, first, last, x, weight, mask, y):
    depth = layout.layers.shape[0]
    packed = open_scratch(layout, floats, integers)
    for ticket in range(first, last):
        count = pack(layout, packed, mask[ticket])
        read_row(packed, count, mask[ticket], weight[ticket], packed.weight)
        for begin in range(0, x.shape[1], PANEL):
            columns = min(PANEL, x.shape[1] - begin)
            width = (columns + LANES - 1) // LANES * LANES
            _read_panel(packed.space, layout.x, x[ticket], begin, columns, width)
            forward(layout, packed, FIRST, depth, width)
            _write_panel(packed.space, layout.layers[depth - 1, Y], y[ticket], begin, columns)


@njit(cache=True, nogil=True)
def _backward(layout, floats, integers, first, last, x, weight, mask, dy, to_input, dx, dweight):
    depth = layout.layers.shape[0]
    packed = open_scratch(layout, floats, integers)
    for ticket in range(first, last):
        count = pack(layout, packed, mask[ticket])
        read_row(packed, count, mask[ticket], weight[ticket], packed.weight)
        turn_values(layout, packed)
        clear_gradient(layout, packed, count)
        for begin in range(0, x.shape[1], PANEL):
            columns = min(PANEL, x.shape[1] - begin)
            width = (columns + LANES - 1) // LANES * LANES
            _read_panel(packed.space, layout.x, x[ticket], begin, columns, width)
            forward(layout, packed, FIRST, depth, width)
            _read_panel(packed.space, layout.delta, dy[ticket], begin, columns, width)
            panel = backward(layout, packed, FIRST, depth, columns, width, to_input)
            if to_input:
                _write_panel(packed.space, panel, dx[ticket], begin, columns)
        collect_gradient(layout, packed, mask[ticket])
        write_row(packed, count, mask[ticket], packed.grad, dweight[ticket])


def _arguments(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None, density: float):
    prunable = 0 if mask is None else mask.shape[1]
    layout = lay_out((net,), prunable, density)
    mask = torch.empty((len(x), 0), dtype=torch.bool) if mask is None else mask.contiguous()
    return layout, len(x), x.contiguous().numpy(), weight.contiguous().numpy(), mask.numpy()


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None, density: float) -> Tensor:
    """Forward; see the op."""
    y = x.new_empty((*x.shape[:2], net.sizes[-1]))
    over_tickets(_forward, *_arguments(x, weight, net, mask, density), y.numpy())
    return y


def mlp_backward(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None,
    density: float,
    dy: Tensor,
    to_input: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `x` (if asked) and `weight`; the forward pass is recomputed, panel by panel."""
    dx = x.new_empty(x.shape if to_input else (len(x), 0, 0))
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    over_tickets(
        _backward,
        *_arguments(x, weight, net, mask, density),
        dy.contiguous().numpy(),
        to_input,
        dx.numpy(),
        dweight.numpy(),
    )
    return (dx if to_input else None), dweight
