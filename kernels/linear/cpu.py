"""The linear layer on the CPU: compressed rows where a ticket is sparse, torch's product elsewhere.

Activations arrive row-major. A panel of `PANEL` batch rows is transposed to
``[features][PANEL]``, so that one weight meets a run of registers; then a row of nonzeros is a
chain of fused multiply-adds on accumulators that never leave their registers. Per nonzero and
panel: PANEL/LANES loads and as many multiply-adds.

Each ticket takes the format of its own density, so its result does not depend on its batch-mates.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.linear import reference
from sparse_tickets.kernels.threads import launch
from sparse_tickets.kernels.vector import (
    LANES,
    fma,
    load,
    make_sparse_tile,
    store,
    sum_each,
    transpose,
)

__all__ = ["PANEL", "dw", "dx", "forward", "plan"]

PANEL = 4 * LANES
"""Batch rows processed together: four chains of multiply-adds hide their latency."""

# Below this share of nonzeros compressed rows beat the dense product, by batch: a panel's rows
# amortise the transposition. Measured on AVX-512; see benchmarks/NOTES.md.
_SPARSE_BELOW = 0.3
_SMALLEST = 32 * 32

_row_tile = make_sparse_tile(PANEL // LANES)


def is_sparse(out: int, inp: int, batch: int, density: float) -> bool:
    """Whether one ticket's layer runs on compressed rows: a fixed function of shape and density."""
    return batch >= LANES and out * inp >= _SMALLEST and density < _SPARSE_BELOW


def plan(out: int, inp: int, batch: int, density: float, dtype: torch.dtype) -> Plan:
    """What `forward`, `dx` and `dw` do for a ticket of this shape and density."""
    if dtype != torch.float32:
        return Plan("linear", "cpu", "dense+mask", "torch's product: compressed rows are float32")
    if is_sparse(out, inp, batch, density):
        reason = f"density {density:.3g} is below {_SPARSE_BELOW}: work falls with the nonzeros"
        return Plan("linear", "cpu", "csr", reason)
    if density >= _SPARSE_BELOW:
        reason = f"density {density:.3g} is not below {_SPARSE_BELOW}, where torch's product wins"
    elif batch < LANES:
        reason = f"batch {batch} is below {LANES}, too few rows to fill a register"
    else:
        reason = f"{out} x {inp} weights are too few to pay for compressed rows"
    return Plan("linear", "cpu", "dense+mask", reason)


class _Compressed(NamedTuple):
    """Nonzeros of all tickets' rows: of row r those in ``begin[r]:begin[r + 1]``.

    Attributes:
        begin: ``[P * rows + 1]`` int64.
        column: ``[nonzeros]`` int32, within the row.
        position: ``[nonzeros]`` int64, in the flat weight.
    """

    begin: np.ndarray
    column: np.ndarray
    position: np.ndarray


class _Pattern(NamedTuple):
    """Where a population's masks are True.

    Attributes:
        density: ``[P]`` float64, share of True entries.
        rows: compressed by output, for all tickets.
        columns: compressed by input, for all tickets.
    """

    density: np.ndarray
    rows: _Compressed
    columns: _Compressed


@njit(cache=True)
def _compress(mask, tickets, rows, columns, row_stride, column_stride):
    """Compressed form of ``[P, rows, columns]`` read by strides of one ticket's matrix."""
    size = rows * columns
    begin = np.empty(tickets * rows + 1, np.int64)
    begin[0] = 0
    for p in range(tickets):
        for r in range(rows):
            count = 0
            for c in range(columns):
                count += mask[p * size + r * row_stride + c * column_stride]
            begin[p * rows + r + 1] = begin[p * rows + r] + count
    # One spare entry: the loop below writes ahead and then keeps or overwrites.
    column = np.empty(begin[-1] + 1, np.int32)
    position = np.empty(begin[-1] + 1, np.int64)
    j = 0
    for p in range(tickets):
        for r in range(rows):
            for c in range(columns):
                at = p * size + r * row_stride + c * column_stride
                column[j] = c
                position[j] = at
                j += mask[at]
    return begin, column, position


_patterns: dict[tuple, tuple[weakref.ref, int, _Pattern]] = {}


def _pattern(mask: Tensor) -> _Pattern:
    """The pattern of a mask, remembered until the mask changes or goes away."""
    if mask.is_inference():
        return _build(mask)
    owner = mask if mask._base is None else mask._base
    key = (id(owner), mask.storage_offset(), tuple(mask.shape), mask.stride())
    known = _patterns.get(key)
    if known is not None and known[0]() is owner and known[1] == owner._version:
        return known[2]
    pattern = _build(mask)
    reference_ = weakref.ref(owner, lambda _: _patterns.pop(key, None))
    _patterns[key] = (reference_, owner._version, pattern)
    return pattern


def _build(mask: Tensor) -> _Pattern:
    tickets, out, inp = mask.shape
    flat = mask.contiguous().view(torch.uint8).numpy().reshape(-1)
    rows = _Compressed(*_compress(flat, tickets, out, inp, inp, 1))
    columns = _Compressed(*_compress(flat, tickets, inp, out, 1, inp))
    counts = np.diff(rows.begin[:: max(out, 1)]) if tickets and out else np.zeros(tickets)
    return _Pattern(counts / max(out * inp, 1), rows, columns)


@njit(inline="always")
def _to_panel(x, x0, width, count, panel):
    """``panel[f][b] = x[x0 + b*width + f]`` for ``count`` rows; the rest of the panel is zero."""
    full = count // LANES * LANES
    blocks = width // LANES * LANES
    for b in range(0, full, LANES):
        for f in range(0, blocks, LANES):
            transpose(x, x0 + b * width + f, width, panel, f * PANEL + b, PANEL)
    for f in range(blocks, width):
        for b in range(full):
            panel[f * PANEL + b] = x[x0 + b * width + f]
    for b in range(full, PANEL):
        for f in range(width):
            panel[f * PANEL + b] = x[x0 + b * width + f] if b < count else np.float32(0.0)


@njit(inline="always")
def _from_panel(panel, y, y0, width, count):
    """``y[y0 + b*width + f] = panel[f][b]`` for ``count`` rows."""
    full = count // LANES * LANES
    blocks = width // LANES * LANES
    for b in range(0, full, LANES):
        for f in range(0, blocks, LANES):
            transpose(panel, f * PANEL + b, PANEL, y, y0 + b * width + f, width)
    for f in range(blocks, width):
        for b in range(full):
            y[y0 + b * width + f] = panel[f * PANEL + b]
    for b in range(full, count):
        for f in range(width):
            y[y0 + b * width + f] = panel[f * PANEL + b]


@njit(parallel=True, cache=True)
def _product(x, weight, begin, column, position, bias, y, tickets, batch, inp, out):
    """``y[p] = x[p] wᵀ + bias`` for the listed tickets, one (ticket, panel) at a time."""
    values = np.empty(position.size, np.float32)
    panels = (batch + PANEL - 1) // PANEL
    for t in prange(tickets.size):
        for j in range(begin[tickets[t] * out], begin[(tickets[t] + 1) * out]):
            values[j] = weight[position[j]]
    for item in prange(tickets.size * panels):
        p = tickets[item // panels]
        first = item % panels * PANEL
        count = min(PANEL, batch - first)
        x_panel = np.empty(inp * PANEL, np.float32)
        y_panel = np.empty(out * PANEL, np.float32)
        _to_panel(x, (p * batch + first) * inp, inp, count, x_panel)
        for r in range(out):
            row = p * out + r
            _row_tile(
                values, column, begin[row], begin[row + 1], x_panel, 0, PANEL, y_panel, r * PANEL,
                bias[row],
            )  # fmt: skip
        _from_panel(y_panel, y, (p * batch + first) * out, out, count)


@njit(parallel=True, cache=True)
def _gradient(dy, x, begin, column, position, dw, tickets, batch, inp, out, chunk, scratch):
    """``dw[p] = dy[p]ᵀ x[p]`` on the mask; each chunk of rows sums its panels in order."""
    panels = (batch + PANEL - 1) // PANEL
    chunks = (out + chunk - 1) // chunk
    width = tickets.size * panels
    x_panels = scratch[: width * inp * PANEL].reshape(width, inp * PANEL)
    dy_panels = scratch[x_panels.size : x_panels.size + width * out * PANEL].reshape(
        width, out * PANEL
    )
    for item in prange(width):
        p = tickets[item // panels]
        first = item % panels * PANEL
        count = min(PANEL, batch - first)
        _to_panel(x, (p * batch + first) * inp, inp, count, x_panels[item])
        _to_panel(dy, (p * batch + first) * out, out, count, dy_panels[item])
    for item in prange(tickets.size * chunks):
        p = tickets[item // chunks]
        first = item % chunks * chunk
        last = min(first + chunk, out)
        start, stop = begin[p * out + first], begin[p * out + last]
        # Room for a whole register beyond the last nonzero.
        sums = np.zeros(stop - start + LANES, np.float32)
        partial = np.zeros(LANES * LANES, np.float32)
        for panel in range(panels):
            x_panel = x_panels[item // chunks * panels + panel]
            dy_panel = dy_panels[item // chunks * panels + panel]
            slot = 0
            for r in range(first, last):
                d0 = r * PANEL
                a, b = load(dy_panel, d0), load(dy_panel, d0 + LANES)
                c, d = load(dy_panel, d0 + 2 * LANES), load(dy_panel, d0 + 3 * LANES)
                for j in range(begin[p * out + r], begin[p * out + r + 1]):
                    k = column[j] * PANEL
                    even = fma(c, load(x_panel, k + 2 * LANES), a * load(x_panel, k))
                    odd = fma(d, load(x_panel, k + 3 * LANES), b * load(x_panel, k + LANES))
                    store(partial, slot * LANES, even + odd)
                    slot += 1
                    if slot == LANES:
                        at = j - start + 1 - LANES
                        store(sums, at, load(sums, at) + sum_each(partial, 0))
                        slot = 0
            if slot:
                at = stop - start - slot
                partial[slot * LANES :] = np.float32(0.0)
                store(sums, at, load(sums, at) + sum_each(partial, 0))
        for j in range(start, stop):
            dw[position[j]] = sums[j - start]


def _split(mask: Tensor, batch: int, dtype: torch.dtype) -> tuple[_Pattern | None, np.ndarray]:
    """The pattern, and which tickets run on compressed rows."""
    _, out, inp = mask.shape
    if dtype != torch.float32 or not is_sparse(out, inp, batch, 0.0):
        return None, np.zeros(0, np.int64)
    pattern = _pattern(mask)
    chosen = [is_sparse(out, inp, batch, density) for density in pattern.density]
    return pattern, np.flatnonzero(np.array(chosen, bool))


_memory = np.empty(0, np.float32)


def _scratch(size: int) -> np.ndarray:
    """Memory kept from call to call, since fresh pages cost more than the work on them.

    For use under `launch`, which admits one caller at a time.
    """
    global _memory
    if _memory.size < size:
        _memory = np.empty(size, np.float32)
    return _memory


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy().reshape(-1)


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: _Compressed,
    sparse: np.ndarray,
    out: int,
    dense,
) -> Tensor:
    """``dense`` for the other tickets, compressed rows for the ``sparse`` ones."""
    tickets, batch, inp = x.shape
    y = x.new_empty(tickets, batch, out)
    if len(sparse) < tickets:
        others = torch.from_numpy(np.setdiff1d(np.arange(tickets), sparse))
        y[others] = dense(others)
    bias_ = np.zeros(tickets * out, np.float32) if bias is None else _flat(bias)
    with launch():
        _product(
            _flat(x), _flat(weight), *form, bias_, y.numpy().reshape(-1), sparse, batch, inp, out
        )
    return y


def forward(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    pattern, sparse = _split(mask, x.shape[1], x.dtype)
    if pattern is None or not len(sparse):
        return reference.linear(x, weight, mask, bias)

    def dense(others: Tensor) -> Tensor:
        chosen = None if bias is None else bias[others]
        return reference.linear(x[others], weight[others], mask[others], chosen)

    return _multiply(x, weight, bias, pattern.rows, sparse, weight.shape[1], dense)


def dx(dy: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """See `reference.linear_dx`."""
    pattern, sparse = _split(mask, dy.shape[1], dy.dtype)
    if pattern is None or not len(sparse):
        return reference.linear_dx(dy, weight, mask)

    def dense(others: Tensor) -> Tensor:
        return reference.linear_dx(dy[others], weight[others], mask[others])

    return _multiply(dy, weight, None, pattern.columns, sparse, weight.shape[2], dense)


def dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """See `reference.linear_dw`."""
    pattern, sparse = _split(mask, x.shape[1], x.dtype)
    if pattern is None or not len(sparse):
        return reference.linear_dw(dy, x, mask)
    tickets, out, inp = mask.shape
    result = dy.new_zeros(tickets, out, inp)
    if len(sparse) < tickets:
        others = torch.from_numpy(np.setdiff1d(np.arange(tickets), sparse))
        result[others] = reference.linear_dw(dy[others], x[others], mask[others])
    # Chunks of rows small enough to share out, a fixed size so that sums do not depend on threads.
    chunk = min(32, out)
    panels = -(-x.shape[1] // PANEL)
    with launch():
        _gradient(
            _flat(dy), _flat(x), *pattern.rows, result.numpy().reshape(-1), sparse, x.shape[1],
            inp, out, chunk, _scratch(len(sparse) * panels * PANEL * (inp + out)),
        )  # fmt: skip
    return result
