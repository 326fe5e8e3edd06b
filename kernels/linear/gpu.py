"""The linear layer of a population in Triton: three products, one tiled GEMM kernel.

The weight stays dense with explicit zeros, so the forward product and dX are plain GEMMs; the mask
enters in the epilogue of dW. One program computes one output tile of one ticket and walks its whole
inner dimension: no atomics, no split sums, so a result depends neither on P nor on timing.
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
def _gemm_kernel(
    a,  # [P, rows, depth]
    b,  # [P, depth, cols]
    bias,  # [P, cols], or None
    mask,  # [P, rows, cols], or None
    c,  # [P, rows, cols], written
    rows,
    cols,
    depth,
    a_ticket,
    a_row,
    a_depth,
    b_ticket,
    b_depth,
    b_col,
    bias_ticket,
    bias_col,
    mask_ticket,
    mask_row,
    mask_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``c[p] = mask[p] ∘ (a[p] b[p] + bias[p])``; c is contiguous, all else strided.

    A ticket takes 2 rows·cols·depth FLOPs and moves at least (rows·depth + depth·cols + rows·cols)
    elements, and rows·cols bytes of mask; `a` is read once per tile of columns, `b` once per tile
    of rows.
    """
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * col_tiles
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = (tile // col_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # [rows, 1]
    col = (tile % col_tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]  # [1, cols]
    inner = tl.arange(0, BLOCK_DEPTH)  # [depth]

    a_tile = a + ticket * a_ticket + row * a_row + inner[None, :] * a_depth  # [rows, depth]
    b_tile = b + ticket * b_ticket + inner[:, None] * b_depth + col * b_col  # [depth, cols]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=ACCUMULATOR)  # [rows, cols]
    for start in range(0, depth, BLOCK_DEPTH):
        left = depth - start
        a_values = tl.load(a_tile, mask=(row < rows) & (inner[None, :] < left), other=0.0)
        b_values = tl.load(b_tile, mask=(inner[:, None] < left) & (col < cols), other=0.0)
        total = tl.dot(a_values, b_values, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        a_tile += BLOCK_DEPTH * a_depth
        b_tile += BLOCK_DEPTH * b_depth

    if bias is not None:
        bias_values = tl.load(bias + ticket * bias_ticket + col * bias_col, mask=col < cols)
        total += bias_values.to(ACCUMULATOR)
    inside = (row < rows) & (col < cols)
    if mask is not None:
        mask_tile = mask + ticket * mask_ticket + row * mask_row + col * mask_col
        total = tl.where(tl.load(mask_tile, mask=inside, other=0) != 0, total, 0.0)
    c_tile = c + ticket * rows * cols + row * cols + col
    tl.store(c_tile, total.to(c.dtype.element_ty), mask=inside)


def choose_tiles(rows: int, cols: int, dtype: torch.dtype, precision: str) -> Launch:
    """Tiles for a ``[rows, cols]`` output: a fixed function of shape, dtype and precision.

    IEEE float32 and float64 compute in registers, and tf32x3 keeps three copies there: they take
    short steps, or they would spill. So would narrow half-precision tiles of depth 64.
    """
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    block_cols = min(64, max(16, triton.next_power_of_2(cols)))
    depth, warps, stages = (64 if block_rows == block_cols == 64 else 32), 4, 3
    if dtype == torch.float32:
        depth = 32 if precision == "tf32" else 16
    elif dtype == torch.float64:
        block_rows, block_cols = min(32, block_rows), min(32, block_cols)
        depth, warps, stages = 16, 8, 2
    return Launch(
        block_rows=block_rows,
        block_cols=block_cols,
        block_depth=depth,
        warps=warps,
        stages=stages,
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    """``[P, B, I], [P, O, I], [P, O] -> [P, B, O]``; see `reference.linear`."""
    return _gemm(x, weight.mT, bias, None, precision)


def dx(dy: Tensor, weight: Tensor, precision: str) -> Tensor:
    """``[P, B, O], [P, O, I] -> [P, B, I]``; see `reference.linear_dx`."""
    return _gemm(dy, weight, None, None, precision)


def dw(dy: Tensor, x: Tensor, mask: Tensor, precision: str) -> Tensor:
    """``[P, B, O], [P, B, I], [P, O, I] -> [P, O, I]``; see `reference.linear_dw`."""
    return _gemm(dy.mT, x, None, mask.view(torch.uint8), precision)


def _gemm(a: Tensor, b: Tensor, bias: Tensor | None, mask: Tensor | None, precision: str) -> Tensor:
    tickets, rows, depth = a.shape
    cols = b.shape[2]
    c = a.new_empty(tickets, rows, cols)
    check_spans(first=a, second=b, output=c, mask=mask)
    if c.numel() == 0:
        return c
    exact = precision if a.dtype == torch.float32 else "ieee"
    tiles = prefer(
        choose_tiles(rows, cols, a.dtype, exact),
        "linear",
        a.device,
        rows=rows,
        cols=cols,
        depth=depth,
        masked=mask is not None,
        dtype=a.dtype,
        precision=exact,
    )
    programs = tickets * triton.cdiv(rows, tiles.block_rows) * triton.cdiv(cols, tiles.block_cols)
    with torch.cuda.device_of(a):
        _gemm_kernel[grid(programs)](
            a,
            b,
            bias,
            mask,
            c,
            rows,
            cols,
            depth,
            *a.stride(),
            *b.stride(),
            *(bias.stride() if bias is not None else (0, 0)),
            *(mask.stride() if mask is not None else (0, 0, 0)),
            ACCUMULATOR=accumulator(a.dtype),
            PRECISION=exact,
            **tiles.constexprs,
            **tiles.options,
        )
    return c


def _example(dtype: torch.dtype, precision: str, rows: int, cols: int) -> None:
    """All products of ``rows`` samples by ``rows`` inputs, into ``cols`` outputs."""
    x, dy = meta(2, rows, rows, dtype=dtype), meta(2, rows, cols, dtype=dtype)
    weight, bias = meta(2, cols, rows, dtype=dtype), meta(2, cols, dtype=dtype)
    forward(x, weight, bias, precision)
    dx(dy, weight, precision)
    dw(dy, x, meta(2, cols, rows, dtype=torch.bool), precision)


EXAMPLES = [
    Example(
        f"{str(dtype).removeprefix('torch.')}_{precision}_{rows}x{cols}",
        partial(_example, dtype, precision, rows, cols),
        exact=True,
    )
    for dtype, precision, rows, cols in (
        (torch.float64, "ieee", 256, 256),
        (torch.float32, "ieee", 256, 256),
        (torch.float32, "ieee", 4, 63),
        (torch.float32, "tf32", 256, 256),
        (torch.float32, "tf32x3", 256, 256),
        (torch.float16, "ieee", 256, 256),
        (torch.bfloat16, "ieee", 256, 256),
        (torch.bfloat16, "ieee", 4, 63),
    )
]
