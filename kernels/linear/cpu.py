"""The linear layer on the CPU: each ticket by what its own mask leaves.

Where much is pruned a ticket runs as a network of one layer (`policy.Network`), which reads the
weight on the mask alone; where that gains nothing, torch's own product does. A ticket's format does
not depend on its batch-mates, and so neither do its results.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..dispatch import Plan
from ..policy import Layer, Network
from ..policy.layout import DENSE_FROM
from . import reference
from .known import KnownMasks, take_snapshot
from .masking import is_equal

_LEAST_WORK = 1 << 22
"""Multiply-adds of a ticket below which the Python around it costs what a sparse product saves."""


class _Networks(NamedTuple):
    """What the tickets of a population run as.

    Attributes:
        snapshot: ``[P, O, I]`` bool, the masks of which they were made; never written.
        tickets: of each ticket its network, None where torch's product is faster.
    """

    snapshot: Tensor
    tickets: tuple[Network | None, ...]


_known: KnownMasks[_Networks] = KnownMasks()


def plan(out: int, inp: int, batch: int, density: float, dtype: torch.dtype) -> Plan:
    """What runs for a ticket of this shape and density.

    Args:
        out: O.
        inp: I.
        batch: B.
        density: share of nonzeros.
        dtype: of the weight.
    """
    if dtype != torch.float32:
        return Plan("linear", "cpu", "dense+mask", "torch's product: sparse formats are float32")
    if _pays(out, inp, batch) and _is_sparse(density):
        return Plan("linear", "cpu", "csr", f"density {density:.3g} is below {DENSE_FROM}")
    reason = "torch's product: nothing else is faster for so little work or so much that is left"
    return Plan("linear", "cpu", "dense+mask", reason)


def _pays(out: int, inp: int, batch: int) -> bool:
    return batch * out * inp >= _LEAST_WORK


def _is_sparse(density: float) -> bool:
    return density < DENSE_FROM


def _find_networks(mask: Tensor, batch: int, dtype: torch.dtype) -> _Networks | None:
    """Of ``mask [P, O, I]``; None if all tickets are dense."""
    _, out, inp = mask.shape
    if dtype != torch.float32 or not mask.numel() or not batch or not _pays(out, inp, batch):
        return None
    found = None if mask.is_inference() else _known.find(mask)
    # Nobody need announce a write.
    networks = found[0] if found is not None and _are_equal(found[0].snapshot, mask) else None
    if networks is None:
        snapshot = take_snapshot(mask)
        sparse = (_is_sparse(float(each.sum()) / each.numel()) for each in snapshot)
        networks = _Networks(
            snapshot,
            tuple(
                Network([Layer(out, inp, each, None)]) if is_sparse else None
                for each, is_sparse in zip(snapshot, sparse, strict=True)
            ),
        )
        if not mask.is_inference():
            _known.keep(mask, mask._version, networks)
    return networks if any(each is not None for each in networks.tickets) else None


def _are_equal(snapshot: Tensor, mask: Tensor) -> bool:
    if mask.is_contiguous():
        return bool(is_equal(snapshot.data_ptr(), mask.data_ptr(), mask.numel()))
    return torch.equal(snapshot, mask)


def _flat(tensor: Tensor) -> Tensor:
    """As networks take it: contiguous memory that holds the values themselves."""
    return tensor.detach().resolve_neg().contiguous()


def _addresses(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Of what `policy.Network` asks for: no gradients of these are."""
    return weight.data_ptr(), 0, 0 if bias is None else bias.data_ptr(), 0


def forward(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    networks = _find_networks(mask, x.shape[1], x.dtype)
    if networks is None:
        return reference.linear(x, weight, mask, bias)
    x, weight, bias = _flat(x), _flat(weight), None if bias is None else _flat(bias)
    found = []
    for p, network in enumerate(networks.tickets):
        one, row = slice(p, p + 1), None if bias is None else bias[p]
        if network is None:
            own = None if row is None else row[None]
            found.append(reference.linear(x[one], weight[one], mask[one], own)[0])
        else:
            found.append(network.infer(x[p], x.shape[1], _addresses(weight[p], row)))
    return _stack(found)


def dx(dy: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """See `reference.linear_dx`."""
    networks = _find_networks(mask, dy.shape[1], dy.dtype)
    if networks is None:
        return reference.linear_dx(dy, weight, mask)
    found = _backward(networks, dy, None, weight, mask, (True, False, False))
    return cast(Tensor, found[0])


def dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """See `reference.linear_dw`."""
    networks = _find_networks(mask, x.shape[1], x.dtype)
    if networks is None:
        return _dense_dw(dy, x, mask)
    return cast(Tensor, _backward(networks, dy, x, None, mask, (False, True, False))[1])


def backward(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias at once."""
    networks = _find_networks(mask, x.shape[1], x.dtype)
    if networks is None:
        return reference.linear_dx(dy, weight, mask), _dense_dw(dy, x, mask), dy.sum(1)
    found = _backward(networks, dy, x, weight, mask, (True, True, True))
    return cast(tuple[Tensor, Tensor, Tensor], found)


def _backward(
    networks: _Networks,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mask: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where they are not needed.

    That of x needs no x, and that of the weight no weight.
    """
    batch, (_, out, inp) = dy.shape[1], mask.shape
    # Nothing of the weight reaches its own gradient.
    dy, weight = _flat(dy), dy.new_empty(mask.shape) if weight is None else _flat(weight)
    bias = dy.new_empty(out)
    # What a pass forward leaves behind is the packed weight and panels of its rows.
    x, rows = (dy.new_empty(1).expand(len(dy), batch, inp), 0) if x is None else (_flat(x), batch)
    found: list[list[Tensor]] = []
    for p, network in enumerate(networks.tickets):
        if network is None:
            one = slice(p, p + 1)
            found.append([])
            if needed[0]:
                found[-1].append(reference.linear_dx(dy[one], weight[one], mask[one])[0])
            if needed[1]:
                found[-1].append(_dense_dw(dy[one], x[one], mask[one])[0])
            if needed[2]:
                found[-1].append(dy[p].sum(0))
        else:
            _, saved = network.forward(x[p, :rows], _addresses(weight[p], None))
            gradients = network.backward(dy[p], x[p], (weight[p], bias), saved, needed)
            found.append([each for each in gradients if each is not None])
    stacked = iter([_stack(list(each)) for each in zip(*found, strict=True)])
    return tuple(next(stacked) if need else None for need in needed)


def _stack(tickets: list[Tensor]) -> Tensor:
    return tickets[0][None] if len(tickets) == 1 else torch.stack(tickets)


def _dense_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """`reference.linear_dw`; masked by its bits, 20 times as fast as ``masked_fill``."""
    product = torch.bmm(dy.mT, x)
    integer = torch.int32 if product.dtype == torch.float32 else torch.int64
    product.view(integer).bitwise_and_(mask.to(integer).neg_())
    return product
