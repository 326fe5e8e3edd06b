"""What products by packed weights must do at least, and packing and unpacking."""

from __future__ import annotations

from ..cost import Cost
from .layout import lay_out

__all__ = ["dw", "dx", "forward", "pack", "pattern_bytes", "unpack"]


def pattern_bytes(tickets: int, out: int, inp: int) -> float:
    """Bytes of one layer's bits and tile starts, which every pass reads once."""
    (layer,) = lay_out(out, inp)
    return 4.0 * tickets * (layer.words + layer.tiles)


def forward(tickets: int, batch: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """``y = x wᵀ + b``; FLOPs of the nonzeros alone, though a GPU multiplies whole tiles.

    Args:
        tickets: P.
        batch: B.
        out: O.
        inp: I.
        nonzeros: of one ticket's layer.
        itemsize: bytes of a number.
    """
    numbers = nonzeros + batch * (inp + out) + out
    flops = tickets * batch * (2.0 * nonzeros + out)
    return Cost(flops, itemsize * tickets * numbers + pattern_bytes(tickets, out, inp))


def dx(tickets: int, batch: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """``dx = dy w``; see `forward`."""
    numbers = nonzeros + batch * (inp + out)
    flops = 2.0 * tickets * batch * nonzeros
    return Cost(flops, itemsize * tickets * numbers + pattern_bytes(tickets, out, inp))


def dw(tickets: int, batch: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """``dyᵀ x`` on the mask, written packed; see `forward`."""
    return dx(tickets, batch, out, inp, nonzeros, itemsize)


def pack(tickets: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """Dense weights to values: only the supported entries need be read."""
    moved = 2.0 * itemsize * tickets * nonzeros
    return Cost(0.0, moved + pattern_bytes(tickets, out, inp))


def unpack(tickets: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """Values to dense weights, zeros included."""
    moved = float(itemsize) * tickets * (nonzeros + out * inp)
    return Cost(0.0, moved + pattern_bytes(tickets, out, inp))
