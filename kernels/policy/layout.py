"""How a network is described to the kernels: the form of a network, and the call.

Both are flat int64 arrays, so that one address stands for either. Addresses within a form are in
elements of what they point to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..activations_cpu import NONE
from ..compiling import njit
from ..vector import LANES, MASK_BYTES
from .activations import Activation
from .blas import find_sgemm
from .products import NARROW_PARTIAL

# Of a form: how many layers; rows of the batch in a tile; `sgemm` or 0; the activations'
# parameters, then what each norm adds to variances; elements of all packed values; features of all
# panels of a tile; the widest layer, rounded up to registers; in how many parts threads share the
# batch; scratch that all parts read, and what each has to itself after it; and where in the latter
# the panels of a gradient lie.
(
    LAYERS, TILE, SGEMM, SLOPES, VALUES_SIZE, FEATURES, WIDEST,
    PARTS, SHARED, PRIVATE, DELTAS, FORM_FIRST,
) = range(12)  # fmt: skip

# Of each layer in a form: its shape; how it runs dense, if so, and whether anything is pruned; its
# activation; nonzeros by rows (listed by length), and where each lies in the weight; the same by
# columns, and which of the nonzeros by rows each is; one bit per weight; then where it keeps its
# values, among what is saved; its panels, in features, the last of its norm, 0 without one; where a
# part sums up the gradients of its weights and its bias, and the norm's, in its own scratch; the
# values by columns, in the shared one; and where its parameters stand in a call.
(
    OUT, INP, DENSE, MASKED, CODE,
    NONZEROS, BEGIN, ROWS, INDEX, POSITION,
    TURNED_BEGIN, TURNED_ROWS, TURNED_INDEX, TURNED_FROM,
    BITS, VALUES, X_PANEL, Y_PANEL, KEPT, NORMED, GRADIENTS, BIAS_GRADIENTS, NORM_GRADIENTS, TURNED,
    AT, FORM_LAYER,
) = range(26)  # fmt: skip

# Of a call: rows; how far the panels of two tiles are apart in what is saved, 0 where nothing is;
# threads; then addresses in bytes, at last of every parameter and its gradient, layer by layer.
(
    CALL_BATCH, CALL_STEP, CALL_THREADS, CALL_SAVED, CALL_SCRATCH,
    CALL_X, CALL_Y, CALL_DX, CALL_DY, CALL_FIRST,
) = range(10)  # fmt: skip
WEIGHT, DWEIGHT, BIAS, DBIAS, NORM_WEIGHT, DNORM_WEIGHT, NORM_BIAS, DNORM_BIAS = range(8)


_ROWS, _HALF, _MOST_PARTS = 128, 64, 8
"""Rows of the batch that a part has at least, a half of a sparse network's two, and most parts."""

DENSE_FROM = 0.42
"""Density from which `sgemm` is faster: 0.38 at batch 64, 0.47 at 2048, layers of 256 x 256."""

_NARROW, _NARROW_DENSE_FROM = 32, 0.5
"""The same of a layer with fewer inputs or outputs: 0.52 for 256 -> 24, above 0.7 for 17 -> 256."""

SPARSE, BY_SGEMM, BY_TILES = range(3)
"""How a layer runs: by compressed rows, or dense by either; a few outputs are no work for sgemm."""

_FEW_OUTPUTS = 15

_LONE_DENSE = 1 << 23
"""Multiply-adds up to which one dense layer is worth a call of its own."""

FEW = 3
"""Up to so many rows without a gradient are taken one by one."""

LONG = 1 << 22
"""Work from which a kernel gives back the GIL."""

ACT_FROM = 8
"""A few rows go nonzero by nonzero where at most one weight of so many is left."""


class Norm(NamedTuple):
    """LayerNorm over the output of a linear layer; it has a weight and a bias, either may be None.

    Attributes:
        eps: added to the variance.
    """

    eps: float


class Layer(NamedTuple):
    """One linear layer of a network and what follows it.

    Attributes:
        out: features of the output.
        inp: features of the input.
        mask: ``[out, inp]`` bool on the CPU, or None where nothing is pruned.
        activation: of the output, or None.
        norm: of the output before its activation, or None.
    """

    out: int
    inp: int
    mask: Tensor | None
    activation: Activation | None
    norm: Norm | None = None

    @property
    def parameters(self) -> int:
        """How many parameters a call gives it, with those that are None."""
        return 2 if self.norm is None else 4


@njit(cache=True)
def _compress(mask, rows, columns, row_stride, column_stride):
    """Nonzeros by rows, these listed by how many nonzeros they have.

    Returns:
        ``(begin [rows + 1] int64, row [rows] int32, column [nonzeros] int32, position [nonzeros]
        int32)``; a position counts in the flat mask.
    """
    size = np.zeros(rows, np.int64)
    for r in range(rows):
        for c in range(columns):
            size[r] += mask[r * row_stride + c * column_stride]
    order = np.argsort(size, kind="mergesort").astype(np.int32)
    begin = np.zeros(rows + 1, np.int64)
    for k in range(rows):
        begin[k + 1] = begin[k] + size[order[k]]
    column = np.empty(begin[rows], np.int32)
    position = np.empty(begin[rows], np.int32)
    for k in range(rows):
        j = begin[k]
        for c in range(columns):
            at = order[k] * row_stride + c * column_stride
            if mask[at]:
                column[j], position[j] = c, at
                j += 1
    return begin, order, column, position


@njit(cache=True)
def _invert(position, turned_position, size):
    """Of each nonzero by columns, which of those by rows it is."""
    where = np.empty(size, np.int32)
    for j in range(position.size):
        where[position[j]] = j
    result = np.empty(position.size, np.int32)
    for j in range(position.size):
        result[j] = where[turned_position[j]]
    return result


def _pack_bits(mask: np.ndarray) -> np.ndarray:
    """One bit per weight, rows padded to registers, and a word of the lanes that end a row."""
    out, inp = mask.shape
    words = -(-inp // LANES)
    lanes = np.zeros((out * words + 1, 8 * MASK_BYTES), bool)
    rows = np.zeros((out, words * LANES), bool)
    rows[:, :inp] = mask
    lanes[: out * words, :LANES] = rows.reshape(out * words, LANES)
    lanes[-1, : inp - (words - 1) * LANES] = True
    return np.packbits(lanes, axis=1, bitorder="little").reshape(-1)


class Support:
    """A layer's mask as kernels read it: made once per mask.

    Attributes:
        nonzeros: how many weights are left.
        arrays: by rows, by columns and by bits; see `FORM_LAYER`.
    """

    def __init__(self, layer: Layer) -> None:
        out, inp = layer.out, layer.inp
        if layer.mask is None:
            mask = np.ones((out, inp), bool)
        else:
            mask = layer.mask.numpy().copy()
        flat = mask.reshape(-1)
        begin, rows, column, position = _compress(flat, out, inp, inp, 1)
        turned_begin, turned_rows, turned_row, turned_position = _compress(flat, inp, out, 1, inp)
        source = _invert(position, turned_position, out * inp)
        self.nonzeros = int(begin[-1])
        self.arrays = (
            *(begin, rows, column, position),
            *(turned_begin, turned_rows, turned_row, source),
            _pack_bits(mask),
        )


# What it costs to move a feature into a panel and out of one, in multiply-adds: 9 in a layer of
# 256 x 256 of which 1% is left.
_MOVING = 8
# The same to normalise one: two passes forward, and two backward.
_NORMING = 8


class Form:
    """A network made ready for batches of one size.

    Args:
        layers: the network.
        supports: one for each layer.
        batch: rows.

    Attributes:
        layers: the network.
        out: features of the output.
        parameters: how many a call gives.
        work: multiply-adds of a row of the batch, and what moves each feature from layer to layer.
        address: of the form.
        tile: rows of a tile.
        parts: in how many parts threads may share the batch.
        record: elements of the panels of a whole tile.
        values: elements of the packed values.
        scratch: elements of scratch that forward and backward need.
        dense: of each layer, how it runs dense, or `SPARSE`.
        pays: whether it is worth it: torch's own product is faster for one large layer that runs
            dense, having no panels to fill and empty.
    """

    def __init__(self, layers: Sequence[Layer], supports: Sequence[Support], batch: int) -> None:
        self.layers, self.out = layers, layers[-1].out
        self.parameters = sum(layer.parameters for layer in layers)
        self.work = sum(support.nonzeros for support in supports)
        self.work += _MOVING * sum(layer.out for layer in layers)
        self.work += _NORMING * sum(layer.out for layer in layers if layer.norm is not None)
        self.dense = tuple(
            choose_product(layer.out, layer.inp, support.nonzeros, len(layers) == 1)
            for layer, support in zip(layers, supports, strict=True)
        )
        widths = [layers[0].inp, *(layer.out for layer in layers)]
        every = all(kind == BY_SGEMM for kind in self.dense)
        size = batch * layers[0].out * layers[0].inp
        self.pays = len(layers) > 1 or not every or size <= _LONE_DENSE
        self.parts = choose_parts(batch, every)
        self.tile = choose_tile(widths, batch, every, self.parts)
        values, features, shared = 0, widths[0], 0
        widest = _whole(max(widths))
        deltas = LANES * max(widest, NARROW_PARTIAL)
        private = deltas + 2 * widest * self.tile
        records: list[list[int]] = []
        x, place = 0, CALL_FIRST
        slopes = np.zeros(2 * len(layers), np.float32)
        for k, (layer, support, dense) in enumerate(zip(layers, supports, self.dense, strict=True)):
            size, act = layer.out * layer.inp, layer.activation
            masked = support.nonzeros < size
            y, kept, normed = features, 0, 0
            features += layer.out
            if act is not None:
                slopes[k] = act.slope
                if act.keeps:
                    kept = features
                    features += layer.out
            if layer.norm is not None:
                slopes[len(layers) + k] = layer.norm.eps
                normed = features
                features += layer.out + 1
            at = [array.ctypes.data for array in support.arrays]
            scales = (8, 4, 4, 4, 8, 4, 4, 4, MASK_BYTES)
            addresses = [a // scale for a, scale in zip(at, scales, strict=True)]
            packed = 0 if dense and not masked else size if dense else support.nonzeros
            code = NONE if act is None else act.code
            gradients = private
            # The first part writes a dense gradient where it belongs.
            private += _whole(support.nonzeros if not dense else size if self.parts > 1 else 0)
            width = _whole(layer.out)
            records.append(
                [
                    *(layer.out, layer.inp, dense, masked, code, support.nonzeros, *addresses),
                    *(values, x, y, kept, normed, gradients, private, private + width, shared),
                    place,
                ]
            )
            private += width if layer.norm is None else 3 * width
            place += 2 * layer.parameters
            values += packed
            shared += 0 if dense else _whole(support.nonzeros)
            x = y
        self.values = _whole(values)
        self.record = features * self.tile
        self.scratch = shared + self.parts * private
        self._slopes, self._supports = slopes, supports
        header = [
            len(layers), self.tile, find_sgemm(), slopes.ctypes.data // 4,
            self.values, features, widest, self.parts, shared, private, deltas,
        ]  # fmt: skip
        self._form = np.array([*header, *(v for record in records for v in record)], np.int64)
        self.address = self._form.ctypes.data


def _whole(size: int) -> int:
    """Elements of whole registers."""
    return -(-size // LANES) * LANES


def choose_parts(batch: int, dense: bool) -> int:
    """In how many parts threads share the batch: by its size alone, as sums depend on it.

    Each part sums gradients of its own, which have to be added up: at batch 256 two parts take 5 to
    8% less of a whole step than four.
    """
    parts = max(batch // _ROWS, 1)
    if not dense and batch >= 2 * _HALF:
        parts = max(parts, 2)
    return min(parts, _MOST_PARTS)


def choose_tile(widths: Sequence[int], batch: int, dense: bool, parts: int) -> int:
    """Rows of the batch in a tile: few enough for the panels to stay in cache."""
    most = 512 if dense else 64 if max(widths) > 128 else 128
    return min(max(_whole(-(-batch // parts)), LANES), most)


def choose_product(out: int, inp: int, nonzeros: int, alone: bool) -> int:
    """Whether a layer runs by compressed rows, or dense, and how.

    A layer alone is measured against torch's own product, which is faster on large batches.
    """
    narrow = min(out, inp)
    least = _NARROW_DENSE_FROM if narrow < _NARROW and not alone else DENSE_FROM
    if nonzeros <= least * out * inp:
        return SPARSE
    if out <= _FEW_OUTPUTS and inp >= LANES:
        return BY_TILES
    return BY_SGEMM if find_sgemm() and narrow >= 16 else SPARSE
