"""A network of packed weights on a GPU: what `gpu` is to rows of the arena, on a pattern's layers.

The gradient arrives packed. Raw functions without autograd, validation or host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arena import Arena, Net
from ..compile import Case
from ..jit import jit_kernel
from ..packed import gpu as layer_gpu
from ..packed.layout import Layer, lay_out
from . import fused_gpu, passes_gpu, split_gpu
from .geometry import Geometry
from .gpu import choose
from .passes_gpu import Weights, with_rows

__all__ = ["COMPILE_CASES", "Packed", "backward", "forward"]

ADD_BLOCK = 1024
"""Entries of a row that a program of `add_kernel` sums up."""


@jit_kernel(fp_fusion=True)
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


@dataclass(frozen=True)
class Packed(Weights):
    """Packed weights, and the biases in what follows the prunable weights.

    Attributes:
        mask: the bits as octets.
        start: what precedes each tile.
        layers: the network's weight matrices in the pattern.
    """

    mask: Tensor
    start: Tensor
    layers: tuple[Layer, ...]

    @staticmethod
    def of(
        values: Tensor, bits: Tensor, start: Tensor, shapes: list[int], rest: Tensor, net: Net
    ) -> Packed:
        """Of a pattern's tensors, and the shapes of all its layers; see `mlp_packed`."""
        values, rest = with_rows(values), with_rows(rest)
        every = lay_out(*shapes)
        first = [layer.offset for layer in every].index(net.weights[0])
        layers = every[first : first + net.depth]
        geometry = Geometry.of_packed(net, layers, every[-1].offset + every[-1].out * every[-1].inp)
        return Packed(net, geometry, values, bits.view(torch.uint8), start, rest, layers)

    def product(self, x: Tensor, layer: int, precision: str) -> Tensor:
        begin = self.geometry.biases[layer]
        bias = self.bias[:, begin : begin + self.net.sizes[layer + 1]]
        return layer_gpu.forward(x, *self._pattern, bias, self.layers[layer], precision)

    def dx(self, dy: Tensor, layer: int, precision: str) -> Tensor:
        return layer_gpu.dx(dy, *self._pattern, self.layers[layer], precision)

    @property
    def _pattern(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.mask, self.start


def forward(
    weights: Packed, x: Tensor, precision: str, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``[P, B, I] -> [P, B, O]``, and the hidden activations if ``keep``; see `gpu.forward`."""
    route = choose(weights.net, precision).forward
    return passes_gpu.forward(weights, x, route, precision, keep)


def backward(
    weights: Packed,
    dy: Tensor,
    x: Tensor,
    precision: str,
    *,
    hidden: Tensor | None = None,
    to_input: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input, if asked for, of the values and of what follows the prunable weights.

    The last two are zero where the network has no parameters; see `gpu.backward`.
    """
    tickets, samples, _ = x.shape
    width, size = weights.weight.shape[1], weights.weight.shape[1] + weights.bias.shape[1]
    route = choose(weights.net, precision, to_input=to_input).backward
    dx = x.new_empty(x.shape) if to_input else None
    if tickets == 0 or samples == 0:
        return dx, *_zeros(weights)
    splits, stretch = passes_gpu.cut_as_measured(x, weights.geometry, route)
    stretches = splits, stretch
    if splits == 1:
        targets = _zeros(weights)
        passes_gpu.backward(weights, dy, x, route, precision, hidden, dx, targets, stretches)
        return dx, *targets
    partial = weights.weight.new_empty(tickets * splits, size)
    targets = partial[:, :width], partial[:, width:]
    passes_gpu.backward(weights, dy, x, route, precision, hidden, dx, targets, stretches)
    return dx, *_add(partial, weights, splits)


def _zeros(weights: Packed) -> tuple[Tensor, Tensor]:
    """For the gradients; rows are contiguous, however the weights' lie."""
    weight, bias = weights.weight, weights.bias
    return weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)


def _add(partial: Tensor, weights: Packed, splits: int) -> tuple[Tensor, Tensor]:
    """The gradients of values and rest from their rows per stretch."""
    tickets, width = weights.weight.shape
    size = partial.shape[1]
    dvalues, drest = partial.new_empty(tickets, width), partial.new_empty(tickets, size - width)
    last = weights.layers[-1]
    with torch.cuda.device_of(partial):
        add_kernel[(tickets, triton.cdiv(size, ADD_BLOCK))](
            partial,
            weights.start,
            dvalues,
            drest,
            splits,
            width,
            size,
            weights.start.stride(0),
            FIRST=weights.layers[0].first_tile,
            END=last.first_tile + last.tiles,
            SIZES=weights.geometry.sizes,
            BIASES=weights.geometry.biases,
            BLOCK=ADD_BLOCK,
        )
    return dvalues, drest


def _geometry(sizes: tuple[int, ...]) -> Geometry:
    """Of a pattern of one network."""
    arena = Arena.build(sizes)
    shapes = [size for _, *shape in arena.prunable_layers() for size in shape]
    return Geometry.of_packed(arena.actor, lay_out(*shapes), arena.prunable)


def _fused_cases() -> Iterator[Case]:
    """Every launch in registers."""
    for sizes, activation in (
        ((4, 64, 64, 2), "tanh"),
        ((4, 64, 64, 2), "relu"),
        ((64, 64, 64, 64), "relu"),
        ((17, 64, 64, 64, 6), "tanh"),
        ((64, 64, 64, 64, 64), "tanh"),
        ((64, 64, 64, 64, 64), "relu"),
        ((61, 61, 64, 61, 61), "tanh"),
        ((20, 33, 20, 20), "tanh"),
        ((32, 32, 32, 32, 32), "tanh"),
    ):
        geometry = _geometry(sizes)
        for launch in fused_gpu.launches(geometry.blocks, packed=True):
            for kernel in ("forward", "backward"):
                yield fused_gpu.case(kernel, geometry, activation, launch, suffix="_packed")


def _split_cases() -> Iterator[Case]:
    """Every launch through memory, on whole tiles and on parts."""
    for sizes in ((17, 128, 128, 6), (100, 128, 64, 128, 20)):
        geometry = _geometry(sizes)
        for precision in ("ieee", "tf32", "tf32x3"):
            walks = split_gpu.walks(precision, packed=True)
            gradients = split_gpu.gradients(packed=True)
            for kernel, launches in (
                (split_gpu.forward_kernel, walks),
                (split_gpu.delta_kernel, walks),
                (split_gpu.gradient_kernel, gradients),
            ):
                for launch in launches:
                    case = split_gpu.case(kernel, geometry, precision, launch)
                    # Sizes apart, only packed tiles tell these from cases of `split_gpu`.
                    first = precision == "tf32" and launch is launches[0] and len(sizes) == 4
                    yield case._replace(smoke=first)


_ADD = Case(
    "add_4_64_64_2_packed",
    add_kernel,
    dict.fromkeys(("partial", "target", "bias_target"), "*fp32:16")
    | {"start": "*i32:16"}
    | dict.fromkeys(("splits", "width", "size", "start_ticket"), "i32"),
    {"FIRST": 0, "END": 3, "SIZES": (4, 64, 64, 2), "BIASES": (0, 64, 128), "BLOCK": ADD_BLOCK},
    {},
)

COMPILE_CASES = [*_fused_cases(), *_split_cases(), _ADD]
