"""What the Triton kernels know of a network when they are compiled: its sizes and its offsets.

Of weights in a row of the arena, or of packed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ..arena import Arena, Net
from ..packed import Layer

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """A network in a row of the arena, all of it constants of a kernel.

    Attributes:
        sizes: features from input to output.
        weights: offset of each weight matrix; if packed, of the octets of its bits.
        biases: offset of each bias vector; if packed, in what follows the prunable weights.
        masked: whether a mask covers each weight matrix.
        tiles: if packed, the first tile of each weight matrix; else None.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    masked: tuple[bool, ...]
    tiles: tuple[int, ...] | None = None

    @staticmethod
    def of(net: Net, prunable: int) -> Geometry:
        """Of a network whose mask covers the first ``prunable`` entries of a row."""
        masked = tuple(begin < prunable for begin in net.weights)
        return Geometry(net.sizes, net.weights, net.biases, masked)

    @staticmethod
    def of_sizes(sizes: tuple[int, ...], *, masked: bool) -> Geometry:
        """Of the only network of an arena, for `COMPILE_CASES`."""
        arena = Arena.build(sizes)
        return Geometry.of(arena.actor, arena.prunable if masked else 0)

    @staticmethod
    def of_packed(net: Net, layers: tuple[Layer, ...], prunable: int) -> Geometry:
        """Of a network whose weights are these layers of a pattern over ``prunable`` entries."""
        return Geometry(
            net.sizes,
            tuple(4 * layer.first_word for layer in layers),
            tuple(begin - prunable for begin in net.biases),
            (True,) * net.depth,
            tuple(layer.first_tile for layer in layers),
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Each size as a tile takes it: a power of two that a dot accepts."""
        return tuple(max(16, 1 << (size - 1).bit_length()) for size in self.sizes)

    @property
    def expanded(self) -> tuple[int, ...]:
        """Offset of each weight matrix where they follow each other, and how many weights."""
        return 0, *accumulate(inp * out for inp, out in pairwise(self.sizes))

    @property
    def label(self) -> str:
        """`blocks` as `kernels.tuning` names them."""
        return "x".join(map(str, self.blocks))

    @property
    def hidden(self) -> int:
        """Activations of a sample, input and output not counted."""
        return sum(self.sizes[1:-1])

    @property
    def constexprs(self) -> dict[str, Any]:
        """As the kernels name it."""
        return {
            "SIZES": self.sizes,
            "WEIGHTS": self.weights,
            "BIASES": self.biases,
            "MASKED": self.masked,
            "TILES": self.tiles,
        }
