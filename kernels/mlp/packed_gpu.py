"""A network of packed weights on a GPU: the fused kernels, launched on a pattern's layers.

What `gpu` is to rows of the arena. The gradient arrives packed: no dense weight or gradient reaches
memory. Raw functions without autograd, validation or host synchronisation. How the samples are cut
follows from their number alone, never from P or from how many weights are left.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arena import Arena, Net
from ..compile import Case
from ..packed import Pattern
from ..packed.layout import Layer, lay_out
from . import fused_gpu
from .geometry import Geometry
from .gpu import (
    FUSED_DEPTH,
    FUSED_STRETCH,
    FUSED_WIDTH,
    choose,
    cut_as_measured,
    prefer_launch,
    with_rows,
)

__all__ = ["COMPILE_CASES", "backward", "describe", "forward", "is_fused"]

BACKWARD_DEPTH = {"tanh": 3, "relu": 2}
"""Most layers whose gradients stay in registers beside the tiles: beyond it, compilers spill."""

BACKWARD_OUTPUT = 32
"""Widest output of the same."""

ADD_BLOCK = 1024
"""Entries of a row that a program of `add_kernel` sums up."""


@triton.jit
def add_kernel(
    partial,
    start,
    target,
    bias_target,
    splits,
    width,
    size,
    start_ticket,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    SIZES: tl.constexpr,
    BIASES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the stretches' rows in order; entries that do not belong to the network become zero.

    A row holds ``width`` packed entries, of which the network owns those of tiles ``[FIRST, END)``,
    then what `bias_target` holds. Reads 4·splits and writes 4 bytes an entry.
    """
    ticket = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start += ticket * start_ticket
    owned = (column >= tl.load(start + FIRST)) & (column < tl.load(start + END))
    for layer in tl.static_range(len(SIZES) - 1):
        bias = column - width - BIASES[layer]
        owned = owned | ((bias >= 0) & (bias < SIZES[layer + 1]))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    partial += ticket * splits * size + column
    for _ in range(splits):
        total += tl.load(partial, mask=owned, other=0.0)
        partial += size
    tl.store(target + ticket * width + column, total, mask=column < width)
    beyond = (column >= width) & (column < size)
    tl.store(bias_target + ticket * (size - width) + column - width, total, mask=beyond)


def is_fused(net: Net, precision: str, *, to_input: bool, backward: bool) -> bool:
    """Whether the kernels take the network.

    Args:
        net: its sizes count.
        precision: the kernels know ``ieee`` alone.
        to_input: whether the input's gradient is asked for, which they leave out.
        backward: whether any gradient is asked for.
    """
    route = choose(net, precision, to_input=to_input)
    if not backward:
        return route.forward == "fused"
    fits = net.depth <= BACKWARD_DEPTH[net.activation] and net.sizes[-1] <= BACKWARD_OUTPUT
    return fits and route.backward == "fused"


def describe(net: Net, precision: str, *, to_input: bool) -> str:
    """What runs where gradients are asked for, in words; arguments as for `is_fused`."""
    if is_fused(net, precision, to_input=to_input, backward=True):
        return (
            "forward in one launch with tiles and activations in registers; backward in one launch "
            "that recomputes them, and one that adds up stretches"
        )
    if is_fused(net, precision, to_input=to_input, backward=False):
        return (
            "layer by layer as linear_packed, of which one launch takes the place where no "
            "gradient is asked for: the fused backward pass takes no input gradient, at most "
            f"{BACKWARD_DEPTH[net.activation]} layers of {net.activation} and "
            f"{BACKWARD_OUTPUT} outputs"
        )
    return (
        "layer by layer as linear_packed: the fused kernels take at most "
        f"{FUSED_DEPTH} layers of width {FUSED_WIDTH}, and ieee products"
    )


def forward(x: Tensor, values: Tensor, pattern: Pattern, rest: Tensor, net: Net) -> Tensor:
    """``[P, B, I] -> [P, B, O]``; see `mlp_packed`. All numbers are float32."""
    x, values, rest = with_rows(x), with_rows(values), with_rows(rest)
    tickets, samples, _ = x.shape
    y = x.new_empty(tickets, samples, net.sizes[-1])
    if y.numel():
        launch = _launch("forward", x, net, pattern)
        with torch.cuda.device_of(x):
            fused_gpu.forward_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
                x,
                values,
                *_places(pattern),
                rest,
                y,
                samples,
                x.stride(0),
                x.stride(1),
                values.stride(0),
                *_strides(pattern),
                rest.stride(0),
                **_constants(net, pattern),
                **launch.constexprs,
                **launch.options,
            )
    return y


def backward(
    dy: Tensor, x: Tensor, values: Tensor, pattern: Pattern, rest: Tensor, net: Net
) -> tuple[Tensor, Tensor]:
    """Gradients of `values` and of `rest`, zero where `net` has no parameters; see `mlp_packed`."""
    dy, x, values, rest = (with_rows(tensor) for tensor in (dy, x, values, rest))
    tickets, samples, _ = x.shape
    width, size = values.shape[1], values.shape[1] + rest.shape[1]
    geometry = _geometry(net, pattern)
    splits, stretch = cut_as_measured(x, geometry, FUSED_STRETCH) if samples else (0, 0)
    if tickets == 0 or splits < 2:
        dvalues, drest = torch.zeros_like(values), torch.zeros_like(rest)
        target, bias_target = dvalues, drest
    else:
        dvalues, drest = values.new_empty(values.shape), rest.new_empty(rest.shape)
        partial = values.new_empty(tickets * splits, size)
        target, bias_target = partial[:, :width], partial[:, width:]
    if tickets == 0 or samples == 0:
        return dvalues, drest
    launch = _launch("backward", x, net, pattern)
    with torch.cuda.device_of(x):
        fused_gpu.backward_kernel[(tickets, splits)](
            dy,
            x,
            values,
            *_places(pattern),
            rest,
            target,
            bias_target,
            samples,
            stretch,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            values.stride(0),
            *_strides(pattern),
            rest.stride(0),
            target.stride(0),
            bias_target.stride(0),
            **_constants(net, pattern),
            **launch.constexprs,
            **launch.options,
        )
        if splits > 1:
            layers = _layers(net, pattern)
            add_kernel[(tickets, triton.cdiv(size, ADD_BLOCK))](
                partial,
                pattern.start,
                dvalues,
                drest,
                splits,
                width,
                size,
                pattern.start.stride(0),
                FIRST=layers[0].first_tile,
                END=layers[-1].first_tile + layers[-1].tiles,
                SIZES=geometry.sizes,
                BIASES=geometry.biases,
                BLOCK=ADD_BLOCK,
            )
    return dvalues, drest


def _layers(net: Net, pattern: Pattern) -> tuple[Layer, ...]:
    """The network's weight matrices in the pattern."""
    first = [layer.offset for layer in pattern.layers].index(net.weights[0])
    return pattern.layers[first : first + net.depth]


def _geometry(net: Net, pattern: Pattern) -> Geometry:
    return Geometry.of_packed(net, _layers(net, pattern), pattern.size)


def _constants(net: Net, pattern: Pattern) -> dict[str, Any]:
    geometry = _geometry(net, pattern)
    return {
        **geometry.constexprs,
        "BLOCKS": geometry.blocks,
        "TILES": geometry.tiles,
        "ACTIVATION": net.activation,
    }


def _launch(kernel: str, x: Tensor, net: Net, pattern: Pattern) -> fused_gpu.Launch:
    """What was measured on this device for such a pass, or what is built in."""
    geometry = _geometry(net, pattern)
    launches = fused_gpu.launches(geometry.blocks, packed=True)
    return prefer_launch(launches, f"packed_{kernel}", x, geometry, net.activation)


def _places(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The bits as octets, and the tiles' starts."""
    return pattern.bits.view(torch.uint8), pattern.start


def _strides(pattern: Pattern) -> tuple[int, int]:
    """Of `_places`, from ticket to ticket."""
    return 4 * pattern.bits.stride(0), pattern.start.stride(0)


def _packed_cases(kernel: str, sizes: tuple[int, ...], activation: str) -> list[Case]:
    """All launches on a pattern of one network."""
    arena = Arena.build(sizes)
    shapes = [size for _, *shape in arena.prunable_layers() for size in shape]
    geometry = Geometry.of_packed(arena.actor, lay_out(*shapes), arena.prunable)
    return [
        fused_gpu.case(kernel, geometry, activation, launch, suffix="_packed")
        for launch in fused_gpu.launches(geometry.blocks, packed=True)
    ]


_ADD = Case(
    "add_4_64_64_2_packed",
    add_kernel,
    dict.fromkeys(("partial", "target", "bias_target"), "*fp32:16")
    | {"start": "*i32:16"}
    | dict.fromkeys(("splits", "width", "size", "start_ticket"), "i32"),
    {"FIRST": 0, "END": 3, "SIZES": (4, 64, 64, 2), "BIASES": (0, 64, 128), "BLOCK": ADD_BLOCK},
    {},
)

COMPILE_CASES = [
    case
    for kernel, sizes, activation in (
        ("forward", (4, 64, 64, 2), "tanh"),
        ("forward", (4, 64, 64, 2), "relu"),
        ("forward", (64, 64, 64, 64), "relu"),
        ("forward", (17, 64, 64, 64, 6), "tanh"),
        ("forward", (32, 32, 32, 32, 32), "tanh"),
        ("backward", (4, 64, 64, 2), "tanh"),
        ("backward", (64, 64, 64, 20), "tanh"),
        ("backward", (20, 33, 20, 20), "tanh"),
        ("backward", (32, 32, 32, 32), "tanh"),
        ("backward", (64, 64, 20), "relu"),
    )
    for case in _packed_cases(kernel, sizes, activation)
]
COMPILE_CASES.append(_ADD)
