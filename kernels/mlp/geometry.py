"""What the Triton kernels know of a network when they are compiled: its sizes and its offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arena import Net


@dataclass(frozen=True)
class Geometry:
    """A network in a row of the arena, all of it constants of a kernel.

    Attributes:
        sizes: features from input to output.
        weights: offset of each weight matrix.
        biases: offset of each bias vector.
        masked: whether a mask covers each weight matrix.
        activation: between the layers.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    masked: tuple[bool, ...]
    activation: str

    @staticmethod
    def of(net: Net, prunable: int) -> Geometry:
        """Of a network whose mask covers the first ``prunable`` entries of a row."""
        masked = tuple(begin < prunable for begin in net.weights)
        return Geometry(net.sizes, net.weights, net.biases, masked, net.activation)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Each size as a tile takes it: a power of two that a dot accepts."""
        return tuple(max(16, 1 << (size - 1).bit_length()) for size in self.sizes)

    @property
    def network(self) -> tuple[Any, ...]:
        """As the fused kernels take it, under the name ``NET``."""
        return self.sizes, self.blocks, self.weights, self.biases, self.masked, self.activation

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
        }
