"""Products on a CPU whose sums are held in registers, made for so many rows and columns.

The functions made are callable in Numba code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from .vector import (
    INDEX,
    LANES,
    VECTOR,
    broadcast,
    clamp,
    constant,
    data_of,
    load_at,
    multiply_add,
    store_at,
)


class _Sums:
    """``[rows][columns]`` registers to add up in; LLVM lifts them from the stack."""

    def __init__(
        self, builder: Any, rows: int, columns: int, start: Callable[[int, int], Any]
    ) -> None:
        self.builder, self.columns = builder, columns
        self.slots = {}
        for r in range(rows):
            for c in range(columns):
                first = start(r, c)
                self.slots[r, c] = cgutils.alloca_once(builder, VECTOR)
                builder.store(first, self.slots[r, c])

    def add(self, row: int, value: Any, xs: Iterable[Any]) -> None:
        """``value * x`` to every column's sum."""
        for c, x in enumerate(xs):
            slot = self.slots[row, c]
            self.builder.store(multiply_add(self.builder, value, x, self.builder.load(slot)), slot)

    def store(self, data: Any, rows: list[Any], gate: Any = None) -> None:
        """Write the sums where each row begins; ``gate(r, c)`` lets them through or not."""
        for (r, c), slot in self.slots.items():
            value = self.builder.load(slot)
            if gate is not None:
                value = _let_through(self.builder, value, gate(r, c))
            store_at(self.builder, value, data, _shift(self.builder, rows[r], c))


def _let_through(builder: Any, value: Any, gate: Any) -> Any:
    """The value where the gate is positive or NaN: ReLU's derivative at its output."""
    closed = builder.fcmp_ordered("<=", gate, constant(0.0))
    return builder.select(closed, constant(0.0), value)


def _shift(builder: Any, index: Any, column: int) -> Any:
    """So many registers further."""
    return builder.add(index, INDEX(column * LANES))


def _registers(builder: Any, data: Any, index: Any, columns: int) -> Iterator[Any]:
    """Those that begin at ``index``, loaded as they are asked for."""
    for c in range(columns):
        yield load_at(builder, data, _shift(builder, index, c))


def _element(builder: Any, data: Any, index: Any) -> Any:
    return builder.load(builder.gep(data, [index]))


def _rows(builder: Any, first: Any, stride: Any, rows: int) -> list[Any]:
    return [builder.add(first, builder.mul(stride, INDEX(r))) for r in range(rows)]


def _sum_products(builder: Any, sums: _Sums, a: Any, x: Any, depth: Any, columns: int) -> None:
    """Add to every sum its products of a dense tile; see `make_tile`.

    Args:
        a: where the numbers lie, where each row of them begins, and the step of depth there.
        x: where the registers lie and begin, and their step.
    """
    a, row_a, ad = a
    x, x0, xd = x
    with cgutils.for_range(builder, depth) as loop:
        x_row = builder.add(x0, builder.mul(loop.index, xd))
        xs = list(_registers(builder, x, x_row, columns))
        offset = builder.mul(loop.index, ad)
        for r, begin in enumerate(row_a):
            value = _element(builder, a, builder.add(begin, offset))
            sums.add(r, broadcast(builder, value), xs)


def make_tile(rows: int, columns: int, accumulate: bool = False):
    """A GEMM tile of ``rows x (columns * LANES)`` accumulators held in registers.

    The returned function computes for every row r and lane position j

        y[y0 + r*ys + j] = start + sum_d a[a0 + r*ar + d*ad] * x[x0 + d*xd + j],   d < depth

    where ``start`` is ``bias[b0 + r]``, or with ``accumulate`` the old value of y. With activations
    stored as ``[features][batch]`` this one loop is the forward pass (a = W), the input gradient
    (a = W transposed, by strides) and, with x stored as ``[batch][features]``, the weight gradient.
    Per step of d: rows broadcasts and columns loads for rows * columns fused multiply-adds.
    """

    @intrinsic
    def tile(typingctx, a, a0, ar, ad, x, x0, xd, y, y0, ys, depth, bias, b0):
        def generate(context, builder, signature, arguments):
            a, a0, ar, ad, x, x0, xd, y, y0, ys, depth, bias, b0 = arguments
            a, x, y, bias = (
                data_of(context, builder, signature.args[i], array)
                for i, array in ((0, a), (4, x), (7, y), (11, bias))
            )
            row_a, row_y = _rows(builder, a0, ar, rows), _rows(builder, y0, ys, rows)

            def start(r, c):
                if accumulate:
                    return load_at(builder, y, _shift(builder, row_y[r], c))
                return broadcast(builder, _element(builder, bias, builder.add(b0, INDEX(r))))

            sums = _Sums(builder, rows, columns, start)
            _sum_products(builder, sums, (a, row_a, ad), (x, x0, xd), depth, columns)
            sums.store(y, row_y)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, x, i, i, y, i, i, i, bias, i), generate

    return tile


def make_gated_tile(rows: int, columns: int, gated: bool):
    """As `make_tile`, of sums that start at zero; if ``gated``, zero where a gate is not positive.

    The returned function takes ``(a, a0, ar, ad, x, x0, xd, y0, ys, g0, depth)``: y lies in x's
    array, as does the gate of an output, from ``g0`` as that from ``y0``.
    """

    @intrinsic
    def tile(typingctx, a, a0, ar, ad, x, x0, xd, y0, ys, g0, depth):
        def generate(context, builder, signature, arguments):
            a, a0, ar, ad, x, x0, xd, y0, ys, g0, depth = arguments
            a, x = (
                data_of(context, builder, signature.args[i], array) for i, array in ((0, a), (4, x))
            )
            row_a = _rows(builder, a0, ar, rows)
            sums = _Sums(builder, rows, columns, lambda r, c: constant(0.0))
            _sum_products(builder, sums, (a, row_a, ad), (x, x0, xd), depth, columns)
            gates = _rows(builder, g0, ys, rows)

            def gate(r, c):
                return load_at(builder, x, _shift(builder, gates[r], c))

            sums.store(x, _rows(builder, y0, ys, rows), gate if gated else None)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, x, i, i, i, i, i, i), generate

    return tile


def make_dots(rows: int, columns: int):
    """Products of ``rows`` rows of a panel with up to `LANES` of another, to be summed over lanes.

    The returned function ``(m, d0, ds, x0, xs, count, partial)`` writes, for every k < ``count``,
    the register of lane sums of ``d[r] * x[k]`` over ``columns`` registers to place k of row r's
    `LANES` registers at ``partial``. Per k: ``columns`` loads for ``rows * columns`` multiply-adds.
    """

    @intrinsic
    def dots(typingctx, m, d0, ds, x0, xs, count, partial):
        def generate(context, builder, signature, arguments):
            m, d0, ds, x0, xs, count, partial = arguments
            m = data_of(context, builder, signature.args[0], m)
            held = [
                list(_registers(builder, m, row, columns)) for row in _rows(builder, d0, ds, rows)
            ]
            with cgutils.for_range(builder, count) as loop:
                x_row = builder.add(x0, builder.mul(loop.index, xs))
                x = list(_registers(builder, m, x_row, columns))
                at = builder.add(partial, builder.mul(loop.index, INDEX(LANES)))
                for r, d in enumerate(held):
                    total = builder.fmul(d[0], x[0])
                    for c in range(1, columns):
                        total = multiply_add(builder, d[c], x[c], total)
                    store_at(builder, total, m, builder.add(at, INDEX(r * LANES * LANES)))
            return context.get_dummy_value()

        i = types.int64
        return types.void(m, i, i, i, i, i, i), generate

    return dots


def make_sparse_tile(columns: int, chains: int = 1, relu: bool = False):
    """One sparse row times ``columns * LANES`` columns of a panel, sums held in registers.

    The returned function computes, over the ``count`` nonzeros of one row,

        y[y0 + l] = start + sum_j values[v0 + j] * x[x0 + index[i0 + j]*xd + l]

    or with ``relu`` the larger of that and zero. So that the latency of multiply-adds is hidden
    where columns are few, nonzeros take turns on ``chains`` sums. Per nonzero: one broadcast and
    ``columns`` loads for ``columns`` fused multiply-adds.
    """

    @intrinsic
    def sparse_tile(typingctx, values, v0, index, i0, count, x, x0, xd, y, y0, start):
        def generate(context, builder, signature, arguments):
            data = _data(context, builder, signature, arguments)
            *_, y0, start = arguments
            for c, total in enumerate(
                _sum_row(builder, data, arguments[:8], start, columns, chains)
            ):
                if relu:
                    total = clamp(builder, total, constant(0.0), "<")
                store_at(builder, total, data[3], _shift(builder, y0, c))
            return context.get_dummy_value()

        i = types.int64
        return types.void(values, i, index, i, i, x, i, i, y, i, types.float32), generate

    return sparse_tile


def make_gated_sparse_tile(columns: int, chains: int = 1):
    """As `make_sparse_tile` from zero, of which is left what lies where a gate is positive.

    The returned function takes the gate's index in x's array for ``start``.
    """

    @intrinsic
    def sparse_tile(typingctx, values, v0, index, i0, count, x, x0, xd, y, y0, g0):
        def generate(context, builder, signature, arguments):
            data = _data(context, builder, signature, arguments)
            *_, y0, g0 = arguments
            start = ir.Constant(ir.FloatType(), 0.0)
            for c, total in enumerate(
                _sum_row(builder, data, arguments[:8], start, columns, chains)
            ):
                gate = load_at(builder, data[2], _shift(builder, g0, c))
                value = _let_through(builder, total, gate)
                store_at(builder, value, data[3], _shift(builder, y0, c))
            return context.get_dummy_value()

        i = types.int64
        return types.void(values, i, index, i, i, x, i, i, y, i, i), generate

    return sparse_tile


def _data(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Where the arrays of values, index, x and y begin."""
    return [data_of(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 5, 8)]


def _sum_row(
    builder: Any, data: list[Any], arguments: Any, start: Any, columns: int, chains: int
) -> Iterator[Any]:
    """A sparse row's sums, register by register; see `make_sparse_tile`."""
    _, v0, _, i0, count, _, x0, xd = arguments
    values, index, x, _ = data

    def first(chain, _):
        return broadcast(builder, start) if chain == 0 else ir.Constant(VECTOR, None)

    sums = _Sums(builder, chains, columns, first)

    def step(j, chain):
        value = broadcast(builder, _element(builder, values, builder.add(v0, j)))
        column = _element(builder, index, builder.add(i0, j))
        if column.type != INDEX:
            column = builder.zext(column, INDEX)
        row = builder.add(x0, builder.mul(column, xd))
        sums.add(chain, value, _registers(builder, x, row, columns))

    rounds = builder.sdiv(count, INDEX(chains)) if chains > 1 else count
    with cgutils.for_range(builder, rounds) as loop:
        begin = builder.mul(loop.index, INDEX(chains))
        for chain in range(chains):
            step(builder.add(begin, INDEX(chain)), chain)
    if chains > 1:
        done = builder.mul(rounds, INDEX(chains))
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            step(builder.add(done, loop.index), 0)
    for c in range(columns):
        total = builder.load(sums.slots[0, c])
        for chain in range(1, chains):
            total = builder.fadd(total, builder.load(sums.slots[chain, c]))
        yield total
