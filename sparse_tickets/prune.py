"""Which weights to keep: pruning criteria, exact counts per level, and masks drawn at random.

A criterion turns trained and initial weights into scores; the `prune` op keeps exactly k of them,
and `prune_and_rewind_` reaches the start of the next level. Some criteria give
masks a `Structure`: n of every m inputs, equal fan-in, square blocks. Random masks are drawn from
each ticket's own Philox stream, so a mask does not depend on which other tickets are drawn with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from .kernels.arena import Arena, Parameters
from .kernels.errors import check_dtype, check_shape
from .kernels.prune import Criterion as Ranking
from .kernels.prune import prune
from .kernels.random import Stream, permutation
from .kernels.update import rewind_
from .structure import Blocks, FanIn, NOfM, Structure

__all__ = [
    "CRITERIA",
    "erk_counts",
    "has_scores",
    "kept",
    "prune_and_rewind_",
    "prune_masks",
    "random_layer_mask",
    "random_mask",
    "register_criterion",
    "share_out",
]

Criterion = Callable[[Tensor, Tensor, Arena], Tensor]
AnyCriterion = TypeVar("AnyCriterion", Criterion, Structure)

CRITERIA: dict[str, Criterion | Structure] = {
    "1:4": NOfM(1, 4),
    "2:4": NOfM(2, 4),
    "fan-in": FanIn(),
    "block-16": Blocks(16),
    "block-32": Blocks(32),
    "block-64": Blocks(64),
}
"""Every criterion by its name; the structured ones keep the largest magnitudes they can."""


def kept(prunable: int, level: int, rate: float = 0.2) -> int:
    """Number of weights left at a level: ``floor(N * (1 - rate)**level + 0.5)``, exactly.

    Args:
        prunable: N, the number of weights at level 0.
        level: how often the ticket has been pruned.
        rate: fraction of the remaining weights pruned per level, read as the decimal it prints as
            (0.2 means 1/5), so the count does not hang on floating-point rounding.

    Raises:
        ValueError: a negative count or level, or a rate outside [0, 1].
    """
    if prunable < 0:
        raise ValueError(f"prunable must be >= 0, got {prunable}")
    if level < 0:
        raise ValueError(f"level must be >= 0, got {level}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    return math.floor(prunable * (1 - Fraction(str(rate))) ** level + Fraction(1, 2))


def register_criterion(name: str) -> Callable[[AnyCriterion], AnyCriterion]:
    """Add a pruning criterion to `CRITERIA` under a new name.

    A criterion is a pure function ``(weight [P, N], initial [P, N], arena) -> scores [P, N]``,
    float32; the largest scores stay. It must score each ticket from its own row alone. Or it is a
    `Structure`, such as ``NOfM(4, 8)``.

    Raises:
        ValueError: the name is taken.
    """

    def register(criterion: AnyCriterion) -> AnyCriterion:
        if name in CRITERIA:
            raise ValueError(f"name must be new, got {name!r}; registered: {_known()}")
        CRITERIA[name] = criterion
        return criterion

    return register


@register_criterion("magnitude")
def magnitude(weight: Tensor, initial: Tensor, arena: Arena) -> Tensor:
    """|w|, compared over all layers: the paper's criterion."""
    return weight.abs()


@register_criterion("layerwise-magnitude")
def layerwise_magnitude(weight: Tensor, initial: Tensor, arena: Arena) -> Tensor:
    """|w| ranked within its layer, as a fraction of the layer: every layer keeps the same share."""
    scores = torch.empty_like(weight)
    for offset, out, inp in arena.prunable_layers():
        size = out * inp
        layer = slice(offset, offset + size)
        order = weight[:, layer].abs().argsort(dim=1, descending=True, stable=True)
        share = 1 - (torch.arange(size, dtype=torch.float64, device=weight.device) + 0.5) / size
        scores[:, layer].scatter_(1, order, share.to(weight.dtype).expand_as(order))
    return scores


@register_criterion("movement")
def movement(weight: Tensor, initial: Tensor, arena: Arena) -> Tensor:
    """|w - w0|: how far training moved the weight (Zhou et al. 2019)."""
    return (weight - initial).abs()


@register_criterion("magnitude-increase")
def magnitude_increase(weight: Tensor, initial: Tensor, arena: Arena) -> Tensor:
    """|w| - |w0|: how much training enlarged the weight (Zhou et al. 2019)."""
    return weight.abs() - initial.abs()


def prune_masks(
    criterion: str,
    weight: Tensor,
    initial: Tensor,
    mask: Tensor,
    k: int | Tensor,
    arena: Arena,
) -> Tensor:
    """Keep exactly ``min(k, mask.sum())`` weights of each ticket: those its criterion scores best.

    Args:
        criterion: a name in `CRITERIA`.
        weight: ``[P, N]`` trained weights, zero off the mask.
        initial: ``[P, N]`` weights at the rewind point.
        mask: ``[P, N]`` bool; pruned weights are never revived.
        k: weights to keep, one number or ``[P]`` int64.
        arena: the layout.

    Returns:
        ``[P, N]`` bool; ties keep the lowest position.

    Raises:
        ValueError: an unknown criterion, a wrong shape, k out of range, a NaN score in the mask, or
            a structure that k weights of this arena, or of this mask, cannot have.
        TypeError: the mask is not bool.
    """
    scores, ranking = _scores(criterion, weight, initial, mask, k, arena)
    smaller = prune(scores, mask, k, criterion=ranking)
    _check_structure(criterion, smaller, arena)
    return smaller


def prune_and_rewind_(
    criterion: str,
    weight: Tensor,
    parameters: Parameters,
    rewind_point: Parameters,
    k: int | Tensor,
    arena: Arena,
) -> None:
    """From one level to the next: `prune_masks` and, on its mask, the rewind point.

    Args:
        criterion: as in `prune_masks`.
        weight: ``[P, N]`` trained weights, as in `prune_masks`.
        parameters: ``[P, ...]``, written: the mask is pruned further, the others are replaced.
        rewind_point: ``[P, ...]`` what weights, moments and step counts go back to; zero where
            pruned. Its own mask is not looked at.
        k: as in `prune_masks`.
        arena: the layout.

    Raises:
        ValueError: as `prune_masks`; or a rewind point of another shape.
        TypeError: a dtype.
    """
    initial = rewind_point.weight[:, : arena.prunable]
    smaller = prune_masks(criterion, weight, initial, parameters.mask, k, arena)
    rewind_(
        parameters.weight,
        rewind_point.weight,
        parameters.m,
        parameters.v,
        smaller,
        initial_m=rewind_point.m,
        initial_v=rewind_point.v,
    )
    parameters.mask.copy_(smaller)
    parameters.step.copy_(rewind_point.step)


def has_scores(
    criterion: str, weight: Tensor, initial: Tensor, mask: Tensor, k: int, arena: Arena
) -> Tensor:
    """Whether a criterion ranks each ticket's weights: ``[P]`` bool, False where a score is NaN.

    Args:
        criterion: as in `prune_masks`, like the others.
        weight: ``[P, N]``.
        initial: ``[P, N]``.
        mask: ``[P, N]`` bool.
        k: weights to keep.
        arena: the layout.

    Raises:
        TypeError, ValueError: as `prune_masks`.
    """
    scores, _ = _scores(criterion, weight, initial, mask, k, arena)
    return ~(scores.isnan() & mask).any(1)


def _scores(
    criterion: str, weight: Tensor, initial: Tensor, mask: Tensor, k: int | Tensor, arena: Arena
) -> tuple[Tensor, Ranking]:
    """``[P, N]`` numbers that tell which weights stay, and how the op is to rank them."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {_known()}, got {criterion!r}")
    shape = (weight.shape[0], arena.prunable)
    for name, tensor in (("weight", weight), ("initial", initial), ("mask", mask)):
        check_shape(name, tensor, shape)
    check_dtype("mask", mask, torch.bool)
    chosen = CRITERIA[criterion]
    if isinstance(chosen, Structure):
        count = _per_ticket("k", k, len(weight), arena.prunable, weight.device)
        chosen.check_count(count, arena)
        return chosen.scores(weight, mask, arena), "score"
    if chosen is magnitude:
        # Read from the weights themselves, without a pass to compute it.
        return weight, "magnitude"
    scores = chosen(weight, initial, arena)
    check_shape(f"scores of criterion {criterion!r}", scores, shape)
    return scores, "score"


def _check_structure(criterion: str, mask: Tensor, arena: Arena) -> None:
    """An earlier level may have left too little for the structure."""
    chosen = CRITERIA[criterion]
    if isinstance(chosen, Structure):
        chosen.check_mask(mask, arena)


def random_mask(key: Tensor, k: int | Tensor, arena: Arena, step: int = 0) -> Tensor:
    """Masks of exactly k weights each, uniform over all prunable weights jointly.

    Args:
        key: ``[P]`` int64, one Philox key per ticket.
        k: weights to keep, one number or ``[P]`` int64, at most N.
        arena: the layout.
        step: position in each key's stream; another step draws another mask.

    Returns:
        ``[P, N]`` bool.

    Raises:
        ValueError: k is negative or larger than N.
    """
    count = _per_ticket("k", k, key.shape[0], arena.prunable, key.device)
    return _first(permutation(key, arena.prunable, stream=Stream.MASK, step=step), count)


def erk_counts(
    layers: Sequence[tuple[int, int, int]], k: int, available: Sequence[int] | None = None
) -> list[int]:
    """Weights per layer under the Erdos-Renyi-Kernel distribution (Evci et al. 2020).

    A layer's density is proportional to ``(in + out) / (in * out)``; a layer that would exceed
    density 1 is full and the others share the rest. Exact: rational arithmetic, then the largest
    remainders round up (ties: the lowest layer).

    Args:
        layers: ``(offset, out, in)`` of each layer, as `Arena.prunable_layers` gives them.
        k: weights to keep in all.
        available: the most that each layer can keep, where some are pruned already.

    Returns:
        One count per layer; they sum to k.

    Raises:
        ValueError: k is negative or larger than the layers together.
    """
    sizes = [out * inp for _, out, inp in layers] if available is None else list(available)
    return share_out(sizes, [out + inp for _, out, inp in layers], k)


def share_out(sizes: Sequence[int], parts: Sequence[int | Fraction], k: int) -> list[int]:
    """Share k weights among layers as ``parts``; a layer that is full leaves the rest to others.

    Exact: rational arithmetic, then the largest remainders round up (ties: the lowest layer).

    Args:
        sizes: the most that each layer can keep.
        parts: positive, of each layer.
        k: weights to keep in all.

    Raises:
        ValueError: k is negative or larger than the layers together.
    """
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must be in [0, {sum(sizes)}], got {k}")
    full: set[int] = set()
    while True:
        free = [layer for layer in range(len(sizes)) if layer not in full]
        left = k - sum(sizes[layer] for layer in full)
        total = sum(parts[layer] for layer in free)
        unit = Fraction(left) / total if total else Fraction(0)
        over = {layer for layer in free if unit * parts[layer] > sizes[layer]}
        if not over:
            break
        full |= over
    ideal = [
        Fraction(sizes[layer]) if layer in full else unit * parts[layer]
        for layer in range(len(sizes))
    ]
    counts = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(sizes)), key=lambda layer: counts[layer] - ideal[layer])
    for layer in by_remainder[: k - sum(counts)]:
        counts[layer] += 1
    return counts


def random_layer_mask(
    key: Tensor, counts: Sequence[int] | Tensor, arena: Arena, step: int = 0
) -> Tensor:
    """Masks with a given number of weights in each layer, uniform within the layer.

    Args:
        key: ``[P]`` int64, one Philox key per ticket.
        counts: kept weights per prunable layer: ``[L]`` for all tickets or ``[P, L]``.
        arena: the layout.
        step: position in each key's stream; another step draws another mask.

    Returns:
        ``[P, N]`` bool.

    Raises:
        ValueError: counts of a wrong shape, negative, or larger than the layer.
    """
    layers = arena.prunable_layers()
    wanted = torch.as_tensor(counts, dtype=torch.int64, device=key.device)
    if wanted.ndim == 1:
        wanted = wanted.expand(key.shape[0], -1)
    check_shape("counts", wanted, (key.shape[0], len(layers)))
    mask = torch.empty(key.shape[0], arena.prunable, dtype=torch.bool, device=key.device)
    for index, (offset, out, inp) in enumerate(layers):
        size = out * inp
        count = _per_ticket(f"counts[{index}]", wanted[:, index], key.shape[0], size, key.device)
        order = permutation(key, size, stream=Stream.MASK, step=step * len(layers) + index)
        mask[:, offset : offset + size] = _first(order, count)
    return mask


def _first(order: Tensor, count: Tensor) -> Tensor:
    """True at the first ``count [P]`` positions that ``order [P, n]`` names."""
    rank = torch.arange(order.shape[1], device=order.device)
    mask = torch.empty_like(order, dtype=torch.bool)
    return mask.scatter_(1, order, rank < count[:, None])


def _per_ticket(
    name: str, value: int | Tensor, tickets: int, most: int, device: torch.device
) -> Tensor:
    """``[tickets]`` int64 counts from one number or a tensor, each checked to be in [0, most]."""
    count = torch.as_tensor(value, dtype=torch.int64, device=device)
    count = count.expand(tickets) if count.ndim == 0 else count
    check_shape(name, count, (tickets,))
    wrong = count[(count < 0) | (count > most)]
    if len(wrong):
        raise ValueError(f"{name} must be in [0, {most}], got {int(wrong[0])}")
    return count.contiguous()


def _known() -> str:
    return ", ".join(sorted(CRITERIA))
