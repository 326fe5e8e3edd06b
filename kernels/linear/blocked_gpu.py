"""Blocked masks in Triton: products that walk the kept blocks alone, and the gradient on them.

The weight stays dense in memory. Packed blocks would save no byte of a product: a row of a kept
block is 32 bytes or more, whole sectors of memory, and pruned blocks are never touched. They would
save the gradient's zeros, at most 4 bytes a weight, where everything that reads the gradient (the
optimiser's pass over weight and moments, 28 bytes) is dense as well.

No grid depends on how many blocks are kept. The forward product and dX give a program one tile of
the output, which loops over the kept blocks of its block row or column. The gradient gives a
program one block row and a few of its blocks, kept ones first: a program past the last kept one
writes zeros, so every entry is written once and nothing clears it before. No atomics, sums in one
order: a ticket's result does not depend on P.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..examples import Example, meta
from ..jit import jit_kernel
from ..launch import Launch
from ..tuning import prefer
from .operands_gpu import accumulator, check_spans, grid


@jit_kernel(fp_fusion=True)
def _product_kernel(
    a,  # [P, rows, depth]
    b,  # [P, depth, cols]
    bias,  # [P, cols], or None
    table,  # [P, lists, 1 + longest]: how many, then which blocks
    c,  # [P, rows, cols], written
    rows,
    cols,
    first_list,
    a_ticket,
    a_row,
    a_depth,
    b_ticket,
    b_depth,
    b_col,
    bias_ticket,
    bias_col,
    table_ticket,
    table_list,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``c[p] = a[p] b[p] + bias[p]``; the table's lists say which blocks a column of b keeps.

    c is contiguous, all else strided. Per kept block 2·rows·BLOCK² FLOPs; `a` is read once for
    every column of blocks that keeps its depth, `b` once per tile of rows.
    """
    col_blocks = cols // BLOCK
    tiles = tl.cdiv(rows, BLOCK_ROWS) * col_blocks
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = (tile // col_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # [rows, 1]
    col = (tile % col_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, block]
    kept = table + ticket * table_ticket + (first_list + tile % col_blocks) * table_list
    depth = tl.load(kept) * BLOCK
    step = tl.arange(0, BLOCK_DEPTH)
    CONTIGUOUS: tl.constexpr = min(BLOCK, BLOCK_DEPTH)

    a_rows = a + ticket * a_ticket + row * a_row  # [rows, 1]
    b_cols = b + ticket * b_ticket + col * b_col  # [1, block]
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=ACCUMULATOR)  # [rows, block]
    # Entry n of the kept blocks' common depth is entry n % BLOCK of block n // BLOCK. The blocks of
    # a step are looked up one step ahead: the pipeline would spend half its stages on the look-up.
    block = tl.load(kept + 1 + step // BLOCK, mask=step < depth, other=0)
    for start in range(0, depth, BLOCK_DEPTH):
        inside = start + step < depth
        inner = block * BLOCK + (start + step) % BLOCK  # [depth]
        inner = tl.max_contiguous(tl.multiple_of(inner, CONTIGUOUS), CONTIGUOUS)
        a_values = tl.load(
            a_rows + inner[None, :] * a_depth, mask=(row < rows) & inside[None, :], other=0.0
        )
        b_values = tl.load(b_cols + inner[:, None] * b_depth, mask=inside[:, None], other=0.0)
        following = start + BLOCK_DEPTH + step
        block = tl.load(kept + 1 + following // BLOCK, mask=following < depth, other=0)
        total = tl.dot(a_values, b_values, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    if bias is not None:
        total += tl.load(bias + ticket * bias_ticket + col * bias_col).to(ACCUMULATOR)
    c_tile = c + ticket * rows * cols + row * cols + col
    tl.store(c_tile, total.to(c.dtype.element_ty), mask=row < rows)


@jit_kernel(fp_fusion=True)
def _gradient_kernel(
    dy,  # [P, batch, out]
    x,  # [P, batch, inp]
    table,  # as in `_product_kernel`
    dw,  # [P, out, inp], written
    batch,
    out,
    inp,
    dy_ticket,
    dy_batch,
    dy_out,
    x_ticket,
    x_batch,
    x_inp,
    table_ticket,
    table_list,
    BLOCK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dw[p] = dy[p]ᵀ x[p]`` on the kept blocks and zero elsewhere; dw is contiguous.

    Per kept block 2·batch·BLOCK² FLOPs. Neighbours in a list share a program and so its dy: blocks
    of 16 alone would read two entries for every 16 multiply-adds.
    """
    col_blocks = inp // BLOCK
    groups = tl.cdiv(col_blocks * BLOCK, BLOCK_COLS)
    programs = (out // BLOCK) * groups
    program = tl.program_id(0)
    ticket = (program // programs).to(tl.int64)
    row_block = program % programs // groups
    listed = table + ticket * table_ticket + row_block * table_list
    count = tl.load(listed)
    lane = tl.arange(0, BLOCK_COLS)
    first = program % groups * (BLOCK_COLS // BLOCK)
    place = first + lane // BLOCK
    block = tl.load(listed + 1 + place, mask=place < col_blocks, other=0)
    col = tl.max_contiguous(tl.multiple_of(block * BLOCK + lane % BLOCK, BLOCK), BLOCK)[None, :]
    row = row_block * BLOCK + tl.arange(0, BLOCK)[:, None]  # [block, 1]
    kept = (place < count)[None, :]  # [1, cols]
    inner = tl.arange(0, BLOCK_DEPTH)

    dy_tile = dy + ticket * dy_ticket + row * dy_out + inner[None, :] * dy_batch  # [block, depth]
    x_tile = x + ticket * x_ticket + inner[:, None] * x_batch + col * x_inp  # [depth, cols]
    total = tl.zeros((BLOCK, BLOCK_COLS), dtype=ACCUMULATOR)  # [block, cols]
    depth = tl.where(first < count, batch, 0)
    for start in range(0, depth, BLOCK_DEPTH):
        left = depth - start
        dy_values = tl.load(dy_tile, mask=inner[None, :] < left, other=0.0)
        x_values = tl.load(x_tile, mask=(inner[:, None] < left) & kept, other=0.0)
        total = tl.dot(dy_values, x_values, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        dy_tile += BLOCK_DEPTH * dy_batch
        x_tile += BLOCK_DEPTH * x_batch

    # Where dy is not finite, its product with the zeros of a pruned block is not zero.
    total = tl.where(kept, total, 0.0)
    dw_tile = dw + ticket * out * inp + row * inp + col
    tl.store(dw_tile, total.to(dw.dtype.element_ty), mask=(place < col_blocks)[None, :])


def choose_product_tiles(rows: int, block: int, dtype: torch.dtype, precision: str) -> Launch:
    """How `forward` and `dx` cut a product of ``rows``: output tiles as wide as a block.

    A fixed function of shape, dtype and precision. A step takes several small blocks, or a part of
    a large one. Tall tiles make up for the narrowest blocks. IEEE float32, float64 and tf32x3 take
    short steps, as in `gpu.choose_tiles`. For blocks of 32, tiles of 128 rows spill, and so do
    steps of 32 in tf32 on Blackwell.
    """
    most = 32 if dtype == torch.float64 else 128 if block == 16 else 64
    tall = min(most, max(16, triton.next_power_of_2(rows)))
    depth = _depth(dtype, precision)
    if block == 32 and depth == 32:
        depth = 64
    return Launch(block_rows=tall, block_depth=depth, warps=_warps(dtype), stages=3)


def choose_gradient_tiles(inp: int, block: int, dtype: torch.dtype, precision: str) -> Launch:
    """How `dw` cuts a gradient ``inp`` wide: a block high, and as wide as several blocks.

    A fixed function of shape, dtype and precision; a step takes rows of the batch. Three stages of
    IEEE float32 on blocks of 64 spill a few bytes; four do not.
    """
    most = max(block, 32 if dtype == torch.float64 else 64)
    cols = min(most, triton.next_power_of_2(inp))
    stages = 4 if dtype == torch.float32 and precision == "ieee" else 3
    depth = _depth(dtype, precision)
    return Launch(block_cols=cols, block_depth=depth, warps=_warps(dtype), stages=stages)


def _depth(dtype: torch.dtype, precision: str) -> int:
    if dtype in (torch.float16, torch.bfloat16):
        return 64
    return 32 if dtype == torch.float32 and precision == "tf32" else 16


def _warps(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, block: int, precision: str
) -> Tensor:
    """``[P, B, I], [P, O, I], [P, O] -> [P, B, O]``; see `reference.linear`.

    The table is a `BlockPattern`'s: its block rows say which inputs an output reads.
    """
    return _product(x, weight.mT, bias, table, 0, block, precision)


def dx(dy: Tensor, weight: Tensor, table: Tensor, block: int, precision: str) -> Tensor:
    """``[P, B, O], [P, O, I] -> [P, B, I]``; see `reference.linear_dx`."""
    return _product(dy, weight, None, table, weight.shape[1] // block, block, precision)


def dw(dy: Tensor, x: Tensor, table: Tensor, block: int, precision: str) -> Tensor:
    """``[P, B, O], [P, B, I] -> [P, O, I]``; see `reference.linear_dw`."""
    tickets, batch, out = dy.shape
    inp = x.shape[2]
    result = dy.new_empty(tickets, out, inp)
    check_spans(dy=dy, x=x, output=result)
    if result.numel() == 0:
        return result
    exact = precision if dy.dtype == torch.float32 else "ieee"
    tiles = prefer(
        choose_gradient_tiles(inp, block, dy.dtype, exact),
        "linear_blocked.dw",
        dy.device,
        batch=batch,
        out=out,
        inp=inp,
        block=block,
        dtype=dy.dtype,
        precision=exact,
    )
    programs = tickets * (out // block) * triton.cdiv(inp, tiles.block_cols)
    with torch.cuda.device_of(dy):
        _gradient_kernel[grid(programs)](
            dy,
            x,
            table,
            result,
            batch,
            out,
            inp,
            *dy.stride(),
            *x.stride(),
            *table.stride()[:2],
            BLOCK=block,
            ACCUMULATOR=accumulator(dy.dtype),
            PRECISION=exact,
            **tiles.constexprs,
            **tiles.options,
        )
    return result


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    table: Tensor,
    first_list: int,
    block: int,
    precision: str,
) -> Tensor:
    tickets, rows, _ = a.shape
    cols = b.shape[2]
    c = a.new_empty(tickets, rows, cols)
    check_spans(first=a, second=b, output=c)
    if c.numel() == 0:
        return c
    exact = precision if a.dtype == torch.float32 else "ieee"
    tiles = prefer(
        choose_product_tiles(rows, block, a.dtype, exact),
        "linear_blocked",
        a.device,
        rows=rows,
        cols=cols,
        depth=a.shape[2],
        block=block,
        dtype=a.dtype,
        precision=exact,
    )
    programs = tickets * triton.cdiv(rows, tiles.block_rows) * (cols // block)
    with torch.cuda.device_of(a):
        _product_kernel[grid(programs)](
            a,
            b,
            bias,
            table,
            c,
            rows,
            cols,
            first_list,
            *a.stride(),
            *b.stride(),
            *(bias.stride() if bias is not None else (0, 0)),
            *table.stride()[:2],
            BLOCK=block,
            ACCUMULATOR=accumulator(a.dtype),
            PRECISION=exact,
            **tiles.constexprs,
            **tiles.options,
        )
    return c


def _example(dtype: torch.dtype, precision: str, block: int) -> None:
    """All products of a wide layer."""
    x, weight = meta(2, 256, 256, dtype=dtype), meta(2, 256, 256, dtype=dtype)
    # Block rows, then block columns; how long their lists are is not known.
    table = meta(2, 2 * (256 // block), 256 // block + 3, dtype=torch.int32)
    forward(x, weight, meta(2, 256, dtype=dtype), table, block, precision)
    dx(x, weight, table, block, precision)
    dw(x, x, table, block, precision)


EXAMPLES = [
    Example(
        f"{str(dtype).removeprefix('torch.')}_{precision}_{block}",
        partial(_example, dtype, precision, block),
        exact=True,
    )
    for dtype, precision, blocks in (
        (torch.float64, "ieee", (16, 64)),
        (torch.float32, "ieee", (16, 32, 64)),
        (torch.float32, "tf32", (16, 32, 64)),
        (torch.float32, "tf32x3", (16, 64)),
        (torch.float16, "ieee", (32,)),
        (torch.bfloat16, "ieee", (16, 64)),
    )
    for block in blocks
]
