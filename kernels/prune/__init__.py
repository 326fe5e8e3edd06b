"""Pruning of a population: keep exactly k entries of every ticket, those with the largest scores.

A threshold would prune the wrong number where scores tie. Here ties are broken by position, so
that the density of a level is exact and the same scores give the same mask on every backend.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_data, check_tensor
from ..registration import declare

__all__ = ["prune"]

Criterion = Literal["score", "magnitude"]


def prune(
    scores: Tensor,
    mask: Tensor,
    k: Tensor | int,
    *,
    criterion: Criterion = "score",
    check: bool = True,
) -> Tensor:
    """Keep the ``min(k, mask.sum())`` largest scores inside every ticket's mask.

    Equal scores (``-0.0`` equals ``0.0``) keep the lowest position; a pruned entry never returns,
    whatever its score. Infinite scores are ordered like any other.

    Args:
        scores: ``[P, N]`` float32 or float64; ignored off the mask, where NaN is allowed.
        mask: ``[P, N]`` bool, the entries that may be kept.
        k: ``[P]`` int64, or one integer for all, each in [0, N].
        criterion: ``score``, or ``magnitude`` to rank by ``|scores|`` without a pass to compute it:
            `scores` are then the weights, for instance the view ``weight[:, :N]`` of an arena.
        check: look at the values of `scores` and `k`. On a GPU this waits for the device; with
            False nothing waits, and the caller vouches for the values.

    Returns:
        ``[P, N]`` bool, a new mask.

    Raises:
        ValueError: a shape, a device, `criterion` or `k` out of range, or a NaN score inside the
            mask.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    k, magnitude = _checked(scores, mask, k, criterion, check)
    return torch.ops.sparse_tickets.prune(scores.detach(), mask, k, magnitude)


def _checked(
    scores: Tensor, mask: Tensor, k: Tensor | int, criterion: str, check: bool
) -> tuple[Tensor, bool]:
    """Counts as a tensor, and whether scores are ranked by magnitude."""
    _check_scores(scores, mask)
    if criterion not in ("score", "magnitude"):
        raise ValueError(f"criterion must be 'score' or 'magnitude', got {criterion!r}")
    tickets, prunable = scores.shape
    if isinstance(k, Tensor):
        check_tensor("k", k, (tickets,), torch.int64, like=scores)
        if check:
            _check_counts(k, prunable)
    else:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int or an int64 tensor, got {type(k).__name__}")
        if not 0 <= k <= prunable:
            raise ValueError(f"k must be in [0, {prunable}], got {k}")
        k = torch.full((tickets,), k, dtype=torch.int64, device=scores.device)
    if check:
        check_data("scores", scores)
        _check_no_nan(scores, mask)
    return k, criterion == "magnitude"


def _check_counts(k: Tensor, prunable: int) -> None:
    wrong = ((k < 0) | (k > prunable)).nonzero()
    if len(wrong):
        ticket = int(wrong[0])
        raise ValueError(f"k must be in [0, {prunable}], got {int(k[ticket])} for ticket {ticket}")


def _check_no_nan(scores: Tensor, mask: Tensor) -> None:
    wrong = (scores.isnan() & mask).nonzero()
    if len(wrong):
        ticket, entry = wrong[0].tolist()
        raise ValueError(
            f"scores must not be NaN inside the mask, got NaN for ticket {ticket} at entry {entry}"
        )


def _check_scores(scores: Tensor, mask: Tensor) -> None:
    check_tensor("scores", scores, ("P", "N"), torch.float32, torch.float64, like=scores)
    check_tensor("mask", mask, scores.shape, torch.bool, like=scores)


def _check_op(scores: Tensor, mask: Tensor, k: Tensor) -> None:
    """Whoever calls the op by its name has passed no other check; kernels read memory by shapes."""
    _check_scores(scores, mask)
    check_tensor("k", k, (len(scores),), torch.int64, like=scores)


def _prune(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool) -> Tensor:
    _check_op(scores, mask, k)
    kernels = implementation(__name__, scores.device)
    return kernels.prune(scores, mask.contiguous(), k.contiguous(), magnitude)


def _prune_fake(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool) -> Tensor:
    _check_op(scores, mask, k)
    return torch.empty_like(mask, memory_format=torch.contiguous_format)


declare("prune", _prune, _prune_fake)
