"""What the packed ops refuse, whoever calls them: kernels read memory by these shapes.

A pattern's bits and counts must agree as well. To see that, one has to wait for a GPU: there it is
left to whoever holds the pattern; plain torch looks (`check_sound`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_integer, check_tensor, refuse_shape
from .layout import PackedLayer, lay_out

__all__ = [
    "DTYPES",
    "check_batch",
    "check_dense",
    "check_sound",
    "check_squares",
    "check_values",
    "check_where",
    "find_layer",
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_where(bits: Tensor, start: Tensor, shapes: list[int]) -> tuple[PackedLayer, ...]:
    """A pattern's tensors fit its layers, which are returned."""
    if not shapes or len(shapes) % 2 or min(shapes) < 1:
        raise ValueError(f"shapes must be pairs of out >= 1 and inp >= 1, got {list(shapes)}")
    layers = lay_out(*shapes)
    tiles, words = layers[-1].first_tile + layers[-1].tiles, layers[-1].first_word
    tickets = len(bits) if bits.dim() else 0
    for name, tensor, length in (
        ("bits", bits, words + layers[-1].words),
        ("start", start, tiles + 1),
    ):
        check_tensor(name, tensor, (tickets, length), torch.int32, like=bits)
    return layers


def find_layer(layers: tuple[PackedLayer, ...], layer: int) -> PackedLayer:
    """The layer of an index that may be out of range."""
    return layers[check_integer("layer", layer, 0, len(layers))]


def check_values(name: str, values: Tensor, bits: Tensor, width: int | None = None) -> None:
    """``[P, width]``, or of any width."""
    shape = (len(bits), "k" if width is None else width)
    check_tensor(name, values, shape, *DTYPES, like=bits)


def check_dense(dense: Tensor, bits: Tensor, size: int) -> None:
    """``[P, size or more]``."""
    shape = (len(bits), f"{size} or more")
    check_tensor("dense", dense, shape, *DTYPES, like=bits)
    if dense.shape[1] < size:
        refuse_shape("dense", dense, shape)


def check_batch(name: str, tensor: Tensor, values: Tensor, features: int) -> None:
    """``[P, B, features]`` of the values' dtype, where they live."""
    check_tensor(name, tensor, (len(values), "B", features), values.dtype, like=values)


def check_squares(squares: Tensor, start: Tensor) -> None:
    """A sum of squares for every tile."""
    shape = (len(start), start.shape[1] - 1)
    check_tensor("squares", squares, shape, torch.float32, torch.float64, like=start)


def check_sound(kept: Tensor, start: Tensor, layer: PackedLayer, width: int) -> None:
    """Raise ``ValueError`` where a pattern's bits and counts do not belong together.

    Args:
        kept: ``[P, tiles, entries]``, the layer's bits as integers.
        start: the pattern's.
        layer: whose.
        width: of the values.
    """
    counts = start[:, layer.first_tile : layer.first_tile + layer.tiles + 1]
    inside = bool((counts >= 0).all()) and bool((counts <= width).all())
    if not (inside and torch.equal(kept.sum(2, dtype=torch.int32), counts.diff(dim=1))):
        raise ValueError(
            "pattern must be as build_pattern made it and values as wide as its width, got bits or "
            "counts that were written since: build it anew"
        )
