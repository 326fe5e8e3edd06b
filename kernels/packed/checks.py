"""What the packed ops refuse, whoever calls them: kernels read memory by these shapes.

A pattern's bits and counts must agree as well. To see that, one has to wait for a GPU: there it is
left to whoever holds the pattern; plain torch looks (`check_sound`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_device, check_dtype, check_integer, check_shape
from ..linear import PRECISIONS
from .layout import PackedLayer, lay_out

__all__ = [
    "DTYPES",
    "check_batch",
    "check_dense",
    "check_precision",
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
        check_dtype(name, tensor, torch.int32)
        check_shape(name, tensor, (tickets, length))
    check_device("start", start, bits)
    return layers


def find_layer(layers: tuple[PackedLayer, ...], layer: int) -> PackedLayer:
    """The layer of an index that may be out of range."""
    return layers[check_integer("layer", layer, 0, len(layers))]


def check_precision(precision: str) -> None:
    """One of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_values(name: str, values: Tensor, bits: Tensor, width: int | None = None) -> None:
    """``[P, width]``, or of any width."""
    if values.dim() != 2 or (width is not None and values.shape[1] != width):
        length = "k" if width is None else width
        raise ValueError(f"{name} must have shape ({len(bits)}, {length}), got {_shape(values)}")
    check_shape(name, values, (len(bits), values.shape[1]))
    check_dtype(name, values, *DTYPES)
    check_device(name, values, bits)


def check_dense(dense: Tensor, bits: Tensor, size: int) -> None:
    """``[P, size or more]``."""
    if dense.dim() != 2 or len(dense) != len(bits) or dense.shape[1] < size:
        raise ValueError(
            f"dense must have shape ({len(bits)}, {size} or more), got {_shape(dense)}"
        )
    check_dtype("dense", dense, *DTYPES)
    check_device("dense", dense, bits)


def check_batch(name: str, tensor: Tensor, values: Tensor, features: int) -> None:
    """``[P, B, features]`` of the values' dtype, where they live."""
    if tensor.dim() != 3 or (len(tensor), tensor.shape[2]) != (len(values), features):
        raise ValueError(
            f"{name} must have shape ({len(values)}, B, {features}), got {_shape(tensor)}"
        )
    check_dtype(name, tensor, values.dtype)
    check_device(name, tensor, values)


def check_squares(squares: Tensor, start: Tensor) -> None:
    """A sum of squares for every tile."""
    check_shape("squares", squares, (len(start), start.shape[1] - 1))
    check_dtype("squares", squares, torch.float32, torch.float64)
    check_device("squares", squares, start)


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


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
