"""What products by packed weights must do at least."""

from __future__ import annotations

from ..cost import Cost
from .layout import lay_out

__all__ = ["dw", "dx", "forward"]


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
    return Cost(flops, itemsize * tickets * numbers + _pattern_bytes(tickets, out, inp))


def dx(tickets: int, batch: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """``dx = dy w``; see `forward`."""
    numbers = nonzeros + batch * (inp + out)
    flops = 2.0 * tickets * batch * nonzeros
    return Cost(flops, itemsize * tickets * numbers + _pattern_bytes(tickets, out, inp))


def dw(tickets: int, batch: int, out: int, inp: int, nonzeros: int, itemsize: int = 4) -> Cost:
    """``dyᵀ x`` on the mask, written packed; see `forward`."""
    return dx(tickets, batch, out, inp, nonzeros, itemsize)


def _pattern_bytes(tickets: int, out: int, inp: int) -> float:
    """One layer's bits and tile starts, which every pass reads once."""
    (layer,) = lay_out(out, inp)
    return 4.0 * tickets * (layer.words + layer.tiles)
