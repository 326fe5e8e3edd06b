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

from .vector import INDEX, LANES, VECTOR, broadcast, data_of, load_at, multiply_add, store_at

__all__ = ["make_sparse_tile", "make_tile"]


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

    def store(self, data: Any, rows: list[Any]) -> None:
        """Write the sums where each row begins."""
        for (r, c), slot in self.slots.items():
            store_at(self.builder, self.builder.load(slot), data, _shift(self.builder, rows[r], c))


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
            with cgutils.for_range(builder, depth) as loop:
                x_row = builder.add(x0, builder.mul(loop.index, xd))
                xs = list(_registers(builder, x, x_row, columns))
                offset = builder.mul(loop.index, ad)
                for r in range(rows):
                    value = _element(builder, a, builder.add(row_a[r], offset))
                    sums.add(r, broadcast(builder, value), xs)
            sums.store(y, row_y)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, x, i, i, y, i, i, i, bias, i), generate

    return tile


def make_sparse_tile(columns: int, chains: int = 1):
    """One sparse row times ``columns * LANES`` columns of a panel, sums held in registers.

    The returned function computes, over the ``count`` nonzeros of one row,

        y[y0 + l] = start + sum_j values[v0 + j] * x[x0 + index[i0 + j]*xd + l]

    So that the latency of multiply-adds is hidden where columns are few, nonzeros take turns on
    ``chains`` sums. Per nonzero: one broadcast and ``columns`` loads for ``columns`` fused
    multiply-adds.
    """

    @intrinsic
    def sparse_tile(typingctx, values, v0, index, i0, count, x, x0, xd, y, y0, start):
        def generate(context, builder, signature, arguments):
            values, v0, index, i0, count, x, x0, xd, y, y0, start = arguments
            values, index, x, y = (
                data_of(context, builder, signature.args[i], array)
                for i, array in ((0, values), (2, index), (5, x), (8, y))
            )

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
                store_at(builder, total, y, _shift(builder, y0, c))
            return context.get_dummy_value()

        i = types.int64
        return types.void(values, i, index, i, i, x, i, i, y, i, types.float32), generate

    return sparse_tile
