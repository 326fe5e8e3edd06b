"""Torch's block-sparse rows: `F.linear` with a BSR weight built before the clock starts."""

from __future__ import annotations

import warnings

from torch import Tensor

from sparse_tickets.timing import Contender

from ..problems import LinearProblem
from . import Unavailable
from .torch_csr import compressed_backward, compressed_forward

NAME = "torch BSR"
_SIZES = (64, 32, 16, 8, 4)
# Where a mask fills no blocks, small ones store the fewest zeros, and were the fastest of all.
_SMALLEST = 2


def _compress(problem: LinearProblem) -> Tensor:
    if len(problem.x) != 1:
        raise Unavailable("BSR tensors in a batch have no linear: one ticket only")
    weight = problem.weight[0]
    if any(size % _SMALLEST for size in weight.shape):
        raise Unavailable(f"no block of {_SMALLEST} x {_SMALLEST} divides {tuple(weight.shape)}")
    size = next((size for size in _SIZES if _fills(problem.mask[0], size)), _SMALLEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "BSR support is in beta state"
        return weight.to_sparse_bsr((size, size))


def _fills(mask: Tensor, size: int) -> bool:
    """Whether the mask is made of whole blocks of this size."""
    if any(length % size for length in mask.shape):
        return False
    kept = mask.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))
    return bool(((kept == 0) | (kept == size * size)).all())


def linear_forward(problem: LinearProblem) -> Contender:
    """One ticket; the largest blocks that the mask fills, or 2 x 2.

    Raises:
        Unavailable: more than one ticket, or an odd size.
    """
    return compressed_forward(NAME, problem, _compress(problem))


def linear_backward(problem: LinearProblem) -> Contender:
    """The same with gradients; dW comes back dense, and is masked untimed.

    Raises:
        Unavailable: as above, or torch has no derivative here.
    """
    contender = compressed_backward(NAME, problem, _compress(problem))
    try:
        contender.run()
    except (RuntimeError, NotImplementedError) as missing:
        raise Unavailable(f"torch has no gradient here: {missing}") from missing
    return contender
