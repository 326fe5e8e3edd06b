"""What a network's passes must compute and move on a GPU, by the route that `gpu.choose` takes.

Weights and their mask count once per ticket, activations and deltas only where a route writes them
to memory. ``masked`` weights cost a byte of mask each; packed ones count alone, with their bits.
Numbers are float32.
"""

from __future__ import annotations

from itertools import pairwise

from ..cost import Cost
from ..packed.cost import pattern_bytes

__all__ = [
    "forward",
    "fused_backward",
    "packed_backward",
    "packed_forward",
    "packed_split_backward",
    "split_backward",
]

_ITEM = 4
"""Bytes of a float32."""


def forward(
    tickets: int, batch: int, sizes: tuple[int, ...], *, masked: bool = True, keep: bool = False
) -> Cost:
    """All layers: products, biases and activations.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        sizes: features from input to output.
        masked: whether a mask covers the weights.
        keep: whether the hidden activations are written.
    """
    weights, biases, hidden = _count(sizes)
    flops = batch * (2 * weights + biases + hidden)
    items = batch * (sizes[0] + sizes[-1] + hidden * keep) + weights + biases
    return _cost(tickets, flops, items, weights * masked)


def fused_backward(
    tickets: int, batch: int, sizes: tuple[int, ...], *, masked: bool = True
) -> Cost:
    """Gradients of the weights, the hidden layers recomputed; arguments as for `forward`.

    The weight is read, the gradient written; the mask counts once for both.
    """
    weights, biases, hidden = _count(sizes)
    recomputed = 2 * (weights - sizes[-2] * sizes[-1]) + 2 * hidden
    flops = batch * (recomputed + _deltas(sizes, to_input=False) + 2 * weights + biases)
    items = batch * (sizes[0] + sizes[-1]) + 2 * (weights + biases)
    return _cost(tickets, flops, items, weights * masked)


def split_backward(
    tickets: int,
    batch: int,
    sizes: tuple[int, ...],
    *,
    masked: bool = True,
    to_input: bool = False,
) -> Cost:
    """The same from kept activations: deltas written, then read with the activations again.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        sizes: features from input to output.
        masked: whether a mask covers the weights.
        to_input: whether the gradient of the input is computed, too.
    """
    weights, biases, hidden = _count(sizes)
    flops = batch * (_deltas(sizes, to_input=to_input) + 2 * weights + biases)
    # Deltas: dy and activations in, deltas out. Gradients: dy, deltas, x and activations in.
    first = 0 if to_input else sizes[0] * sizes[1]
    moved = 2 * sizes[-1] + 4 * hidden + sizes[0] * (1 + to_input)
    items = batch * moved + (weights - first) + weights + biases
    return _cost(tickets, flops, items, (2 * weights - first) * masked)


def packed_forward(
    tickets: int,
    batch: int,
    sizes: tuple[int, ...],
    nonzeros: tuple[int, ...],
    *,
    keep: bool = False,
) -> Cost:
    """All layers by packed weights; FLOPs of the nonzeros alone, though whole tiles are multiplied.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        sizes: features from input to output.
        nonzeros: of one ticket's layers.
        keep: whether the hidden activations are written.
    """
    _, biases, hidden = _count(sizes)
    flops = batch * (2 * sum(nonzeros) + biases + hidden)
    items = batch * (sizes[0] + sizes[-1] + hidden * keep) + sum(nonzeros) + biases
    return _packed_cost(tickets, flops, items, sizes)


def packed_backward(
    tickets: int, batch: int, sizes: tuple[int, ...], nonzeros: tuple[int, ...]
) -> Cost:
    """Gradients of the packed weights, the hidden layers recomputed; see `packed_forward`.

    Values are read, their gradient written; the pattern counts once for both. The matrices that a
    program lays out in scratch stay in L2 and are not counted.
    """
    _, biases, hidden = _count(sizes)
    weights = sum(nonzeros)
    recomputed = 2 * (weights - nonzeros[-1]) + 2 * hidden
    deltas = 2 * (weights - nonzeros[0]) + 3 * hidden
    flops = batch * (recomputed + deltas + 2 * weights + biases)
    items = batch * (sizes[0] + sizes[-1]) + 2 * (weights + biases)
    return _packed_cost(tickets, flops, items, sizes)


def packed_split_backward(
    tickets: int,
    batch: int,
    sizes: tuple[int, ...],
    nonzeros: tuple[int, ...],
    *,
    to_input: bool = False,
) -> Cost:
    """The same from kept activations, as `split_backward`; the pattern is read by both passes.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        sizes: features from input to output.
        nonzeros: of one ticket's layers.
        to_input: whether the gradient of the input is computed, too.
    """
    _, biases, hidden = _count(sizes)
    weights = sum(nonzeros)
    multiplied = weights if to_input else weights - nonzeros[0]
    flops = batch * (2 * multiplied + 3 * hidden + 2 * weights + biases)
    moved = 2 * sizes[-1] + 4 * hidden + sizes[0] * (1 + to_input)
    items = batch * moved + multiplied + weights + biases
    gradients = _packed_cost(tickets, flops, items, sizes)
    deltas = _pattern_bytes(tickets, sizes if to_input else sizes[1:])
    return Cost(gradients.flops, gradients.bytes + deltas)


def _packed_cost(tickets: int, flops: int, items: int, sizes: tuple[int, ...]) -> Cost:
    cost = _cost(tickets, flops, items, 0)
    return Cost(cost.flops, cost.bytes + _pattern_bytes(tickets, sizes))


def _pattern_bytes(tickets: int, sizes: tuple[int, ...]) -> float:
    return sum(pattern_bytes(tickets, out, inp) for inp, out in pairwise(sizes))


def _count(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Weights, biases and hidden units."""
    return sum(inp * out for inp, out in pairwise(sizes)), sum(sizes[1:]), sum(sizes[1:-1])


def _deltas(sizes: tuple[int, ...], *, to_input: bool) -> int:
    """FLOPs a sample: products down to the first hidden layer or the input, and derivatives.

    A derivative takes three: ``delta (1 - y y)``.
    """
    weights, _, hidden = _count(sizes)
    return 2 * (weights - (0 if to_input else sizes[0] * sizes[1])) + 3 * hidden


def _cost(tickets: int, flops: int, items: int, octets: int) -> Cost:
    return Cost(float(tickets * flops), float(tickets * (_ITEM * items + octets)))
