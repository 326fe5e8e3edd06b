"""A whole network in one call: forward and backward; `acting` has rows without a gradient.

All take addresses of two int64 arrays: the ``form`` of a network for one size of batch (`layout`),
and the ``call``, which says where this call's tensors lie. Tile by tile of the batch every layer
runs while its panels are in cache. Threads share the batch by parts of many tiles, each of which
sums up gradients of its own. Per nonzero and batch row: 2 FLOPs forward and 4 backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import types

from ..activations_cpu import RELU, activate, deactivate
from ..addresses import bytes_, find_machine_code, floats, get, integers, put, shorts
from ..compiling import njit
from ..threads import share
from ..vector import (
    LANES,
    load,
    store,
)
from .acting import act
from .blas import sgemm
from .layernorm import denormalise, normalise
from .layout import (
    AT,
    BEGIN,
    BIAS,
    BIAS_GRADIENTS,
    BY_SGEMM,
    BY_TILES,
    CALL_BATCH,
    CALL_DX,
    CALL_DY,
    CALL_SAVED,
    CALL_SCRATCH,
    CALL_STEP,
    CALL_THREADS,
    CALL_X,
    CALL_Y,
    CODE,
    DBIAS,
    DELTAS,
    DENSE,
    DNORM_BIAS,
    DNORM_WEIGHT,
    DWEIGHT,
    FEATURES,
    FORM_FIRST,
    FORM_LAYER,
    GRADIENTS,
    INDEX,
    INP,
    KEPT,
    LAYERS,
    MASKED,
    NONZEROS,
    NORM_BIAS,
    NORM_GRADIENTS,
    NORM_WEIGHT,
    NORMED,
    OUT,
    PARTS,
    POSITION,
    PRIVATE,
    ROWS,
    SGEMM,
    SHARED,
    SLOPES,
    TILE,
    TURNED,
    TURNED_BEGIN,
    TURNED_FROM,
    TURNED_INDEX,
    TURNED_ROWS,
    VALUES,
    VALUES_SIZE,
    WEIGHT,
    WIDEST,
    X_PANEL,
    Y_PANEL,
)
from .masking import gather_weights, keep_masked
from .products import (
    clear_columns,
    fill,
    from_panel,
    gated_product,
    gather_all,
    narrow_gradient,
    narrow_input_gradient,
    narrow_product,
    sparse_gradient,
    sparse_product,
    sum_rows,
    to_panel,
)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit(cache=True)
def _weights(i64, layer, call, saved):
    """Where the layer's weights lie: packed, or the Parameter itself if nothing is pruned."""
    if get(i64, layer + DENSE) and not get(i64, layer + MASKED):
        return get(i64, call + WEIGHT) // 4
    return saved + get(i64, layer + VALUES)


@njit(cache=True)
def _forward_tile(m, n, i64, form, call, saved, panels, ld, count):
    """All layers over one tile of ``count`` rows."""
    sgemm_at = get(i64, form + SGEMM)
    for k in range(get(i64, form + LAYERS)):
        layer = form + FORM_FIRST + k * FORM_LAYER
        at, norm = call + get(i64, layer + AT), get(i64, layer + NORMED)
        out, inp = get(i64, layer + OUT), get(i64, layer + INP)
        x, y = panels + get(i64, layer + X_PANEL) * ld, panels + get(i64, layer + Y_PANEL) * ld
        bias, values = get(i64, at + BIAS) // 4, _weights(i64, layer, at, saved)
        code, kept, dense = get(i64, layer + CODE), np.int64(0), get(i64, layer + DENSE)
        if dense:
            for r in range(out):
                fill(m, y + r * ld, ld, get(m, bias + r) if bias else _ZERO)
        if dense == BY_SGEMM:
            sgemm(
                sgemm_at, np.int64(0), np.int64(0), ld, out, inp, m, x, ld, values, inp, _ONE, y, ld
            )
        elif dense == BY_TILES:
            narrow_product(m, values, out, inp, x, y, ld)
        else:
            sparse_product(
                m, n, i64, values, get(i64, layer + BEGIN), get(i64, layer + ROWS),
                get(i64, layer + INDEX), out, x, y, ld, bias, code == RELU and not norm,
            )  # fmt: skip
        if norm:
            normalise(
                m, y, panels + norm * ld, out, ld, get(i64, at + NORM_WEIGHT) // 4,
                get(i64, at + NORM_BIAS) // 4, _epsilon(m, i64, form, k),
            )  # fmt: skip
        if code and (dense or norm or code != RELU):
            if get(i64, layer + KEPT):
                kept = panels + get(i64, layer + KEPT) * ld
            slope = get(m, get(i64, form + SLOPES) + k)
            activate(m, y, kept, out * ld, code, slope)
        if count < ld:
            clear_columns(m, y, out, count, ld)
            if kept:
                clear_columns(m, kept, out, count, ld)
            if norm:
                clear_columns(m, panels + norm * ld, out + 1, count, ld)


@njit(cache=True)
def _epsilon(m, i64, form, k):
    """What a layer's norm adds to variances."""
    return get(m, get(i64, form + SLOPES) + get(i64, form + LAYERS) + k)


@njit(cache=True)
def _tiles(i64, form, call, part):
    """Of the batch's tiles the first of a part, and the one after its last."""
    tile, parts = get(i64, form + TILE), get(i64, form + PARTS)
    tiles = (get(i64, call + CALL_BATCH) + tile - 1) // tile
    return tiles * part // parts, tiles * (part + 1) // parts


@njit(cache=True)
def _private(i64, form, call, part):
    """The scratch that a part has to itself."""
    scratch = get(i64, call + CALL_SCRATCH) // 4 + get(i64, form + SHARED)
    return scratch + part * get(i64, form + PRIVATE)


@njit(cache=True, nogil=True)
def _forward_part(thread, part, base, form, call):
    m, n, i64 = floats(base), shorts(base), integers(base)
    layers = get(i64, form + LAYERS)
    last = form + FORM_FIRST + (layers - 1) * FORM_LAYER
    out, inp = get(i64, last + OUT), get(i64, form + FORM_FIRST + INP)
    batch, tile, step = (
        get(i64, call + CALL_BATCH),
        get(i64, form + TILE),
        get(i64, call + CALL_STEP),
    )
    x, y = get(i64, call + CALL_X) // 4, get(i64, call + CALL_Y) // 4
    saved, scratch = get(i64, call + CALL_SAVED) // 4, _private(i64, form, call, part)
    begin, end = _tiles(i64, form, call, part)
    panels = saved + get(i64, form + VALUES_SIZE)
    panels += begin * step if step else part * get(i64, form + FEATURES) * tile
    for t in range(begin, end):
        first = t * tile
        count = min(tile, batch - first)
        ld = (count + LANES - 1) // LANES * LANES
        to_panel(m, x + first * inp, inp, count, panels, ld, scratch)
        _forward_tile(m, n, i64, form, call, saved, panels, ld, count)
        at = panels + get(i64, last + Y_PANEL) * ld
        from_panel(m, at, ld, y + first * out, out, count, scratch)
        panels += step


@njit(cache=True)
def _forward(base, form_at, call_at):
    m, n, b, i64 = floats(base), shorts(base), bytes_(base), integers(base)
    form, call = form_at // 8, call_at // 8
    saved = get(i64, call + CALL_SAVED) // 4
    for k in range(get(i64, form + LAYERS)):
        layer = form + FORM_FIRST + k * FORM_LAYER
        if not get(i64, layer + DENSE) or get(i64, layer + MASKED):
            weight = get(i64, call + get(i64, layer + AT) + WEIGHT) // 4
            gather_weights(m, n, b, i64, layer, weight, saved + get(i64, layer + VALUES))
    share(_forward_part, get(i64, call + CALL_THREADS), get(i64, form + PARTS), (base, form, call))


@njit(cache=True)
def _lowest(i64, form, call):
    """The first layer that a gradient must reach."""
    layers = get(i64, form + LAYERS)
    if get(i64, call + CALL_DX):
        return np.int64(0)
    for k in range(layers):
        layer = form + FORM_FIRST + k * FORM_LAYER
        at = call + get(i64, layer + AT)
        if get(i64, at + DWEIGHT) or get(i64, at + DBIAS):
            return np.int64(k)
        if get(i64, layer + NORMED) and (get(i64, at + DNORM_WEIGHT) or get(i64, at + DNORM_BIAS)):
            return np.int64(k)
    return layers


@njit(cache=True)
def _turn(m, n, i64, form, call, saved, lowest):
    """Turn the values for the products with the transposed weights."""
    scratch = get(i64, call + CALL_SCRATCH) // 4
    for k in range(lowest, get(i64, form + LAYERS)):
        layer = form + FORM_FIRST + k * FORM_LAYER
        if not get(i64, layer + DENSE) and (k > lowest or get(i64, call + CALL_DX)):
            values, source = saved + get(i64, layer + VALUES), get(i64, layer + TURNED_FROM)
            turned, size = scratch + get(i64, layer + TURNED), get(i64, layer + NONZEROS)
            gather_all(m, n, values, source, size, turned)


@njit(cache=True)
def _begin_gradients(m, i64, form, call, part, scratch, lowest):
    """Zero what a part sums up."""
    for k in range(lowest, get(i64, form + LAYERS)):
        layer = form + FORM_FIRST + k * FORM_LAYER
        at = call + get(i64, layer + AT)
        if get(i64, layer + NORMED):
            weight, bias = _norm_gradients(i64, layer, scratch)
            fill(m, weight, get(i64, layer + OUT), _ZERO)
            fill(m, bias, get(i64, layer + OUT), _ZERO)
        if get(i64, at + DBIAS):
            fill(m, scratch + get(i64, layer + BIAS_GRADIENTS), get(i64, layer + OUT), _ZERO)
        if get(i64, at + DWEIGHT):
            size = get(i64, layer + NONZEROS)
            if get(i64, layer + DENSE):
                size = get(i64, layer + OUT) * get(i64, layer + INP)
            fill(m, _gradients(i64, layer, at, part, scratch), size, _ZERO)


@njit(cache=True)
def _gradients(i64, layer, at, part, scratch):
    """Where a part sums up the gradient of a layer's weights."""
    if get(i64, layer + DENSE) and part == 0:
        return get(i64, at + DWEIGHT) // 4
    return scratch + get(i64, layer + GRADIENTS)


@njit(cache=True)
def _norm_gradients(i64, layer, scratch):
    """Where a part sums up the gradients of a norm's weight and bias."""
    weight = scratch + get(i64, layer + NORM_GRADIENTS)
    return weight, weight + (get(i64, layer + OUT) + LANES - 1) // LANES * LANES


@njit(cache=True)
def _add(m, total, term, size):
    """``total[:size] += term[:size]``."""
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        store(m, total + i, load(m, total + i) + load(m, term + i))
    for i in range(whole, size):
        put(m, total + i, get(m, total + i) + get(m, term + i))


@njit(cache=True)
def _add_parts(m, total, grad, size, parts, private):
    """Add up a share of a bias's gradient, where it is wanted: ``total`` is 0 otherwise."""
    if total:
        fill(m, total, size, _ZERO)
        for part in range(parts):
            _add(m, total, grad + part * private, size)


@njit(cache=True, nogil=True)
def _end_gradients(thread, item, base, form, call, lowest):
    """Add up the parts' gradients, of a share of every layer's rows, and put them in place."""
    m, n, b, i64 = floats(base), shorts(base), bytes_(base), integers(base)
    parts = get(i64, form + PARTS)
    scratch, private = _private(i64, form, call, 0), get(i64, form + PRIVATE)
    for k in range(lowest, get(i64, form + LAYERS)):
        layer = form + FORM_FIRST + k * FORM_LAYER
        at = call + get(i64, layer + AT)
        out, inp = get(i64, layer + OUT), get(i64, layer + INP)
        first, end = out * item // parts, out * (item + 1) // parts
        dweight, dbias = get(i64, at + DWEIGHT) // 4, get(i64, at + DBIAS) // 4
        grad = scratch + get(i64, layer + BIAS_GRADIENTS) + first
        _add_parts(m, dbias + first if dbias else dbias, grad, end - first, parts, private)
        if get(i64, layer + NORMED):
            weight, bias = _norm_gradients(i64, layer, scratch + first)
            for grad, to in (
                (weight, get(i64, at + DNORM_WEIGHT) // 4),
                (bias, get(i64, at + DNORM_BIAS) // 4),
            ):
                _add_parts(m, to + first if to else to, grad, end - first, parts, private)
        if not dweight:
            continue
        grad = scratch + get(i64, layer + GRADIENTS)
        if get(i64, layer + DENSE):
            for part in range(1, parts):
                term = grad + part * private + first * inp
                _add(m, dweight + first * inp, term, (end - first) * inp)
            if get(i64, layer + MASKED):
                keep_masked(m, b, i64, layer, dweight, first, end)
            continue
        begin, rows, position = (
            get(i64, layer + BEGIN),
            get(i64, layer + ROWS),
            get(i64, layer + POSITION),
        )
        j = get(i64, begin + first)
        for part in range(1, parts):
            _add(m, grad + j, grad + part * private + j, get(i64, begin + end) - j)
        for r in range(first, end):
            fill(m, dweight + np.int64(get(n, rows + r)) * inp, inp, _ZERO)
            stop = get(i64, begin + r + 1)
            while j < stop:
                put(m, dweight + np.int64(get(n, position + j)), get(m, grad + j))
                j += 1


@njit(cache=True)
def _backward_tile(m, n, i64, form, call, saved, panels, part, ld, here, there, lowest):
    """All layers over one tile, from the last; returns where the gradient of the input lies."""
    sgemm_at = get(i64, form + SGEMM)
    shared, scratch = get(i64, call + CALL_SCRATCH) // 4, _private(i64, form, call, part)
    derived = False
    for k in range(get(i64, form + LAYERS) - 1, lowest - 1, -1):
        layer = form + FORM_FIRST + k * FORM_LAYER
        at, norm = call + get(i64, layer + AT), get(i64, layer + NORMED)
        out, inp = get(i64, layer + OUT), get(i64, layer + INP)
        x, y = panels + get(i64, layer + X_PANEL) * ld, panels + get(i64, layer + Y_PANEL) * ld
        code, dense = get(i64, layer + CODE), get(i64, layer + DENSE)
        if code and not derived:
            kept = np.int64(0)
            if get(i64, layer + KEPT):
                kept = panels + get(i64, layer + KEPT) * ld
            slope = get(m, get(i64, form + SLOPES) + k)
            deactivate(m, here, y, kept, out * ld, code, slope)
        if norm:
            weight, bias = _norm_gradients(i64, layer, scratch)
            denormalise(
                m, here, panels + norm * ld, out, ld, get(i64, at + NORM_WEIGHT) // 4,
                weight if get(i64, at + DNORM_WEIGHT) else np.int64(0),
                bias if get(i64, at + DNORM_BIAS) else np.int64(0),
            )  # fmt: skip
        if get(i64, at + DBIAS):
            sum_rows(m, scratch + get(i64, layer + BIAS_GRADIENTS), here, out, ld)
        if get(i64, at + DWEIGHT):
            grad = _gradients(i64, layer, at, part, scratch)
            if dense == BY_TILES:
                narrow_gradient(m, grad, out, inp, x, here, ld, scratch)
            elif dense:
                sgemm(
                    sgemm_at, np.int64(1), np.int64(0), inp, out, ld,
                    m, x, ld, here, ld, _ONE, grad, inp,
                )  # fmt: skip
            else:
                sparse_gradient(
                    m, n, i64, grad, get(i64, layer + BEGIN), get(i64, layer + ROWS),
                    get(i64, layer + INDEX), out, x, here, ld, scratch,
                )  # fmt: skip
        if k > lowest or get(i64, call + CALL_DX):
            # The layer's input is the output of ReLU, where that is what comes before.
            derived = k > 0 and get(i64, layer - FORM_LAYER + CODE) == RELU and dense != BY_SGEMM
            gate = x if derived else np.int64(0)
            values = _weights(i64, layer, at, saved)
            if dense == BY_TILES:
                narrow_input_gradient(m, values, out, inp, here, there, ld, gate)
            elif dense:
                sgemm(
                    sgemm_at, np.int64(0), np.int64(1), ld, inp, out,
                    m, here, ld, values, inp, _ZERO, there, ld,
                )  # fmt: skip
            else:
                turned, begin = shared + get(i64, layer + TURNED), get(i64, layer + TURNED_BEGIN)
                rows, index = get(i64, layer + TURNED_ROWS), get(i64, layer + TURNED_INDEX)
                if derived:
                    gated_product(m, n, i64, turned, begin, rows, index, inp, here, there, ld, gate)
                else:
                    sparse_product(
                        m, n, i64, turned, begin, rows, index, inp, here, there, ld, np.int64(0),
                        False,
                    )  # fmt: skip
            here, there = there, here
    return here


@njit(cache=True, nogil=True)
def _backward_part(thread, part, base, form, call, lowest):
    m, n, i64 = floats(base), shorts(base), integers(base)
    saved, scratch = get(i64, call + CALL_SAVED) // 4, _private(i64, form, call, part)
    _begin_gradients(m, i64, form, call, part, scratch, lowest)
    last = form + FORM_FIRST + (get(i64, form + LAYERS) - 1) * FORM_LAYER
    out, inp = get(i64, last + OUT), get(i64, form + FORM_FIRST + INP)
    batch, tile = get(i64, call + CALL_BATCH), get(i64, form + TILE)
    dx, dy = get(i64, call + CALL_DX) // 4, get(i64, call + CALL_DY) // 4
    begin, end = _tiles(i64, form, call, part)
    panels = saved + get(i64, form + VALUES_SIZE) + begin * get(i64, form + FEATURES) * tile
    here = scratch + get(i64, form + DELTAS)
    there = here + get(i64, form + WIDEST) * tile
    for t in range(begin, end):
        first = t * tile
        count = min(tile, batch - first)
        ld = (count + LANES - 1) // LANES * LANES
        to_panel(m, dy + first * out, out, count, here, ld, scratch)
        at = _backward_tile(m, n, i64, form, call, saved, panels, part, ld, here, there, lowest)
        if dx:
            from_panel(m, at, ld, dx + first * inp, inp, count, scratch)
        panels += get(i64, form + FEATURES) * tile


@njit(cache=True)
def _backward(base, form_at, call_at):
    m, n, i64 = floats(base), shorts(base), integers(base)
    form, call = form_at // 8, call_at // 8
    threads, parts = get(i64, call + CALL_THREADS), get(i64, form + PARTS)
    lowest = _lowest(i64, form, call)
    _turn(m, n, i64, form, call, get(i64, call + CALL_SAVED) // 4, lowest)
    share(_backward_part, threads, parts, (base, form, call, lowest))
    share(_end_gradients, threads, parts, (base, form, call, lowest))


# Without the GIL where another thread may do much meanwhile; giving it back and waiting for it
# costs a small network its gain.
@njit(cache=True, nogil=True)
def _forward_alone(base, form_at, call_at):
    _forward(base, form_at, call_at)


@njit(cache=True, nogil=True)
def _backward_alone(base, form_at, call_at):
    _backward(base, form_at, call_at)


_SIGNATURE = (types.int64,) * 3


@cache
def kernels() -> tuple[Callable[[int, int, int], None], ...]:
    """Compiled ``(act, forward, backward, forward, backward)``, the last two without the GIL.

    Each takes 0, the form and the call.
    """
    functions = act, _forward, _backward, _forward_alone, _backward_alone
    for function in functions:
        function.compile(_SIGNATURE)
    # Numba's own dispatch on the types of arguments takes as long as a small network.
    return tuple(function.get_overload(_SIGNATURE) for function in functions)


def addresses() -> tuple[int, ...]:
    """Where the machine code of ``(act, forward, backward)`` begins, of Numba's own convention."""
    return tuple(find_machine_code(function, _SIGNATURE) for function in (act, _forward, _backward))
