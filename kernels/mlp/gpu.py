"""A network of a population on a GPU: which Triton kernels run, and their launches.

Raw functions without autograd, validation or host synchronisation: `forward`, `backward` and
`choose`, which tells how wide networks may be for which kernels. Outputs can be given, so that a
CUDA graph finds them where it left them. How the samples are cut follows from their number and the
shape of the network alone, never from P; so do the launches, measured (`kernels.tuning`) or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, TypeVar

import torch
import triton
from torch import Tensor

from ..arena import Net
from ..linear import gpu as layer_gpu
from ..tuning import prefer
from . import fused_gpu, split_gpu
from .geometry import Geometry

__all__ = [
    "COMPILE_CASES",
    "Route",
    "Stretch",
    "backward",
    "choose",
    "cut",
    "cut_as_measured",
    "describe",
    "forward",
    "prefer_launch",
    "with_rows",
]

Launch = TypeVar("Launch")

COMPILE_CASES = [*fused_gpu.COMPILE_CASES, *split_gpu.COMPILE_CASES]

FUSED_WIDTH = 64
"""Widest network whose activations stay in registers."""

FUSED_WEIGHTS = 3 * 64 * 64
"""Most weights, counted in whole tiles, whose gradients stay in registers; four such layers spill.
"""

FUSED_DEPTH = 4
"""Most layers of a fused network: it is unrolled, and takes that long to compile."""

WIDTH = 128
"""Widest network that one program walks through; beyond it a layer alone fills a GPU."""

FUSED_STRETCH = 64
"""Samples whose gradient a program sums up, unless that took more than `MOST_STRETCHES`.

At 60 tickets and 128 samples that makes 120 programs, about one per multiprocessor of an H100.
"""

SPLIT_STRETCH = 512
"""The same where a layer's tiles are programs of their own."""

STRETCH_UNIT = 32
"""Samples that a tile of any kernel divides."""

MOST_STRETCHES = 16
"""Beyond it their sums would cost more traffic than the samples do."""


@dataclass(frozen=True)
class Stretch:
    """What `cut` is asked for.

    Attributes:
        samples: whose gradient a program sums up.
    """

    samples: int


@dataclass(frozen=True)
class Route:
    """Which kernels run.

    Attributes:
        forward: ``fused`` in registers, ``walk`` through memory in one launch too, or ``layers``.
        backward: ``fused`` with the forward pass recomputed, or ``split``: deltas, then every
            layer's weight gradient in one launch; ``layers`` makes the deltas layer by layer.
    """

    forward: Literal["fused", "walk", "layers"]
    backward: Literal["fused", "split", "layers"]


def choose(net: Net, precision: str, *, to_input: bool = False) -> Route:
    """The route of a network: a fixed function of its shape, the precision and what is asked.

    Args:
        net: its sizes count.
        precision: the fused kernels know ``ieee`` alone: on tensor cores they spill.
        to_input: whether the input's gradient is asked for, which the fused backward leaves out.
    """
    if max(net.sizes) > WIDTH:
        return Route("layers", "layers")
    if precision != "ieee" or not _is_narrow(net):
        return Route("walk", "split")
    blocks = Geometry.of(net, 0).blocks
    weights = sum(inp * out for inp, out in pairwise(blocks))
    return Route("fused", "split" if to_input or weights > FUSED_WEIGHTS else "fused")


def _is_narrow(net: Net) -> bool:
    """Whether registers hold a sample's way through the network."""
    return max(net.sizes) <= FUSED_WIDTH and net.depth <= FUSED_DEPTH


def describe(net: Net, precision: str, *, to_input: bool = False) -> str:
    """The route in words; arguments as for `choose`."""
    route = choose(net, precision, to_input=to_input)
    registers = "forward in one launch with activations in registers"
    if route.backward != "fused":
        registers += ", or in memory where a backward pass reads them"
    forward = {
        "fused": registers,
        "walk": "forward in one launch with activations in memory",
        "layers": "forward layer by layer",
    }[route.forward]
    backward = {
        "fused": "backward in one launch that recomputes them, and one that adds up stretches",
        "split": "backward in a launch for the deltas and one for the gradients of all layers",
        "layers": "deltas layer by layer and one launch for the gradients of all layers",
    }[route.backward]
    reason = f"{forward}; {backward}; width {max(net.sizes)}, {precision} products"
    if precision != "ieee" and _is_narrow(net):
        reason += ", for which tensor cores want the registers that would hold activations"
    return reason


def forward(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None = None,
    precision: str = "ieee",
    *,
    keep: bool = False,
    y: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``[P, B, I] -> [P, B, O]``; see `mlp`.

    Args:
        x: float32, as all tensors here.
        weight: ``[P, size]``, rows of an arena.
        net: where the network lies in the row.
        mask: ``[P, N]`` bool, or None.
        precision: of the products: ``ieee``, ``tf32`` or ``tf32x3``.
        keep: return the hidden activations, which every backward pass but the fused one needs.
        y: ``[P, B, O]`` contiguous, written and returned.
        hidden: ``[P, B, sum of hidden sizes]`` contiguous; written, unless the pass is fused.

    Returns:
        y, and the hidden activations if ``keep``, else None.
    """
    x, weight, mask = with_rows(x), with_rows(weight), _as_bytes(mask)
    tickets, samples, _ = x.shape
    geometry = _geometry(net, mask)
    route = choose(net, precision).forward
    if route == "fused" and keep:
        route = "walk"
    if y is None:
        y = x.new_empty(tickets, samples, net.sizes[-1])
    if hidden is None:
        hidden = x.new_empty(tickets, samples, 0 if route == "fused" else geometry.hidden)
    if y.numel():
        with torch.cuda.device_of(x):
            if route == "fused":
                _forward_fused(x, weight, mask, net, geometry, y)
            elif route == "walk":
                _forward_walk(x, weight, mask, net, geometry, precision, y, hidden)
            else:
                _forward_layers(x, weight, mask, net, precision, y, hidden)
    return y, hidden if keep else None


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None = None,
    precision: str = "ieee",
    *,
    hidden: Tensor | None = None,
    to_input: bool = False,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `x`, if asked for, and of `weight`; see `mlp`.

    Args:
        dy: ``[P, B, O]``, gradient of the output.
        x: as in `forward`.
        weight: as in `forward`.
        net: as in `forward`.
        mask: as in `forward`.
        precision: as in `forward`.
        hidden: what `forward` kept; recomputed if it is needed and None.
        to_input: whether the input's gradient is asked for.
        dx: ``[P, B, I]`` contiguous, written and returned if ``to_input``.
        dweight: ``[P, size]`` with contiguous rows, written and returned.

    Returns:
        dx or None, and dweight: zero off the mask and where `net` has no parameters.
    """
    dy, x, weight, mask = with_rows(dy), with_rows(x), with_rows(weight), _as_bytes(mask)
    tickets, samples, _ = x.shape
    geometry = _geometry(net, mask)
    route = choose(net, precision, to_input=to_input).backward
    if not to_input:
        dx = None
    elif dx is None:
        dx = x.new_empty(x.shape)
    if dweight is None:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if tickets == 0 or samples == 0:
        return dx, dweight.zero_()

    fused = route == "fused"
    splits, stretch = cut_as_measured(x, geometry, FUSED_STRETCH if fused else SPLIT_STRETCH)
    rows = dweight.zero_() if splits == 1 else weight.new_empty(tickets * splits, weight.shape[1])
    with torch.cuda.device_of(x):
        if route == "fused":
            _backward_fused(dy, x, weight, mask, net, geometry, rows, splits, stretch)
        else:
            if hidden is None:
                kept = None if mask is None else mask.view(torch.bool)
                hidden = x.new_empty(tickets, samples, geometry.hidden)
                forward(x, weight, net, kept, precision, keep=True, hidden=hidden)
            deltas = torch.empty_like(hidden)
            down = _deltas_walk if route == "split" else _deltas_layers
            down(dy, weight, mask, net, geometry, precision, hidden, deltas, dx)
            _gradient(dy, x, hidden, deltas, mask, geometry, precision, rows, splits, stretch)
        if splits > 1:
            _add(rows, dweight, geometry, splits)
    return dx, dweight


def _forward_fused(
    x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, geometry: Geometry, y: Tensor
) -> None:
    tickets, samples, _ = x.shape
    launches = fused_gpu.launches(geometry.blocks, packed=False)
    launch = prefer_launch(launches, "fused_forward", x, geometry, net.activation)
    fused_gpu.forward_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        x,
        weight,
        mask,
        None,
        weight,
        y,
        samples,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        _stride(mask),
        0,
        weight.stride(0),
        **geometry.constexprs,
        BLOCKS=geometry.blocks,
        TILES=None,
        ACTIVATION=net.activation,
        **launch.constexprs,
        **launch.options,
    )


def _forward_walk(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    geometry: Geometry,
    precision: str,
    y: Tensor,
    hidden: Tensor,
) -> None:
    tickets, samples, _ = x.shape
    launch = prefer_launch(split_gpu.WALKS, "forward", x, geometry, precision)
    split_gpu.forward_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        x,
        weight,
        mask,
        y,
        hidden,
        samples,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        _stride(mask),
        **geometry.constexprs,
        HIDDEN=geometry.hidden,
        ACTIVATION=net.activation,
        PRECISION=precision,
        **launch.constexprs(precision),
        **launch.options,
    )


def _forward_layers(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    precision: str,
    y: Tensor,
    hidden: Tensor,
) -> None:
    inputs = x
    for layer, place in enumerate(_places(net, hidden)):
        matrix = _masked(weight, mask, net, layer)
        inputs = layer_gpu.forward(inputs, matrix, net.bias(weight, layer), precision)
        if net.activation == "tanh":
            inputs = torch.tanh(inputs, out=place)
        else:
            inputs = torch.clamp_min(inputs, 0, out=place)
    last = net.depth - 1
    matrix = _masked(weight, mask, net, last)
    y.copy_(layer_gpu.forward(inputs, matrix, net.bias(weight, last), precision))


def _backward_fused(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    geometry: Geometry,
    rows: Tensor,
    splits: int,
    stretch: int,
) -> None:
    tickets, samples, _ = x.shape
    launches = fused_gpu.launches(geometry.blocks, packed=False)
    launch = prefer_launch(launches, "fused_backward", x, geometry, net.activation)
    fused_gpu.backward_kernel[(tickets, splits)](
        dy,
        x,
        weight,
        mask,
        None,
        weight,
        rows,
        rows,
        samples,
        stretch,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        _stride(mask),
        0,
        weight.stride(0),
        rows.stride(0),
        rows.stride(0),
        **geometry.constexprs,
        BLOCKS=geometry.blocks,
        TILES=None,
        ACTIVATION=net.activation,
        **launch.constexprs,
        **launch.options,
    )


def _deltas_walk(
    dy: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    geometry: Geometry,
    precision: str,
    hidden: Tensor,
    deltas: Tensor,
    dx: Tensor | None,
) -> None:
    tickets, samples, _ = dy.shape
    constants = geometry.constexprs
    del constants["BIASES"]
    launch = prefer_launch(split_gpu.WALKS, "deltas", dy, geometry, precision)
    split_gpu.delta_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        dy,
        weight,
        mask,
        hidden,
        deltas,
        dx,
        samples,
        dy.stride(0),
        dy.stride(1),
        weight.stride(0),
        _stride(mask),
        **constants,
        HIDDEN=geometry.hidden,
        ACTIVATION=net.activation,
        PRECISION=precision,
        **launch.constexprs(precision),
        **launch.options,
    )


def _deltas_layers(
    dy: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    geometry: Geometry,
    precision: str,
    hidden: Tensor,
    deltas: Tensor,
    dx: Tensor | None,
) -> None:
    delta = dy
    layers = zip(_places(net, hidden), _places(net, deltas), strict=True)
    for layer, (y, place) in reversed(list(enumerate(layers, 1))):
        above = layer_gpu.dx(delta, _masked(weight, mask, net, layer), precision)
        if net.activation == "tanh":
            delta = torch.ops.aten.tanh_backward.grad_input(above, y, grad_input=place)
        else:
            delta = torch.ops.aten.threshold_backward.grad_input(above, y, 0, grad_input=place)
    if dx is not None:
        dx.copy_(layer_gpu.dx(delta, _masked(weight, mask, net, 0), precision))


def _gradient(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    deltas: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    precision: str,
    rows: Tensor,
    splits: int,
    stretch: int,
) -> None:
    tickets, samples, _ = x.shape
    launch = prefer_launch(split_gpu.GRADIENTS, "gradient", x, geometry, precision)
    cut_layers = launch.constexprs(geometry, precision)
    split_gpu.gradient_kernel[(tickets * sum(cut_layers["COUNTS"]), splits)](
        dy,
        x,
        hidden,
        deltas,
        mask,
        rows,
        samples,
        stretch,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        _stride(mask),
        rows.stride(0),
        **geometry.constexprs,
        **cut_layers,
        HIDDEN=geometry.hidden,
        PRECISION=precision,
        **launch.options,
    )


def _add(rows: Tensor, dweight: Tensor, geometry: Geometry, splits: int) -> None:
    tickets, size = dweight.shape
    split_gpu.add_kernel[(tickets, triton.cdiv(size, split_gpu.ADD_BLOCK))](
        rows,
        dweight,
        splits,
        size,
        dweight.stride(0),
        SIZES=geometry.sizes,
        WEIGHTS=geometry.weights,
        BIASES=geometry.biases,
        BLOCK=split_gpu.ADD_BLOCK,
    )


def cut(samples: int, stretch: int) -> tuple[int, int]:
    """How many stretches the samples make, and the length of all but the last: whole tiles."""
    splits = min(triton.cdiv(samples, stretch), MOST_STRETCHES)
    length = triton.cdiv(triton.cdiv(samples, splits), STRETCH_UNIT) * STRETCH_UNIT
    return triton.cdiv(samples, length), length


def cut_as_measured(x: Tensor, geometry: Geometry, stretch: int) -> tuple[int, int]:
    """`cut` of the samples of ``x [P, B, I]``, by ``stretch`` or what was measured to be better."""
    samples = triton.next_power_of_2(x.shape[1])
    among = _stretches(samples, stretch)
    chosen = prefer(
        among[0],
        "mlp.stretch",
        x.device,
        among=among,
        layers=geometry.label,
        packed=geometry.tiles is not None,
        built_in=f"{stretch}",
        samples=samples,
    )
    return cut(x.shape[1], chosen.samples)


@cache
def _stretches(samples: int, default: int) -> tuple[Stretch, ...]:
    """The default, and its neighbours that cut the samples otherwise."""
    found: dict[object, Stretch] = {}
    for stretch in (default, default // 2, default * 2, default // 4, default * 4):
        if stretch >= STRETCH_UNIT:
            found.setdefault(cut(samples, stretch), Stretch(stretch))
    return tuple(found.values())


def prefer_launch(
    launches: Sequence[Launch], kernel: str, x: Tensor, geometry: Geometry, kind: str
) -> Launch:
    """The first of these, or what was measured on this device for such a network.

    Args:
        launches: what the kernel can be launched with.
        kernel: its name in `kernels.tuning`.
        x: ``[P, B, ...]``, whose device and B count.
        geometry: of the network.
        kind: the activation, or the precision, where the launch may depend on it.
    """
    if len(launches) == 1:
        return launches[0]
    return prefer(
        launches[0],
        f"mlp.{kernel}",
        x.device,
        among=launches,
        layers=geometry.label,
        kind=kind,
        masked=any(geometry.masked),
        samples=x.shape[1],
    )


def _places(net: Net, hidden: Tensor) -> list[Tensor]:
    """Views ``[P, B, size]`` of the hidden layers."""
    return list(hidden.split(list(net.sizes[1:-1]), dim=2)) if net.depth > 1 else []


def _masked(weight: Tensor, mask: Tensor | None, net: Net, layer: int) -> Tensor:
    """A layer's weight ``[P, out, in]``, zero off the mask, as the linear layer's products ask."""
    matrix = net.weight(weight, layer)
    if mask is None or net.weights[layer] >= mask.shape[1]:
        return matrix
    return torch.where(net.weight(mask, layer) != 0, matrix, 0)


def _geometry(net: Net, mask: Tensor | None) -> Geometry:
    return Geometry.of(net, 0 if mask is None else mask.shape[1])


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with contiguous rows: the kernels stride all else."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else with_rows(mask).view(torch.uint8)


def _stride(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)
