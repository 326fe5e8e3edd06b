"""The launches of a network's passes over rows of the arena: `forward` and `backward` run a route.

How the samples are cut follows from their number and the shape of the network alone, never from P
or from how many weights are left; so do the launches, measured (`kernels.tuning`) or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton
from torch import Tensor

from ..activations import ACTIVATIONS
from ..arena import Net
from ..launch import Launch
from ..linear import gpu as layer_gpu
from ..tuning import prefer
from . import fused_gpu, split_gpu
from .geometry import Geometry

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
class Route:
    """Which kernels run.

    Attributes:
        forward: ``fused`` in registers, ``walk`` through memory in one launch too, or ``layers``.
        backward: ``fused`` with the forward pass recomputed, or ``split``: deltas, then every
            layer's weight gradient in one launch; ``layers`` makes the deltas layer by layer.
    """

    forward: Literal["fused", "walk", "layers"]
    backward: Literal["fused", "split", "layers"]


@dataclass(frozen=True)
class Weights:
    """A network's parameters as the kernels take them; rows are contiguous, all else is strided.

    Attributes:
        net: where the network lies in a row.
        geometry: its constants.
        weight: ``[P, size]`` float32, rows of the arena.
        mask: ``[P, N]`` uint8, or None.
    """

    net: Net
    geometry: Geometry
    weight: Tensor
    mask: Tensor | None

    @staticmethod
    def of(weight: Tensor, net: Net, mask: Tensor | None) -> Weights:
        """Of ``weight [P, size]`` and ``mask [P, N]`` bool."""
        octets = None if mask is None else with_rows(mask).view(torch.uint8)
        geometry = Geometry.of(net, 0 if mask is None else mask.shape[1])
        return Weights(net, geometry, with_rows(weight), octets)

    def product(self, x: Tensor, layer: int, precision: str) -> Tensor:
        """``[P, B, I] -> [P, B, O]`` by one layer, bias included."""
        bias = self.net.bias(self.weight, layer)
        return layer_gpu.forward(x, self._masked(layer), bias, precision)

    def dx(self, dy: Tensor, layer: int, precision: str) -> Tensor:
        """``[P, B, O] -> [P, B, I]``, the gradient of a layer's input."""
        return layer_gpu.dx(dy, self._masked(layer), precision)

    def _masked(self, layer: int) -> Tensor:
        """A layer's weight ``[P, out, in]``, zero off the mask, as the products ask."""
        matrix = self.net.weight(self.weight, layer)
        if self.mask is None or not self.geometry.masked[layer]:
            return matrix
        return torch.where(self.net.weight(self.mask, layer) != 0, matrix, 0)

    @property
    def mask_stride(self) -> int:
        """From ticket to ticket; 0 without a mask."""
        return 0 if self.mask is None else self.mask.stride(0)


def forward(
    weights: Weights,
    x: Tensor,
    route: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """``[P, B, I] -> [P, B, O]``.

    Args:
        weights: of the network.
        x: ``[P, B, I]`` float32, as all tensors here.
        route: see `Route.forward`.
        precision: of the products.

    Returns:
        The output, and ``[P, B, net.kept]`` of the hidden layers, which the fused pass does not
        write: it has ``[P, B, 0]``.
    """
    x = with_rows(x)
    tickets, samples, _ = x.shape
    y = x.new_empty(tickets, samples, weights.net.sizes[-1])
    hidden = x.new_empty(tickets, samples, 0 if route == "fused" else weights.net.kept)
    if y.numel():
        run = {"fused": _forward_fused, "walk": _forward_walk, "layers": _forward_layers}[route]
        with torch.cuda.device_of(x):
            run(weights, x, precision, y, hidden)
    return y, hidden


def backward(
    weights: Weights,
    dy: Tensor,
    x: Tensor,
    route: str,
    precision: str,
    hidden: Tensor | None,
    dx: Tensor | None,
    target: Tensor | None = None,
    stretches: tuple[int, int] = (1, 0),
) -> None:
    """Write ``dx`` and a row of the parameters' gradients per ticket and stretch, unless None.

    Args:
        weights: of the network.
        dy: ``[P, B, O]``; P and B are not 0.
        x: ``[P, B, I]``.
        route: see `Route.backward`.
        precision: of the products.
        hidden: what `forward` kept; recomputed if it is needed and None.
        dx: ``[P, B, I]``, contiguous; the fused pass has none.
        target: contiguous rows laid out like ``weights.weight``, of which the network's entries
            are written; the fused pass has nothing else to write.
        stretches: how many there are, and the samples of all but the last; see `cut`.
    """
    dy, x = with_rows(dy), with_rows(x)
    with torch.cuda.device_of(x):
        if route == "fused" and target is not None:
            _backward_fused(weights, dy, x, target, stretches)
            return
        if hidden is None:
            walk = "walk" if route == "split" else "layers"
            _, hidden = forward(weights, x, walk, precision)
        deltas = hidden.new_empty(*hidden.shape[:2], weights.geometry.hidden)
        down = _deltas_walk if route == "split" else _deltas_layers
        down(weights, dy, precision, hidden, deltas, dx)
        if target is not None:
            _gradient(weights, dy, x, precision, hidden, deltas, target, stretches)


def _forward_fused(weights: Weights, x: Tensor, precision: str, y: Tensor, hidden: Tensor) -> None:
    tickets, samples, _ = x.shape
    geometry = weights.geometry
    launches = fused_gpu.launches(geometry.blocks)
    launch = _prefer_launch(launches, "fused_forward", x, geometry, geometry.activation)
    fused_gpu.forward_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        x,
        weights.weight,
        weights.mask,
        y,
        samples,
        x.stride(0),
        x.stride(1),
        weights.weight.stride(0),
        weights.mask_stride,
        NET=geometry.network,
        **launch.constexprs,
        **launch.options,
    )


def _forward_walk(weights: Weights, x: Tensor, precision: str, y: Tensor, hidden: Tensor) -> None:
    tickets, samples, _ = x.shape
    geometry = weights.geometry
    launch = _prefer_launch(split_gpu.WALKS, "forward", x, geometry, precision)
    split_gpu.forward_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        x,
        weights.weight,
        weights.mask,
        y,
        hidden,
        samples,
        x.stride(0),
        x.stride(1),
        weights.weight.stride(0),
        weights.mask_stride,
        **geometry.constexprs,
        HIDDEN=geometry.hidden,
        KEPT=weights.net.kept,
        ACTIVATION=weights.net.activation,
        PRECISION=precision,
        **split_gpu.walk_constants(launch, geometry, precision),
        **launch.options,
    )


def _forward_layers(weights: Weights, x: Tensor, precision: str, y: Tensor, hidden: Tensor) -> None:
    inputs, activation = x, ACTIVATIONS[weights.net.activation]
    places = _places(weights.net, hidden)
    for layer in range(weights.net.depth - 1):
        total = weights.product(inputs, layer, precision)
        inputs = activation.into(total, places[layer])
        if not activation.by_output:
            places[weights.net.depth - 1 + layer].copy_(total)
    y.copy_(weights.product(inputs, weights.net.depth - 1, precision))


def _backward_fused(
    weights: Weights,
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    stretches: tuple[int, int],
) -> None:
    tickets, samples, _ = x.shape
    splits, stretch = stretches
    geometry = weights.geometry
    launches = fused_gpu.launches(geometry.blocks)
    launch = _prefer_launch(launches, "fused_backward", x, geometry, geometry.activation)
    fused_gpu.backward_kernel[(tickets, splits)](
        dy,
        x,
        weights.weight,
        weights.mask,
        target,
        samples,
        stretch,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        weights.weight.stride(0),
        weights.mask_stride,
        target.stride(0),
        NET=geometry.network,
        **launch.constexprs,
        **launch.options,
    )


def _deltas_walk(
    weights: Weights,
    dy: Tensor,
    precision: str,
    hidden: Tensor,
    deltas: Tensor,
    dx: Tensor | None,
) -> None:
    tickets, samples, _ = dy.shape
    geometry = weights.geometry
    constants = geometry.constexprs
    del constants["BIASES"]
    launch = _prefer_launch(split_gpu.WALKS, "deltas", dy, geometry, precision)
    split_gpu.delta_kernel[(tickets * triton.cdiv(samples, launch.rows),)](
        dy,
        weights.weight,
        weights.mask,
        hidden,
        deltas,
        dx,
        samples,
        dy.stride(0),
        dy.stride(1),
        weights.weight.stride(0),
        weights.mask_stride,
        **constants,
        HIDDEN=geometry.hidden,
        KEPT=weights.net.kept,
        ACTIVATION=weights.net.activation,
        PRECISION=precision,
        **split_gpu.walk_constants(launch, geometry, precision),
        **launch.options,
    )


def _deltas_layers(
    weights: Weights,
    dy: Tensor,
    precision: str,
    hidden: Tensor,
    deltas: Tensor,
    dx: Tensor | None,
) -> None:
    net, delta, activation = weights.net, dy, ACTIVATIONS[weights.net.activation]
    known, places = _places(net, hidden), _places(net, deltas)
    for layer in range(net.depth - 1, 0, -1):
        # The last of what was kept are outputs, or sums, as the activation's derivative wants.
        below = layer - net.depth
        dy = weights.dx(delta, layer, precision)
        delta = activation.derive(dy, known[below], places[below])
    if dx is not None:
        dx.copy_(weights.dx(delta, 0, precision))


def _gradient(
    weights: Weights,
    dy: Tensor,
    x: Tensor,
    precision: str,
    hidden: Tensor,
    deltas: Tensor,
    target: Tensor,
    stretches: tuple[int, int],
) -> None:
    tickets, samples, _ = x.shape
    splits, stretch = stretches
    geometry = weights.geometry
    launch = _prefer_launch(split_gpu.GRADIENTS, "gradient", x, geometry, precision)
    cut_layers = split_gpu.gradient_constants(launch, geometry, precision)
    split_gpu.gradient_kernel[(tickets * sum(cut_layers["COUNTS"]), splits)](
        dy,
        x,
        hidden,
        deltas,
        weights.mask,
        target,
        samples,
        stretch,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        weights.mask_stride,
        target.stride(0),
        **geometry.constexprs,
        **cut_layers,
        HIDDEN=geometry.hidden,
        KEPT=weights.net.kept,
        PRECISION=precision,
        **launch.options,
    )


def cut(samples: int, stretch: int) -> tuple[int, int]:
    """How many stretches the samples make, and the length of all but the last: whole tiles."""
    splits = min(triton.cdiv(samples, stretch), MOST_STRETCHES)
    length = triton.cdiv(triton.cdiv(samples, splits), STRETCH_UNIT) * STRETCH_UNIT
    return triton.cdiv(samples, length), length


def cut_as_measured(x: Tensor, geometry: Geometry, route: str) -> tuple[int, int]:
    """`cut` of the samples of ``x [P, B, I]`` for a route's backward pass, or as was measured."""
    stretch = FUSED_STRETCH if route == "fused" else SPLIT_STRETCH
    samples = triton.next_power_of_2(x.shape[1])
    among = _stretches(samples, stretch)
    chosen = prefer(
        among[0],
        "mlp.stretch",
        x.device,
        among=among,
        layers=geometry.label,
        built_in=f"{stretch}",
        samples=samples,
    )
    return cut(x.shape[1], chosen.samples)


@cache
def _stretches(samples: int, default: int) -> tuple[Launch, ...]:
    """The default, and its neighbours that cut the samples otherwise."""
    found: dict[object, Launch] = {}
    for stretch in (default, default // 2, default * 2, default // 4, default * 4):
        if stretch >= STRETCH_UNIT:
            found.setdefault(cut(samples, stretch), Launch(samples=stretch))
    return tuple(found.values())


def _prefer_launch(
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
    """Views ``[P, B, size]`` of the hidden layers, twice if rows have two entries of each unit."""
    sizes = list(net.sizes[1:-1])
    return list(hidden.split(sizes * (hidden.shape[2] // sum(sizes)), dim=2)) if sizes else []


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with contiguous rows: the kernels stride all else."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
