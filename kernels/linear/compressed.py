"""Compressed rows on the CPU: forward, input gradient and, in one pass, the whole backward.

A row of nonzeros is a chain of fused multiply-adds on accumulators that never leave their
registers. Per nonzero and panel of batch rows: PANEL/LANES loads from L1 or L2 and as many
multiply-adds. Beyond 95% sparsity the products cost less than moving the activations, once in and
once out: (inp + out) * 4 bytes per batch row.

Work is cut by batch alone, never by threads, and summed in a fixed order: results do not depend on
the number of threads.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from ..compiling import njit
from ..threads import count_threads, share
from ..tiles_cpu import make_sparse_tile
from ..vector import LANES, aligned_empty, fma, load, store, sum_each, sum_lanes
from .panels import PANEL, from_panel, to_panel
from .patterns import Pattern

__all__ = ["backward", "flat", "multiply"]

# The batch is cut into at most so many groups, each with its own panels and, backward, its own sums
# of the weight gradient.
_GROUPS = 16
# Rows of a weight gradient whose groups are added up together.
_CHUNK = 32

_wide_tile = make_sparse_tile(PANEL // LANES)
_narrow_tile = make_sparse_tile(1)


@njit(cache=True)
def _multiply_panel(values, begin, column, row, rows, count, x_panel, bias, y_panel):
    """``y_panel[r] = bias[row + r] + sum_j values[j] x_panel[column[j]]``."""
    if count <= LANES:
        for r in range(rows):
            j, y, start = begin[row + r], r * PANEL, bias[row + r]
            size = begin[row + r + 1] - j
            _narrow_tile(values, j, column, j, size, x_panel, 0, PANEL, y_panel, y, start)
    else:
        for r in range(rows):
            j, y, start = begin[row + r], r * PANEL, bias[row + r]
            size = begin[row + r + 1] - j
            _wide_tile(values, j, column, j, size, x_panel, 0, PANEL, y_panel, y, start)


@njit(cache=True)
def _gather(weight, begin, position, tickets, out):
    """The listed tickets' nonzeros, in the order of ``position``."""
    values = np.empty(position.size, np.float32)
    for p in tickets:
        for j in range(begin[p * out], begin[(p + 1) * out]):
            values[j] = weight[position[j]]
    return values


@njit(cache=True)
def _product_item(
    thread, item, groups, x, values, begin, column, bias, y, tickets, batch, inp, out
):
    """A group of panels of one ticket of ``y[p] = x[p] wᵀ + bias[p]``."""
    panels = (batch + PANEL - 1) // PANEL
    p = tickets[item // groups]
    group = item % groups
    x_panel = aligned_empty(inp * PANEL)
    y_panel = aligned_empty(out * PANEL)
    for panel in range(group * panels // groups, (group + 1) * panels // groups):
        first = panel * PANEL
        count = min(PANEL, batch - first)
        to_panel(x, (p * batch + first) * inp, inp, count, x_panel)
        _multiply_panel(values, begin, column, p * out, out, count, x_panel, bias, y_panel)
        from_panel(y_panel, y, (p * batch + first) * out, out, count)


@njit(cache=True, nogil=True)
def _product(
    threads, groups, x, weight, begin, column, position, bias, y, tickets, batch, inp, out
):
    values = _gather(weight, begin, position, tickets, out)
    arguments = (groups, x, values, begin, column, bias, y, tickets, batch, inp, out)
    share(_product_item, threads, tickets.size * groups, arguments)


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor, contiguous, as these kernels take it."""
    return tensor.detach().contiguous().numpy().reshape(-1)


def multiply(
    x: np.ndarray,
    weight: np.ndarray,
    pattern: Pattern,
    bias: np.ndarray,
    y: np.ndarray,
    tickets: np.ndarray,
    batch: int,
) -> None:
    """``y[p] = x[p] w[p]ᵀ + bias[p]`` for the listed tickets.

    Args:
        x: ``[P * batch * inp]`` float32.
        weight: ``[P * out * inp]`` float32.
        pattern: of the weight's mask.
        bias: ``[P * out]`` float32.
        y: ``[P * batch * out]`` float32, written for the listed tickets.
        tickets: int64.
        batch: rows per ticket.
    """
    groups = _count_groups(batch)
    threads = _count_threads(pattern, len(tickets) * groups, batch)
    _product(
        threads, groups, x, weight, *pattern.rows, bias, y, tickets, batch, pattern.inp, pattern.out
    )


def _count_groups(batch: int) -> int:
    return max(1, min(_GROUPS, -(-batch // PANEL)))


def _count_threads(pattern: Pattern, items: int, batch: int) -> int:
    work = pattern.rows.column.size + pattern.rows.begin.size + pattern.columns.begin.size
    return count_threads(items, work * batch)


@njit(cache=True)
def _add_gradient(dy_panel, x_panel, begin, column, row, rows, count, sums, partial):
    """``sums[j] += dy_panel[r] . x_panel[column[j]]``: `LANES` nonzeros to a reduction."""
    start, slot = begin[row], 0
    for r in range(rows):
        d0 = r * PANEL
        low, high = begin[row + r], begin[row + r + 1]
        a, b = load(dy_panel, d0), load(dy_panel, d0 + LANES)
        c, d = load(dy_panel, d0 + 2 * LANES), load(dy_panel, d0 + 3 * LANES)
        for j in range(low, high):
            k = column[j] * PANEL
            if count <= LANES:
                store(partial, slot * LANES, a * load(x_panel, k))
            else:
                even = fma(c, load(x_panel, k + 2 * LANES), a * load(x_panel, k))
                odd = fma(d, load(x_panel, k + 3 * LANES), b * load(x_panel, k + LANES))
                store(partial, slot * LANES, even + odd)
            slot += 1
            if slot == LANES:
                at = j - start + 1 - LANES
                store(sums, at, load(sums, at) + sum_each(partial, 0))
                slot = 0
    last = begin[row + rows] - start - slot
    for s in range(slot):
        sums[last + s] += sum_lanes(load(partial, s * LANES))


@njit(cache=True)
def _add_bias(dy_panel, out, count, sums):
    for r in range(out):
        total = load(dy_panel, r * PANEL)
        if count > LANES:
            for i in range(LANES, PANEL, LANES):
                total = total + load(dy_panel, r * PANEL + i)
        sums[r] += sum_lanes(total)


@njit(cache=True)
def _backward_item(
    thread, item, groups, dy, x, rows_begin, rows_column, values, columns_begin, columns_column,
    zeros, dx, wants_dx, sums, bias_sums, wants_dw, tickets, batch, inp, out,
):  # fmt: skip
    """A group of panels of one ticket: its dx, and its share of dw and of the bias gradient."""
    p = tickets[item // groups]
    panels = (batch + PANEL - 1) // PANEL
    group = item % groups
    dy_panel = aligned_empty(out * PANEL)
    in_panel = aligned_empty(inp * PANEL)
    partial = aligned_empty(LANES * LANES)
    if wants_dw:
        sums[item] = np.float32(0.0)
        bias_sums[item] = np.float32(0.0)
    for panel in range(group * panels // groups, (group + 1) * panels // groups):
        first = panel * PANEL
        count = min(PANEL, batch - first)
        to_panel(dy, (p * batch + first) * out, out, count, dy_panel)
        if wants_dw:
            to_panel(x, (p * batch + first) * inp, inp, count, in_panel)
            _add_gradient(
                dy_panel, in_panel, rows_begin, rows_column, p * out, out, count, sums[item],
                partial,
            )  # fmt: skip
            _add_bias(dy_panel, out, count, bias_sums[item])
        if wants_dx:
            _multiply_panel(
                values, columns_begin, columns_column, p * inp, inp, count, dy_panel, zeros,
                in_panel,
            )  # fmt: skip
            from_panel(in_panel, dx, (p * batch + first) * inp, inp, count)


@njit(cache=True)
def _collect_item(
    thread, item, chunks, groups, begin, position, sums, bias_sums, dw, db, tickets, out
):
    """Add up the groups' sums of one chunk of rows, in order."""
    ticket = item // chunks
    p = tickets[ticket]
    first = item % chunks * _CHUNK
    last = min(first + _CHUNK, out)
    origin = begin[p * out]
    low, high = begin[p * out + first] - origin, begin[p * out + last] - origin
    base = ticket * groups
    total, bias_total = sums[base], bias_sums[base]
    for group in range(base + 1, base + groups):
        more, bias_more = sums[group], bias_sums[group]
        for j in range(low, high):
            total[j] += more[j]
        for r in range(first, last):
            bias_total[r] += bias_more[r]
    for j in range(low, high):
        dw[position[origin + j]] = total[j]
    for r in range(first, last):
        db[p * out + r] = bias_total[r]


@njit(cache=True, nogil=True)
def _backward(
    threads, groups, dy, x, weight, rows_begin, rows_column, rows_position, columns_begin,
    columns_column, columns_position, zeros, dx, wants_dx, sums, bias_sums, dw, db, wants_dw,
    tickets, batch, inp, out,
):  # fmt: skip
    values = zeros
    if wants_dx:
        values = _gather(weight, columns_begin, columns_position, tickets, inp)
    arguments = (
        groups, dy, x, rows_begin, rows_column, values, columns_begin, columns_column, zeros, dx,
        wants_dx, sums, bias_sums, wants_dw, tickets, batch, inp, out,
    )  # fmt: skip
    share(_backward_item, threads, tickets.size * groups, arguments)
    if wants_dw:
        chunks = (out + _CHUNK - 1) // _CHUNK
        collected = (
            chunks, groups, rows_begin, rows_position, sums, bias_sums, dw, db, tickets, out
        )  # fmt: skip
        share(_collect_item, threads, tickets.size * chunks, collected)


class _Scratch(threading.local):
    """Memory kept from call to call, since fresh pages cost more than the work on them."""

    memory = np.empty(0, np.float32)

    def take(self, size: int) -> np.ndarray:
        if self.memory.size < size:
            self.memory = np.empty(size, np.float32)
        return self.memory[:size]


_scratch = _Scratch()
_nothing = np.empty(0, np.float32)


def backward(
    dy: np.ndarray,
    x: np.ndarray | None,
    weight: np.ndarray | None,
    pattern: Pattern,
    dx: np.ndarray | None,
    dw: np.ndarray | None,
    db: np.ndarray | None,
    tickets: np.ndarray,
    batch: int,
) -> None:
    """All gradients of the listed tickets; each operand is transposed to panels once.

    Args:
        dy: ``[P * batch * out]`` float32.
        x: ``[P * batch * inp]`` float32, or None without ``dw``.
        weight: ``[P * out * inp]`` float32, or None without ``dx``.
        pattern: of the weight's mask.
        dx: ``[P * batch * inp]``, written for the listed tickets, or None.
        dw: ``[P * out * inp]``, written on their masks, zero before; or None.
        db: ``[P * out]``, written for them; None if and only if ``dw`` is.
        tickets: int64.
        batch: rows per ticket.
    """
    out, inp = pattern.out, pattern.inp
    groups = _count_groups(batch)
    nonzeros = int(np.diff(pattern.rows.begin[::out]).max())
    # A whole register beyond the last nonzero may be touched.
    width = nonzeros + LANES if dw is not None else 0
    items = len(tickets) * groups
    memory = _scratch.take(items * (width + out))
    sums = memory[: items * width].reshape(items, width)
    bias_sums = memory[items * width :].reshape(items, out)
    _backward(
        _count_threads(pattern, items, batch), groups, dy, _nothing if x is None else x,
        _nothing if weight is None else weight, *pattern.rows, *pattern.columns,
        np.zeros(pattern.columns.begin.size - 1, np.float32), _nothing if dx is None else dx,
        dx is not None, sums, bias_sums, _nothing if dw is None else dw,
        _nothing if db is None else db, dw is not None, tickets, batch, inp, out,
    )  # fmt: skip
