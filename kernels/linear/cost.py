"""What the products of a linear layer must compute and move, by the layout of the weight.

``forward``, ``dx`` and ``dw`` are dense with a mask, the ``blocked_`` and ``csr_`` ones walk kept
weights alone. Every product reads its two factors and writes its result once; the gradient of the
weight is written dense in every layout, zeros included. Kept weights are counted for one ticket;
give the mean where tickets differ.
"""

from __future__ import annotations

from ..cost import Cost

__all__ = [
    "blocked_dw",
    "blocked_dx",
    "blocked_forward",
    "csr_dw",
    "csr_dx",
    "csr_forward",
    "db",
    "dw",
    "dx",
    "forward",
]

_INDEX = 4
"""Bytes of a column, of a block's index and of a count of blocks."""

_POINTER = 8
"""Bytes of where a compressed row begins."""


def forward(
    tickets: int, batch: int, out: int, inp: int, *, bias: bool = True, itemsize: int = 4
) -> Cost:
    """``y = x wᵀ + b``, every weight multiplied, zero or not; the mask is not read.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        out: O.
        inp: I.
        bias: whether there is one.
        itemsize: bytes of a number.
    """
    return _forward(tickets, batch, out, inp, out * inp, 0, bias, itemsize)


def dx(tickets: int, batch: int, out: int, inp: int, *, itemsize: int = 4) -> Cost:
    """``dx = dy w``, every weight multiplied; arguments as for `forward`."""
    return _dx(tickets, batch, out, inp, out * inp, 0, itemsize)


def dw(
    tickets: int, batch: int, out: int, inp: int, *, masked: bool = True, itemsize: int = 4
) -> Cost:
    """``dw = mask ∘ dyᵀ x``: the whole product, and a byte of mask for each of its entries.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        out: O.
        inp: I.
        masked: whether there is a mask.
        itemsize: bytes of a number.
    """
    mask = out * inp if masked else 0
    return _dw(tickets, batch, out, inp, out * inp, mask, itemsize)


def db(tickets: int, batch: int, out: int, *, itemsize: int = 4) -> Cost:
    """``db``, the sum of dy over the batch; arguments as for `forward`."""
    return Cost(tickets * batch * out, tickets * (batch + 1) * out * itemsize)


def blocked_forward(
    tickets: int,
    batch: int,
    out: int,
    inp: int,
    blocks: float,
    block: int,
    *,
    bias: bool = True,
    itemsize: int = 4,
) -> Cost:
    """``y = x wᵀ + b`` over the kept blocks; of each, its index is read beside its weights.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        out: O.
        inp: I.
        blocks: kept blocks of a ticket.
        block: their size.
        bias: whether there is one.
        itemsize: bytes of a number.
    """
    lists = _INDEX * (blocks + out // block)
    return _forward(tickets, batch, out, inp, blocks * block**2, lists, bias, itemsize)


def blocked_dx(
    tickets: int, batch: int, out: int, inp: int, blocks: float, block: int, *, itemsize: int = 4
) -> Cost:
    """``dx = dy w`` over the kept blocks; arguments as for `blocked_forward`."""
    lists = _INDEX * (blocks + inp // block)
    return _dx(tickets, batch, out, inp, blocks * block**2, lists, itemsize)


def blocked_dw(
    tickets: int, batch: int, out: int, inp: int, blocks: float, block: int, *, itemsize: int = 4
) -> Cost:
    """``dw`` on the kept blocks, zeros elsewhere; arguments as for `blocked_forward`.

    Where the zeros lie is read too: the lists name the pruned blocks after the kept ones.
    """
    lists = _INDEX * (out // block) * (1 + inp // block)
    return _dw(tickets, batch, out, inp, blocks * block**2, lists, itemsize)


def csr_forward(
    tickets: int, batch: int, out: int, inp: int, kept: float, *, bias: bool = True
) -> Cost:
    """``y = x wᵀ + b`` over compressed rows in float32: of each kept weight its value and column.

    Args:
        tickets: P.
        batch: B, rows per ticket.
        out: O.
        inp: I.
        kept: weights of a ticket.
        bias: whether there is one.
    """
    return _forward(tickets, batch, out, inp, kept, _compressed(out, kept), bias, 4)


def csr_dx(tickets: int, batch: int, out: int, inp: int, kept: float) -> Cost:
    """``dx = dy w`` over compressed columns; arguments as for `csr_forward`."""
    return _dx(tickets, batch, out, inp, kept, _compressed(inp, kept), 4)


def csr_dw(tickets: int, batch: int, out: int, inp: int, kept: float) -> Cost:
    """``dw`` on the kept weights, zeros elsewhere; arguments as for `csr_forward`."""
    return _dw(tickets, batch, out, inp, kept, _compressed(out, kept), 4)


def _compressed(rows: int, kept: float) -> float:
    return _INDEX * kept + _POINTER * (rows + 1)


def _forward(
    tickets: int,
    batch: int,
    out: int,
    inp: int,
    kept: float,
    structure: float,
    bias: bool,
    itemsize: int,
) -> Cost:
    """``kept`` weights of a ticket are multiplied and ``structure`` bytes say which they are."""
    added = batch * out if bias else 0
    moved = itemsize * (batch * (inp + out) + kept + (out if bias else 0)) + structure
    return Cost(tickets * (2 * kept * batch + added), tickets * moved)


def _dx(
    tickets: int, batch: int, out: int, inp: int, kept: float, structure: float, itemsize: int
) -> Cost:
    moved = itemsize * (batch * (inp + out) + kept) + structure
    return Cost(tickets * 2 * kept * batch, tickets * moved)


def _dw(
    tickets: int, batch: int, out: int, inp: int, kept: float, structure: float, itemsize: int
) -> Cost:
    moved = itemsize * (batch * (inp + out) + out * inp) + structure
    return Cost(tickets * 2 * kept * batch, tickets * moved)
