"""Pruning of a population: keep exactly k entries of every ticket, those with the largest scores.

A threshold would prune the wrong number where scores tie. Here ties are broken by position, so
that the density of a level is exact and the same scores give the same mask on every backend.
`prune_rewind_` goes from one level to the next: it prunes in place, and sets weights and moments
to the rewind point on the new mask. On a GPU long rows are rewound in the pass that writes their
mask; elsewhere, and where rows are short, it is `prune` followed by `rewind_`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import resolve_backend
from ..errors import check_data, check_device, check_dtype, check_shape, check_untransformed
from ..memory import mark_written
from ..update import rewind_
from ..update.checks import check_like, check_rewind_separate, check_rows
from . import cpu, reference

__all__ = ["prune", "prune_rewind_"]

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


def prune_rewind_(
    scores: Tensor,
    mask: Tensor,
    k: Tensor | int,
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    initial_m: Tensor | None = None,
    initial_v: Tensor | None = None,
    criterion: Criterion = "score",
    check: bool = True,
) -> None:
    """``mask = prune(scores, mask, k)``, then ``rewind_`` to ``initial`` on the new mask, in place.

    Args:
        scores: ``[P, N]`` as in `prune`; may be ``weight[:, :N]`` itself.
        mask: ``[P, N]`` bool, contiguous; overwritten.
        k: as in `prune`.
        weight: ``[P, T]`` float32 or float64, T >= N, contiguous; overwritten.
        initial: ``[P, T]`` weights to return to.
        m: ``[P, T]`` first moment, overwritten with `initial_m` on the mask, or with zeros.
        v: ``[P, T]`` second moment, likewise with `initial_v`.
        initial_m: ``[P, T]`` first moment at the rewind point, or None.
        initial_v: ``[P, T]`` second moment at the rewind point, or None.
        criterion: as in `prune`.
        check: as in `prune`.

    Raises:
        ValueError: as `prune`; or a tensor that is written is not contiguous or shares memory with
            another.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    k, magnitude = _checked(scores, mask, k, criterion, check)
    if not mask.is_contiguous():
        raise ValueError(f"mask must be contiguous, got strides {mask.stride()}")
    check_rows(mask, weight=weight, m=m, v=v)
    for name, given in (("initial", initial), ("initial_m", initial_m), ("initial_v", initial_v)):
        if given is not None:
            check_like(name, given, weight)
    check_untransformed("prune_rewind_", scores, weight, initial, m, v, initial_m, initial_v)
    torch.ops.sparse_tickets.prune_rewind_(
        scores.detach(),
        mask,
        k,
        weight.detach(),
        initial.detach(),
        m.detach(),
        v.detach(),
        None if initial_m is None else initial_m.detach(),
        None if initial_v is None else initial_v.detach(),
        magnitude,
    )


def _checked(
    scores: Tensor, mask: Tensor, k: Tensor | int, criterion: str, check: bool
) -> tuple[Tensor, bool]:
    """Counts as a tensor, and whether scores are ranked by magnitude."""
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape [P, N], got {tuple(scores.shape)}")
    check_dtype("scores", scores, torch.float32, torch.float64)
    check_shape("mask", mask, tuple(scores.shape))
    check_dtype("mask", mask, torch.bool)
    check_device("mask", mask, scores)
    if criterion not in ("score", "magnitude"):
        raise ValueError(f"criterion must be 'score' or 'magnitude', got {criterion!r}")
    tickets, prunable = scores.shape
    if isinstance(k, Tensor):
        check_shape("k", k, (tickets,))
        check_dtype("k", k, torch.int64)
        check_device("k", k, scores)
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


def _prune_impl(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool) -> Tensor:
    backend = resolve_backend(scores.device)
    mask, k = mask.contiguous(), k.contiguous()
    if backend == "triton":
        from . import gpu

        return gpu.prune(scores, mask, k, magnitude)
    return (cpu if backend == "cpu" else reference).prune(scores, mask, k, magnitude)


def _prune_rewind_impl(
    scores: Tensor,
    mask: Tensor,
    k: Tensor,
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
    magnitude: bool,
) -> None:
    initial = initial.contiguous()
    initial_m = None if initial_m is None else initial_m.contiguous()
    initial_v = None if initial_v is None else initial_v.contiguous()
    k = k.contiguous()
    check_rewind_separate(
        weight, initial, m, v, initial_m, initial_v, written={"mask": mask}, read={"k": k}
    )
    if resolve_backend(weight.device) == "triton":
        from . import gpu

        if not _is_prefix(scores, weight) and _share_storage(scores, mask, weight, m, v):
            scores = scores.clone()
        point = gpu.Point(weight, initial, m, v, initial_m, initial_v)
        gpu.prune_rewind_(scores, mask, k, point, magnitude)
    else:
        mask.copy_(_prune_impl(scores, mask, k, magnitude))
        rewind_(weight, initial, m, v, mask, initial_m=initial_m, initial_v=initial_v)
    mark_written(mask, weight, m, v)


def _is_prefix(scores: Tensor, weight: Tensor) -> bool:
    """Whether scores are columns of weight: an entry is then read before its place is written."""
    return scores.data_ptr() == weight.data_ptr() and scores.stride() == weight.stride()


def _share_storage(scores: Tensor, *targets: Tensor) -> bool:
    storage = scores.untyped_storage().data_ptr()
    return any(target.untyped_storage().data_ptr() == storage for target in targets)


_library = torch.library.Library("sparse_tickets", "FRAGMENT")
_library.define("prune(Tensor scores, Tensor mask, Tensor k, bool magnitude) -> Tensor")
_library.define(
    "prune_rewind_(Tensor scores, Tensor(a!) mask, Tensor k, Tensor(b!) weight, Tensor initial, "
    "Tensor(c!) m, Tensor(d!) v, Tensor? initial_m, Tensor? initial_v, bool magnitude) -> ()"
)
for _key in ("CPU", "CUDA"):
    _library.impl("prune", _prune_impl, _key)
    _library.impl("prune_rewind_", _prune_rewind_impl, _key)


@torch.library.register_fake("sparse_tickets::prune", lib=_library)
def _prune_fake(scores, mask, k, magnitude):
    return torch.empty_like(mask, memory_format=torch.contiguous_format)


@torch.library.register_fake("sparse_tickets::prune_rewind_", lib=_library)
def _prune_rewind_fake(scores, mask, k, weight, initial, m, v, initial_m, initial_v, magnitude):
    return None
