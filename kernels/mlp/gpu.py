"""A network of a population on a GPU: which Triton kernels run, and how over rows of the arena.

Raw functions without autograd, validation or host synchronisation: `forward`, `backward` and
`choose`, which tells how wide networks may be for which kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from ..activations import ACTIVATIONS
from ..arena import Arena, Net, Processor
from ..examples import Example, meta
from . import launches_gpu, split_gpu
from .geometry import Geometry
from .launches_gpu import Route, Weights

FUSED_WIDTH = 64
"""Widest network whose activations, and the gradients of whose weights, stay in registers."""

FUSED_DEPTH = 4
"""Most layers of a fused network: it is unrolled, and takes that long to compile."""

WIDTH = 128
"""Widest network that one program walks through; beyond it a layer alone fills a GPU."""


def choose(net: Net, precision: str, *, to_input: bool = False) -> Route:
    """The route of a network: a fixed function of its shape, the precision and what is asked.

    Args:
        net: its sizes count.
        precision: the fused kernels know ``ieee`` alone: on tensor cores they spill.
        to_input: whether the input's gradient is asked for, which the fused backward leaves out.

    Raises:
        ValueError: the kernels do not know the network's activation.
    """
    net.check_kernels(Processor.GPU)
    if max(net.sizes) > WIDTH:
        return Route("layers", "layers")
    if precision != "ieee" or not _is_narrow(net):
        return Route("walk", "split")
    in_registers = ACTIVATIONS[net.activation].by_output and not to_input
    return Route("fused", "fused" if in_registers else "split")


def _is_narrow(net: Net) -> bool:
    """Whether registers hold a sample's way through the network, and the weights' gradients."""
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
    if not ACTIVATIONS[net.activation].by_output and route.forward == "fused":
        reason += f"; the derivative of {net.activation} is read off its input"
    return reason


def forward(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None = None,
    precision: str = "ieee",
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``[P, B, I] -> [P, B, O]``; see `mlp`.

    Args:
        x: float32, as all tensors here.
        weight: ``[P, size]``, rows of an arena.
        net: where the network lies in the row.
        mask: ``[P, N]`` bool, or None.
        precision: of the products: ``ieee``, ``tf32`` or ``tf32x3``.
        keep: return what every backward pass but the fused one needs of the hidden layers.

    Returns:
        The output, and ``[P, B, net.kept]`` if ``keep``, else None.
    """
    route = choose(net, precision).forward
    # The fused pass keeps activations in registers.
    route = "walk" if keep and route == "fused" else route
    y, hidden = launches_gpu.forward(Weights.of(weight, net, mask), x, route, precision)
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
    to_weight: bool = True,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x` and of `weight`, those asked for; see `mlp`.

    Args:
        dy: ``[P, B, O]``, gradient of the output.
        x: as in `forward`.
        weight: as in `forward`.
        net: as in `forward`.
        mask: as in `forward`.
        precision: as in `forward`.
        hidden: what `forward` kept; recomputed if it is needed and None.
        to_input: whether the input's gradient is asked for.
        to_weight: whether the weight's gradient is; one of the two.
        into: ``[P, size]``, contiguous: takes the weight's gradient where `net` has parameters.

    Returns:
        ``[P, B, I]`` or None, and ``[P, size]`` or None, zero off the mask and, unless it is
        ``into``, where `net` has no parameters.
    """
    weights = Weights.of(weight, net, mask)
    tickets, samples, _ = x.shape
    route = choose(net, precision, to_input=to_input).backward
    dx = x.new_empty(x.shape) if to_input else None
    if not to_weight:
        if dx is not None and dx.numel():
            launches_gpu.backward(weights, dy, x, route, precision, hidden, dx)
        return dx, None
    alone = into is None
    if into is None:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    else:
        dweight = into
    if tickets == 0 or samples == 0:
        return dx, dweight.zero_() if alone else dweight
    splits, stretch = launches_gpu.cut_as_measured(x, weights.geometry, route)
    if splits > 1:
        rows = weight.new_empty(tickets * splits, weight.shape[1])
    else:
        rows = dweight.zero_() if alone else dweight
    stretches = splits, stretch
    launches_gpu.backward(weights, dy, x, route, precision, hidden, dx, rows, stretches)
    if splits > 1:
        _add(rows, dweight, weights.geometry, splits, alone)
    return dx, dweight


def _add(rows: Tensor, dweight: Tensor, geometry: Geometry, splits: int, clear: bool) -> None:
    tickets, size = dweight.shape
    with torch.cuda.device_of(rows):
        split_gpu.add_kernel[(tickets, triton.cdiv(size, split_gpu.ADD_BLOCK))](
            rows,
            dweight,
            splits,
            size,
            dweight.stride(0),
            SIZES=geometry.sizes,
            WEIGHTS=geometry.weights,
            BIASES=geometry.biases,
            CLEAR=clear,
            BLOCK=split_gpu.ADD_BLOCK,
        )


def _example(
    sizes: tuple[int, ...],
    activation: str,
    precision: str,
    masked: bool,
    samples: int = 31,
    beside_others: bool = False,
) -> None:
    """Forward and back; by routes through memory with the input's gradient, too."""
    arena = Arena.build(sizes, activation=activation)
    net, weight, x = arena.actor, meta(2, arena.size), meta(2, samples, sizes[0])
    mask = meta(2, arena.prunable, dtype=torch.bool) if masked else None
    to_input = choose(net, precision).backward != "fused"
    _, hidden = forward(x, weight, net, mask, precision, keep=to_input)
    dy = meta(2, samples, sizes[-1])
    into = meta(2, arena.size) if beside_others else None
    backward(dy, x, weight, net, mask, precision, hidden=hidden, to_input=to_input, into=into)


def _examples() -> Iterator[Example]:
    for sizes, activation, precision, masked in (
        ((4, 64, 64, 2), "tanh", "ieee", True),
        ((4, 64, 64, 2), "relu", "ieee", True),
        ((4, 64, 64, 1), "tanh", "ieee", False),
        ((64, 64, 64, 64), "relu", "ieee", True),
        ((61, 61, 61, 61), "tanh", "ieee", False),
        ((17, 64, 64, 64, 6), "tanh", "ieee", True),
        ((17, 61, 61, 61, 6), "relu", "ieee", True),
        ((64, 64, 64, 64, 64), "tanh", "ieee", True),
        ((64, 64, 64, 64, 64), "relu", "ieee", True),
        ((64, 64, 64, 64, 64), "tanh", "ieee", False),
        ((64, 64, 64, 64, 64), "relu", "ieee", False),
        # Rows that begin anywhere, and not all of which do: what came closest to spilling.
        ((61, 61, 64, 61, 61), "tanh", "ieee", True),
        ((61, 61, 64, 61, 61), "relu", "ieee", True),
        ((61, 61, 64, 61, 61), "tanh", "ieee", False),
        ((33, 64, 47, 64, 64), "tanh", "ieee", False),
        ((10, 32, 3), "relu", "ieee", True),
        ((64, 64, 64, 64), "elu", "ieee", True),
        ((61, 61, 64, 61, 61), "elu", "ieee", True),
        ((61, 61, 64, 61, 61), "elu", "ieee", False),
        ((61, 61, 64, 61, 61), "silu", "ieee", True),
        ((61, 61, 64, 61, 61), "gelu", "ieee", False),
        ((32, 32, 32, 32, 32), "tanh", "ieee", True),
        ((32, 32, 32, 32, 32), "relu", "ieee", True),
        # Through memory.
        ((17, 128, 128, 6), "tanh", "ieee", True),
        ((17, 128, 128, 6), "tanh", "tf32", True),
        ((17, 128, 128, 6), "tanh", "tf32x3", True),
        ((17, 64, 64, 1), "tanh", "tf32x3", False),
        ((100, 128, 64, 128, 20), "tanh", "ieee", True),
        ((17, 128, 128, 6), "elu", "ieee", True),
        ((17, 128, 128, 6), "silu", "tf32x3", True),
        ((17, 128, 128, 6), "gelu", "ieee", True),
        ((17, 256, 256, 6), "tanh", "ieee", True),
    ):
        name = f"{'_'.join(map(str, sizes))}_{activation}_{precision}{'' if masked else '_dense'}"
        # Through memory, without a mask a kernel is smaller than others of the same launch.
        tuned = max(sizes) <= WIDTH and (masked or precision == "ieee")
        run = partial(_example, sizes, activation, precision, masked)
        yield Example(name, run, tuned=tuned)
    for name, beside_others in (("stretches", False), ("stretches_beside_others", True)):
        run = partial(_example, (4, 64, 64, 2), "tanh", "ieee", True, 99, beside_others)
        yield Example(name, run)


EXAMPLES = list(_examples())
