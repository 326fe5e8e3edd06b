"""Packed weights in Triton: the forward product, dX and packed dW of a layer, packing, unpacking.

A program expands the tiles it multiplies by in registers (`tiles`), so dense weights and dense
gradients never reach memory. Forward and dX give a program one tile of the output, which loops over
a row or a column of the layer's tiles; dW gives it one tile of the layer and loops over the batch.
Expanding costs some 400 instructions a tile and thread group, whatever the density: tiles of the
output are as high as registers allow, and so few programs expand the same tile. No grid depends on
how many weights are left. No atomics, sums in one order: a ticket's result does not depend on P.
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
from ..linear.operands_gpu import check_spans, grid
from ..tuning import prefer
from .layout import MAX_TILE, PackedLayer
from .tiles import load_packed_tile, store_packed_tile

__all__ = ["EXAMPLES", "choose_launch", "dw", "dx", "forward", "pack", "unpack"]


@jit_kernel(fp_fusion=True)
def _forward_kernel(
    x,
    values,
    bits,
    start,
    bias,
    y,
    batch,
    out,
    inp,
    x_ticket,
    x_row,
    x_col,
    values_ticket,
    bits_ticket,
    start_ticket,
    bias_ticket,
    bias_col,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[p] = x[p] w[p]ᵀ + bias[p]``; y is contiguous.

    A ticket takes 2·batch·out·inp FLOPs on dense tiles; it reads x once per tile of outputs, and
    its values and one bit a weight once per tile of rows.
    """
    tiles_out = tl.cdiv(out, TILE_OUT)
    tiles_in = tl.cdiv(inp, TILE_IN)
    tiles = tl.cdiv(batch, BLOCK_BATCH) * tiles_out
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile_out = program % tiles % tiles_out
    row = program % tiles // tiles_out * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)[:, None]
    col = tile_out * TILE_OUT + tl.arange(0, TILE_OUT)[None, :]
    values += ticket * values_ticket
    bits += ticket * bits_ticket
    start += ticket * start_ticket

    feature = tl.arange(0, TILE_IN)[None, :]
    x_tile = x + ticket * x_ticket + row * x_row + feature * x_col
    if WEIGHT_FIRST:
        total = tl.zeros((TILE_OUT, BLOCK_BATCH), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_BATCH, TILE_OUT), dtype=tl.float32)
    for tile_in in range(tiles_in):
        inside = (row < batch) & (feature < inp - tile_in * TILE_IN)
        x_values = tl.load(x_tile, mask=inside, other=0.0)
        tile = tile_out * tiles_in + tile_in
        weight = load_packed_tile(values, bits, start, tile, TILE_OUT, TILE_IN)
        if WEIGHT_FIRST:
            total = tl.dot(weight, tl.trans(x_values), total, input_precision=PRECISION)
        else:
            total = tl.dot(x_values, tl.trans(weight), total, input_precision=PRECISION)
        x_tile += TILE_IN * x_col

    if WEIGHT_FIRST:
        total = tl.trans(total)
    if bias is not None:
        bias_values = tl.load(bias + ticket * bias_ticket + col * bias_col, mask=col < out)
        total += bias_values.to(tl.float32)
    y_tile = y + ticket * batch * out + row * out + col
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=(row < batch) & (col < out))


@jit_kernel(fp_fusion=True)
def _dx_kernel(
    dy,
    values,
    bits,
    start,
    dx,
    batch,
    out,
    inp,
    dy_ticket,
    dy_row,
    dy_col,
    values_ticket,
    bits_ticket,
    start_ticket,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dx[p] = dy[p] w[p]``; dx is contiguous. Work and traffic are those of the forward pass."""
    tiles_out = tl.cdiv(out, TILE_OUT)
    tiles_in = tl.cdiv(inp, TILE_IN)
    tiles = tl.cdiv(batch, BLOCK_BATCH) * tiles_in
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile_in = program % tiles % tiles_in
    row = program % tiles // tiles_in * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)[:, None]
    col = tile_in * TILE_IN + tl.arange(0, TILE_IN)[None, :]
    values += ticket * values_ticket
    bits += ticket * bits_ticket
    start += ticket * start_ticket

    feature = tl.arange(0, TILE_OUT)[None, :]
    dy_tile = dy + ticket * dy_ticket + row * dy_row + feature * dy_col
    total = tl.zeros((BLOCK_BATCH, TILE_IN), dtype=tl.float32)
    for tile_out in range(tiles_out):
        inside = (row < batch) & (feature < out - tile_out * TILE_OUT)
        dy_values = tl.load(dy_tile, mask=inside, other=0.0)
        tile = tile_out * tiles_in + tile_in
        weight = load_packed_tile(values, bits, start, tile, TILE_OUT, TILE_IN)
        total = tl.dot(dy_values, weight, total, input_precision=PRECISION)
        dy_tile += TILE_OUT * dy_col

    dx_tile = dx + ticket * batch * inp + row * inp + col
    tl.store(dx_tile, total.to(dx.dtype.element_ty), mask=(row < batch) & (col < inp))


@jit_kernel(fp_fusion=True)
def _dw_kernel(
    dy,
    x,
    values,
    bits,
    start,
    squares,
    batch,
    out,
    inp,
    dy_ticket,
    dy_row,
    dy_col,
    x_ticket,
    x_row,
    x_col,
    values_ticket,
    bits_ticket,
    start_ticket,
    squares_ticket,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Entries of ``dy[p]ᵀ x[p]`` on the mask, packed, and the sum of their squares by tile.

    A ticket takes 2·batch·out·inp FLOPs, reads dy once per tile of inputs and x once per tile of
    outputs, and writes its values alone.
    """
    tiles_in = tl.cdiv(inp, TILE_IN)
    tiles = tl.cdiv(out, TILE_OUT) * tiles_in
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = tile // tiles_in * TILE_OUT + tl.arange(0, TILE_OUT)[None, :]
    col = tile % tiles_in * TILE_IN + tl.arange(0, TILE_IN)[None, :]
    sample = tl.arange(0, BLOCK_BATCH)[:, None]

    dy_tile = dy + ticket * dy_ticket + sample * dy_row + row * dy_col
    x_tile = x + ticket * x_ticket + sample * x_row + col * x_col
    total = tl.zeros((TILE_OUT, TILE_IN), dtype=tl.float32)
    for first in range(0, batch, BLOCK_BATCH):
        left = sample < batch - first
        dy_values = tl.load(dy_tile, mask=left & (row < out), other=0.0)
        x_values = tl.load(x_tile, mask=left & (col < inp), other=0.0)
        total = tl.dot(tl.trans(dy_values), x_values, total, input_precision=PRECISION)
        dy_tile += BLOCK_BATCH * dy_row
        x_tile += BLOCK_BATCH * x_row

    kept = store_packed_tile(
        values + ticket * values_ticket,
        bits + ticket * bits_ticket,
        start + ticket * start_ticket,
        tile,
        total,
        TILE_OUT,
        TILE_IN,
    )
    if squares is not None:
        square = tl.sum(tl.reshape(kept * kept, [TILE_OUT * TILE_IN]), 0)
        tl.store(squares + ticket * squares_ticket + tile, square.to(squares.dtype.element_ty))


@jit_kernel(fp_fusion=True)
def _move_kernel(
    dense,
    values,
    bits,
    start,
    out,
    inp,
    dense_ticket,
    values_ticket,
    bits_ticket,
    start_ticket,
    PACK: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
):
    """One tile of a layer from ``dense``, row-major, to ``values`` (`PACK`) or back."""
    tiles_in = tl.cdiv(inp, TILE_IN)
    tiles = tl.cdiv(out, TILE_OUT) * tiles_in
    ticket = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile // tiles_in * TILE_OUT + tl.arange(0, TILE_OUT)[:, None]
    col = tile % tiles_in * TILE_IN + tl.arange(0, TILE_IN)[None, :]
    inside = (row < out) & (col < inp)
    dense_tile = dense + ticket * dense_ticket + row * inp + col
    values += ticket * values_ticket
    bits += ticket * bits_ticket
    start += ticket * start_ticket
    if PACK:
        weight = tl.load(dense_tile, mask=inside, other=0.0)
        store_packed_tile(values, bits, start, tile, weight, TILE_OUT, TILE_IN)
    else:
        weight = load_packed_tile(values, bits, start, tile, TILE_OUT, TILE_IN)
        tl.store(dense_tile, weight, mask=inside)


def choose_launch(
    product: str, batch: int, layer: PackedLayer, dtype: torch.dtype, precision: str
) -> Launch:
    """A fixed function of product (``forward``, ``dx``, ``dw``), shape, dtype and precision.

    The largest that spill no registers from Ampere to Blackwell: tf32x3 keeps three copies of what
    it multiplies in registers, IEEE float32 its operands. IEEE needs fewer than 64 rows besides: on
    such tiles Triton 3.6 and 3.7 compile larger dots to TF32 on Blackwell.
    """
    rows = max(16, triton.next_power_of_2(batch))
    if dtype != torch.float32:
        return Launch(block_batch=min(64 if product == "dw" else 128, rows), warps=4, stages=2)
    if product == "dw":
        depth = {"ieee": 16, "tf32": 32, "tf32x3": 32}[precision]
        return Launch(block_batch=min(depth, rows), warps=4, stages=2)
    if precision == "ieee":
        return Launch(block_batch=16, warps=8, stages=1)
    if precision == "tf32x3":
        full = layer.tile_out == layer.tile_in == MAX_TILE
        rows = min(32 if product == "forward" else 128 if full else 64, rows)
    return Launch(block_batch=min(128, rows), warps=8 if rows >= 128 else 4, stages=1)


def forward(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    bias: Tensor | None,
    layer: PackedLayer,
    precision: str,
) -> Tensor:
    """See `reference.forward`."""
    tickets, batch, _ = x.shape
    y = x.new_empty(tickets, batch, layer.out)
    if y.numel() == 0:
        return y
    check_spans(x=x, y=y)
    launch = _launch("forward", x, layer, precision)
    programs = tickets * triton.cdiv(batch, launch.block_batch) * layer.tiles_out
    packed = _packed(values, bits, start, layer)
    with torch.cuda.device_of(x):
        _forward_kernel[grid(programs)](
            x,
            *packed,
            bias,
            y,
            batch,
            layer.out,
            layer.inp,
            *x.stride(),
            *(tensor.stride(0) for tensor in packed),
            *(bias.stride() if bias is not None else (0, 0)),
            **_constexprs("forward", layer, launch, x.dtype, precision),
            **launch.options,
        )
    return y


def dx(
    dy: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer, precision: str
) -> Tensor:
    """See `reference.dx`."""
    tickets, batch, _ = dy.shape
    result = dy.new_empty(tickets, batch, layer.inp)
    if result.numel() == 0:
        return result
    check_spans(dy=dy, dx=result)
    launch = _launch("dx", dy, layer, precision)
    programs = tickets * triton.cdiv(batch, launch.block_batch) * layer.tiles_in
    packed = _packed(values, bits, start, layer)
    with torch.cuda.device_of(dy):
        _dx_kernel[grid(programs)](
            dy,
            *packed,
            result,
            batch,
            layer.out,
            layer.inp,
            *dy.stride(),
            *(tensor.stride(0) for tensor in packed),
            **_constexprs("dx", layer, launch, dy.dtype, precision),
            **launch.options,
        )
    return result


def dw(
    target: Tensor,
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    layer: PackedLayer,
    precision: str,
    squares: Tensor | None = None,
) -> None:
    """See `reference.dw`: the layer's entries of ``target [P, k]`` and ``squares [P, tiles]``."""
    tickets, batch, _ = dy.shape
    if tickets == 0:
        return
    check_spans(dy=dy, x=x)
    launch = _launch("dw", x, layer, precision)
    packed = _packed(target, bits, start, layer)
    with torch.cuda.device_of(x):
        _dw_kernel[grid(tickets * layer.tiles)](
            dy,
            x,
            *packed,
            None if squares is None else squares[:, layer.first_tile :],
            batch,
            layer.out,
            layer.inp,
            *dy.stride(),
            *x.stride(),
            *(tensor.stride(0) for tensor in packed),
            0 if squares is None else squares.stride(0),
            **_constexprs("dw", layer, launch, x.dtype, precision),
            **launch.options,
        )


def pack(
    dense: Tensor, bits: Tensor, start: Tensor, layers: tuple[PackedLayer, ...], width: int
) -> Tensor:
    """See `reference.pack`."""
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    values = dense.new_zeros(dense.shape[0], width)
    for layer in layers:
        _move(dense, values, bits, start, layer, pack=True)
    return values


def unpack(
    values: Tensor, bits: Tensor, start: Tensor, layers: tuple[PackedLayer, ...], size: int
) -> Tensor:
    """See `reference.unpack`."""
    dense = values.new_empty(values.shape[0], size)
    for layer in layers:
        _move(dense, values, bits, start, layer, pack=False)
    return dense


def _move(
    dense: Tensor, values: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer, pack: bool
) -> None:
    tickets = dense.shape[0]
    if tickets == 0:
        return
    packed = _packed(values, bits, start, layer)
    with torch.cuda.device_of(dense):
        _move_kernel[grid(tickets * layer.tiles)](
            dense[:, layer.offset :],
            *packed,
            layer.out,
            layer.inp,
            dense.stride(0),
            *(tensor.stride(0) for tensor in packed),
            PACK=pack,
            TILE_OUT=layer.tile_out,
            TILE_IN=layer.tile_in,
        )


def _launch(product: str, operand: Tensor, layer: PackedLayer, precision: str) -> Launch:
    """What was measured on this device for such a product, or what was built in."""
    batch = operand.shape[1]
    return prefer(
        choose_launch(product, batch, layer, operand.dtype, precision),
        f"linear_packed.{product}",
        operand.device,
        batch=batch,
        out=layer.out,
        inp=layer.inp,
        dtype=operand.dtype,
        precision=precision,
    )


def _packed(
    values: Tensor, bits: Tensor, start: Tensor, layer: PackedLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of all layers, and the bits (by byte) and starts of this one."""
    octets = bits.view(torch.uint8)
    return (
        values if values.stride(1) == 1 else values.contiguous(),
        octets[:, 4 * layer.first_word :],
        start[:, layer.first_tile :],
    )


def _constexprs(
    product: str, layer: PackedLayer, launch: Launch, dtype: torch.dtype, precision: str
) -> dict[str, object]:
    exact = precision if dtype == torch.float32 else "ieee"
    constexprs: dict[str, object] = {**launch.constexprs, "PRECISION": exact}
    constexprs |= {"TILE_OUT": layer.tile_out, "TILE_IN": layer.tile_in}
    if product == "forward":
        # Hopper's tensor cores take 64 rows of the first operand, of whichever has them.
        fits = layer.tile_out == MAX_TILE or launch.block_batch < MAX_TILE
        constexprs["WEIGHT_FIRST"] = fits and (dtype != torch.float32 or exact != "ieee")
    return constexprs


def _example(dtype: torch.dtype, precision: str, batch: int, out: int, inp: int) -> None:
    """All of a layer that another precedes: its values and tiles begin anywhere."""
    layer = PackedLayer(256, out, inp, 1, 8)
    bits = meta(2, 8 * (layer.words // 8 + 2), dtype=torch.int32)
    start = meta(2, layer.tiles + 2, dtype=torch.int32)
    values = meta(2, 1001, dtype=dtype)
    x, dy = meta(2, batch, inp, dtype=dtype), meta(2, batch, out, dtype=dtype)
    forward(x, values, bits, start, meta(2, out, dtype=dtype), layer, precision)
    dx(dy, values, bits, start, layer, precision)
    dw(values, dy, x, bits, start, layer, precision, meta(2, layer.tiles + 1))


def _move_example(dtype: torch.dtype) -> None:
    layer = PackedLayer(256, 256, 256, 1, 8)
    bits = meta(2, 8 * (layer.words // 8 + 2), dtype=torch.int32)
    start = meta(2, layer.tiles + 2, dtype=torch.int32)
    values, dense = meta(2, 1001, dtype=dtype), meta(2, 256 * 258, dtype=dtype)
    for pack in (True, False):
        _move(dense, values, bits, start, layer, pack)


EXAMPLES = [
    *(
        Example(
            f"{str(dtype).removeprefix('torch.')}_{precision}_{batch}x{out}x{inp}",
            partial(_example, dtype, precision, batch, out, inp),
            exact=True,
        )
        for dtype, precision, batch, out, inp in (
            (torch.float32, "ieee", 256, 256, 256),
            (torch.float32, "tf32", 64, 256, 256),
            (torch.float32, "tf32", 256, 256, 256),
            (torch.float32, "tf32x3", 64, 256, 256),
            (torch.float32, "tf32x3", 256, 256, 256),
            (torch.float32, "tf32x3", 64, 64, 4),
            (torch.float32, "tf32x3", 16, 2, 64),
            (torch.float16, "ieee", 256, 256, 256),
            (torch.bfloat16, "ieee", 256, 256, 256),
            (torch.bfloat16, "ieee", 64, 64, 4),
            (torch.bfloat16, "ieee", 16, 2, 64),
        )
    ),
    *(
        Example(str(dtype).removeprefix("torch."), partial(_move_example, dtype), exact=True)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
