"""A network forward and backward in Numba: `forward` and `backward` of a packed ticket, then `mlp`.

Both walk the layers of one network over one panel of the batch and touch nothing but the thread's
scratch (see `layout`); the PPO and cloning kernels put their loss between them. Per panel of B
columns a dense layer costs ``2 * out * inp * B`` FLOPs forward and twice that backward, a sparse
one its share of nonzeros. The reduction order depends on shapes and nominal density alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..activations_cpu import activate, deactivate
from ..arena import Net
from ..compiling import njit
from ..threads import share
from ..vector import (
    LANES,
    load,
    store,
    sum_lanes,
    transpose,
)
from .layernorm import denormalise, normalise
from .layout import (
    ACTIVE,
    ADDED,
    COLUMNS,
    DEVIATION,
    IN,
    KEPT,
    NORMAL,
    OUT,
    PANEL,
    ROWS,
    SPARSE,
    STRIDE,
    SUMS,
    WEIGHT,
    X,
    Y,
    lay_out,
    prepare,
)
from .packing import (
    inputs,
    open_scratch,
    pack,
    read_row,
    turn,
    turn_values,
    write_row,
)
from .products import (
    add_product,
    product,
    sparse_gradient,
    sparse_product,
)

_ZERO = np.float32(0.0)
# ELU's parameter.
_ALPHA = np.float32(1.0)
# Not the literal 1, which Numba would compile a product of its own for.
_UNIT = np.int64(1)
FIRST = np.int64(0)


@njit(cache=True)
def _activate(space, y, kept, rows, count, width, activation):
    for k in range(count):
        row = np.int64(rows[k]) * PANEL
        derivative = kept + row if kept else kept
        activate(space, y + row, derivative, width, activation, _ALPHA)


@njit(cache=True)
def _deactivate(space, delta, y, kept, rows, count, width, activation):
    for k in range(count):
        row = np.int64(rows[k]) * PANEL
        derivative = kept + row if kept else kept
        deactivate(space, delta + row, y + row, derivative, width, activation, _ALPHA)


@njit(cache=True)
def _add(space, y, x, count, width):
    """Add the first ``count`` rows of panel x to those of panel y."""
    for row in range(0, count * PANEL, PANEL):
        for c in range(row, row + width, LANES):
            store(space, y + c, load(space, y + c) + load(space, x + c))


@njit(cache=True)
def _copy(space, x, y, count, width):
    """Copy the first ``count`` rows of panel x to panel y."""
    for row in range(0, count * PANEL, PANEL):
        for c in range(row, row + width, LANES):
            store(space, y + c, load(space, x + c))


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
        rows, live = packed.rows[layers[layer, ROWS] :], packed.live[layer]
        if layers[layer, SPARSE]:
            row_begin = packed.row_begin[layers[layer, ROWS] :]
            sparse_product(
                weight, packed.column, row_begin, rows, live, space, x, y, width, weight, bias
            )
        else:
            product(
                weight, begin, inp, _UNIT, space, x, PANEL, y, PANEL, out, inp, width, weight, bias
            )
        if layers[layer, ADDED]:
            _add(space, y, layers[layer, ADDED], out, width)
        active, normal = layers[layer, ACTIVE], layers[layer, NORMAL]
        if normal:
            also, deviation = y if active else normal, layers[layer, DEVIATION]
            normalise(space, y, normal, also, deviation, out, width, layout.turned)
        if active:
            _activate(space, y, layers[layer, KEPT], rows, live, width, layout.activation)


@njit(cache=True)
def _add_gradient(layout, packed, layer, delta, columns, width):
    """Add the gradient of a layer's weight and bias, given that of its output in a panel."""
    layers, space, grad = layout.layers, packed.space, packed.grad
    out, inp, x = layers[layer, OUT], layers[layer, IN], layers[layer, X]
    _, bias = places(layout, packed, layer)
    rows, live = packed.rows[layers[layer, ROWS] :], packed.live[layer]
    for k in range(live):
        row = delta + rows[k] * PANEL
        total = load(space, row)
        for c in range(LANES, width, LANES):
            total = total + load(space, row + c)
        grad[bias + rows[k]] += sum_lanes(total)
    if layers[layer, SPARSE]:
        row_begin, turned = packed.row_begin[layers[layer, ROWS] :], layout.turned
        sparse_gradient(grad, packed.column, row_begin, rows, live, space, delta, x, width, turned)
        return
    stride, sums, turned = layers[layer, STRIDE], layers[layer, SUMS], layout.turned
    for i in range(0, inp, LANES):
        for c in range(0, width, LANES):
            transpose(space, x + i * PANEL + c, PANEL, space, turned + c * stride + i, stride)
    add_product(
        space, delta, PANEL, _UNIT, space, turned, stride, sums, stride, out, columns, stride,
        space, sums,
    )  # fmt: skip


@njit(cache=True)
def backward(layout, packed, first, last, columns, width, to_input, to_weight):
    """Backward through layers ``[first, last)``, given the output's gradient in `Layout.delta`.

    Columns from ``columns`` to ``width`` of that panel must be zero, and those of the activations
    finite. Adds the gradients of weights and biases, if ``to_weight``; returns the offset of the
    panel with the input's, if ``to_input``.
    """
    layers, space = layout.layers, packed.space
    here, there = layout.delta, layout.other
    for layer in range(last - 1, first - 1, -1):
        out, inp = layers[layer, OUT], layers[layer, IN]
        begin, _ = places(layout, packed, layer)
        if layers[layer, ADDED]:
            _copy(space, here, layout.stream, out, width)
        if to_weight:
            _add_gradient(layout, packed, layer, here, columns, width)
        if layer > first or to_input:
            zeros = layout.zeros
            wanted, number = inputs(layout, packed, layer)
            if layers[layer, SPARSE]:
                sparse_product(
                    packed.turned,
                    packed.turned_row,
                    packed.column_begin[layers[layer, COLUMNS] :],
                    wanted,
                    number,
                    space,
                    here,
                    there,
                    width,
                    space,
                    zeros,
                )
            else:
                product(
                    packed.weight,
                    begin,
                    _UNIT,
                    inp,
                    space,
                    here,
                    PANEL,
                    there,
                    PANEL,
                    inp,
                    out,
                    width,
                    space,
                    zeros,
                )
            if layer > first:
                _pass_back(layout, packed, layer, last, there, width)
            here, there = there, here
    return here


@njit(cache=True)
def _pass_back(layout, packed, layer, last, delta, width):
    """Turn the gradient by a layer's input into that by the sums of the layer below."""
    layers, space, below = layout.layers, packed.space, layer - 1
    if layers[below, ACTIVE]:
        wanted, number = inputs(layout, packed, layer)
        x, kept = layers[layer, X], layers[below, KEPT]
        _deactivate(space, delta, x, kept, wanted, number, width, layout.activation)
    if layers[below, NORMAL]:
        normal, deviation = layers[below, NORMAL], layers[below, DEVIATION]
        denormalise(space, delta, normal, deviation, layers[below, OUT], width, layout.turned)
    if layer + 1 < last and layers[layer + 1, ADDED]:
        _add(space, delta, layout.stream, layers[below, OUT], width)


@njit(cache=True)
def clear_gradient(layout, packed, count):
    """Zero what `backward` adds to."""
    packed.grad[:count] = _ZERO
    layers = layout.layers
    for layer in range(layers.shape[0]):
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
                    # Read first: a conditional load would be a branch per weight.
                    total = sums[i]
                    grad[i] = total if keep[i] else _ZERO
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


@njit(cache=True)
def _forward_ticket(thread, ticket, layout, floats, integers, x, weight, mask, y):
    depth = layout.layers.shape[0]
    packed = open_scratch(layout, floats[thread], integers[thread])
    pack(layout, packed, mask[ticket], False)
    read_row(layout, packed, mask[ticket], weight[ticket], packed.weight)
    for begin in range(0, x.shape[1], PANEL):
        columns = min(PANEL, x.shape[1] - begin)
        width = (columns + LANES - 1) // LANES * LANES
        _read_panel(packed.space, layout.x, x[ticket], begin, columns, width)
        forward(layout, packed, FIRST, depth, width)
        _write_panel(packed.space, layout.layers[depth - 1, Y], y[ticket], begin, columns)


@njit(cache=True, nogil=True)
def _forward(threads, layout, floats, integers, x, weight, mask, y):
    arguments = (layout, floats, integers, x, weight, mask, y)
    share(_forward_ticket, threads, x.shape[0], arguments)


@njit(cache=True)
def _backward_ticket(
    thread, ticket, layout, floats, integers, x, weight, mask, dy, to_input, to_weight, dx, dweight
):
    depth = layout.layers.shape[0]
    packed = open_scratch(layout, floats[thread], integers[thread])
    count = pack(layout, packed, mask[ticket], False)
    turn(layout, packed, to_input)
    read_row(layout, packed, mask[ticket], weight[ticket], packed.weight)
    turn_values(layout, packed, to_input)
    if to_weight:
        clear_gradient(layout, packed, count)
    for begin in range(0, x.shape[1], PANEL):
        columns = min(PANEL, x.shape[1] - begin)
        width = (columns + LANES - 1) // LANES * LANES
        _read_panel(packed.space, layout.x, x[ticket], begin, columns, width)
        # Nobody reads the output.
        forward(layout, packed, FIRST, depth - 1, width)
        _read_panel(packed.space, layout.delta, dy[ticket], begin, columns, width)
        panel = backward(layout, packed, FIRST, depth, columns, width, to_input, to_weight)
        if to_input:
            _write_panel(packed.space, panel, dx[ticket], begin, columns)
    if to_weight:
        collect_gradient(layout, packed, mask[ticket])
        dweight[ticket, mask.shape[1] :] = _ZERO
        write_row(layout, packed, mask[ticket], packed.grad, dweight[ticket])


@njit(cache=True, nogil=True)
def _backward(threads, tickets, arguments):
    share(_backward_ticket, threads, tickets, arguments)


def _arguments(
    x: Tensor, weight: Tensor, net: Net, mask: Tensor | None, density: float, passes: int
) -> tuple:
    prunable = 0 if mask is None else mask.shape[1]
    layout = lay_out((net,), prunable, density)
    mask = x.new_empty((len(x), 0), dtype=torch.bool) if mask is None else mask.contiguous()
    threads, floats, integers = prepare(layout, len(x), passes * x.shape[1] * density)
    arrays = (tensor.contiguous().numpy() for tensor in (x, weight, mask))
    return threads, layout, floats, integers, *arrays


def mlp(x: Tensor, weight: Tensor, net: Net, mask: Tensor | None, density: float) -> Tensor:
    """Forward; see the op."""
    y = x.new_empty((*x.shape[:2], net.sizes[-1]))
    _forward(*_arguments(x, weight, net, mask, density, 1), y.numpy())
    return y


def mlp_backward(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None,
    density: float,
    dy: Tensor,
    *,
    to_input: bool = True,
    to_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x` and `weight`, those asked for; the forward pass is recomputed by panels."""
    dx = x.new_empty(x.shape if to_input else (len(x), 0, 0))
    # Filled by the kernel: torch's threads would spin on after filling it.
    dweight = weight.new_empty(weight.shape if to_weight else (len(weight), 0))
    threads, *arguments = _arguments(x, weight, net, mask, density, 4 if to_weight else 3)
    arrays = dy.contiguous().numpy(), to_input, to_weight, dx.numpy(), dweight.numpy()
    _backward(threads, len(x), (*arguments, *arrays))
    return (dx if to_input else None), (dweight if to_weight else None)
