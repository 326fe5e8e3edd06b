"""Masks with structure: n of every m inputs, equally many inputs per unit, whole square blocks.

`n_m_mask`, `fan_in_mask` and `block_mask` choose for one matrix. The classes choose for a whole
policy, within what earlier levels left: they order all of a ticket's weights such that keeping the
first k of them has the structure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.arena import Arena

__all__ = [
    "Blocks",
    "FanIn",
    "NOfM",
    "Structure",
    "block_mask",
    "check_n_m",
    "fan_in_mask",
    "n_m_mask",
]


def n_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest scores of every m neighbours along the last axis.

    Args:
        scores: ``[..., in]`` of a width that m divides, e.g. a weight's magnitudes ``[out, in]``.
        n: kept of each group, in [0, m].
        m: size of a group.

    Returns:
        Bool, of the shape of the scores; ties keep the lowest position.

    Raises:
        ValueError: n or m out of range, a width that m does not divide, or a NaN score.

    Example:
        >>> n_m_mask(torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]), 2, 4).int()
        tensor([1, 0, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    """
    check_n_m(n, m)
    _check_scores(scores, 1)
    width = scores.shape[-1]
    if width % m:
        raise ValueError(f"scores must be a multiple of m={m} wide, got {width}")
    return (_rank(scores.unflatten(-1, (-1, m))) < n).flatten(-2)


def fan_in_mask(scores: Tensor, fan_in: int) -> Tensor:
    """Keep the same number of inputs for every unit: those of largest score.

    Args:
        scores: ``[..., out, in]``.
        fan_in: inputs to keep of each row, in [0, in].

    Returns:
        Bool, of the shape of the scores; ties keep the lowest position.

    Raises:
        ValueError: the fan-in is out of range, or a score is NaN.
    """
    _check_scores(scores, 2)
    if not 0 <= fan_in <= scores.shape[-1]:
        raise ValueError(f"fan_in must be in [0, {scores.shape[-1]}], got {fan_in}")
    return _rank(scores) < fan_in


def block_mask(scores: Tensor, block: int, kept: int) -> Tensor:
    """Keep the square blocks whose scores sum up to most.

    Args:
        scores: ``[..., out, in]``, both multiples of the block.
        block: size of the blocks, e.g. 16, 32 or 64, which `kernels.linear` runs blocked.
        kept: number of blocks to keep of each matrix.

    Returns:
        Bool, of the shape of the scores; ties keep the earlier block, row by row.

    Raises:
        ValueError: the block does not divide the shape, the number is out of range, or a score is
            NaN.
    """
    _check_scores(scores, 2)
    out, inp = scores.shape[-2:]
    if block < 1 or out % block or inp % block:
        raise ValueError(f"block must divide the scores' {out} x {inp}, got {block}")
    total = _block_sums(scores, block).flatten(-2)
    if not 0 <= kept <= total.shape[-1]:
        raise ValueError(f"kept must be in [0, {total.shape[-1]}], got {kept}")
    chosen = (_rank(total) < kept).unflatten(-1, (out // block, inp // block))
    return _spread(chosen, block, out, inp)


class Structure:
    """A criterion that keeps the largest weights its structure allows; see `prune.CRITERIA`.

    One of your own overrides `turn`, and the checks where not every count will do.
    """

    def scores(self, weight: Tensor, mask: Tensor, arena: Arena) -> Tensor:
        """``[P, N]`` scores, all different, of which keeping any number has the structure.

        Args:
            weight: ``[P, N]``; NaN gives NaN.
            mask: ``[P, N]`` bool, what may be kept: the others come last.
            arena: the layout.
        """
        magnitude = weight.abs().masked_fill(~mask, -1.0)
        order = magnitude.argsort(dim=1, descending=True, stable=True)
        turn = self.turn(magnitude, arena).gather(1, order)
        order = order.gather(1, turn.argsort(dim=1, stable=True))
        # Ranks are whole numbers: float32 tells 2^24 of them apart.
        dtype = torch.float32 if weight.shape[1] <= 2**24 else torch.float64
        rank = torch.arange(weight.shape[1], dtype=dtype, device=weight.device)
        scores = torch.empty_like(weight, dtype=dtype).scatter_(1, order, -rank.expand_as(order))
        return scores.masked_fill(weight.isnan(), float("nan"))

    def turn(self, magnitude: Tensor, arena: Arena) -> Tensor:
        """``[P, N]`` int64: lower turns are kept first; within a turn, larger magnitudes.

        Args:
            magnitude: ``[P, N]``, -1 where an earlier level pruned.
            arena: the layout.
        """
        raise NotImplementedError

    def check_count(self, k: Tensor, arena: Arena) -> None:
        """Raise ``ValueError`` if no mask of ``k [P]`` weights has the structure."""

    def check_mask(self, mask: Tensor, arena: Arena) -> None:
        """Raise ``ValueError`` if ``mask [P, N]`` lacks the structure."""


@dataclass(frozen=True)
class NOfM(Structure):
    """Of every m neighbouring inputs of a unit, n are kept: density n/m and no other.

    Attributes:
        n: kept, from 1 to m.
        m: size of a group; must divide the inputs of every prunable layer.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_n_m(self.n, self.m)
        if not self.n:
            raise ValueError("n must be at least 1, got 0")

    def turn(self, magnitude: Tensor, arena: Arena) -> Tensor:
        """The rank within its group."""
        # Widths are multiples of m, so no group straddles a row or a layer.
        return _rank(magnitude.unflatten(1, (-1, self.m))).flatten(1)

    def check_count(self, k: Tensor, arena: Arena) -> None:
        """The widths fit, and k is n/m of all prunable weights."""
        for offset, _, inp in arena.prunable_layers():
            if inp % self.m:
                raise ValueError(
                    f"layers must have multiples of {self.m} inputs for {self.n}:{self.m}, "
                    f"got {inp} in the one at offset {offset}"
                )
        expected = arena.prunable * self.n // self.m
        wrong = k[k != expected]
        if len(wrong):
            raise ValueError(
                f"k must be {expected} for {self.n}:{self.m}, which is {self.n}/{self.m} of "
                f"{arena.prunable} weights and no other density, got {int(wrong[0])}"
            )

    def check_mask(self, mask: Tensor, arena: Arena) -> None:
        """No group keeps more than n, as it must where an earlier level left too few elsewhere."""
        most = int(mask.unflatten(1, (-1, self.m)).sum(2).amax()) if mask.numel() else 0
        if most > self.n:
            raise ValueError(
                f"mask must leave at least {self.n} of every {self.m} inputs for "
                f"{self.n}:{self.m}, got groups with fewer"
            )


@dataclass(frozen=True)
class FanIn(Structure):
    """Every unit of the policy keeps equally many inputs, or all if it has fewer.

    Where k does not divide evenly, some units keep one more: those to whom it is worth most.
    """

    def turn(self, magnitude: Tensor, arena: Arena) -> Tensor:
        """The rank within its row."""
        turn = torch.empty_like(magnitude, dtype=torch.int64)
        for offset, out, inp in arena.prunable_layers():
            layer = slice(offset, offset + out * inp)
            turn[:, layer] = _rank(magnitude[:, layer].unflatten(1, (out, inp))).flatten(1)
        return turn


@dataclass(frozen=True)
class Blocks(Structure):
    """Square blocks are kept or pruned whole, by their mean magnitude.

    Blocks at a layer's edge may be cut. Exactly k weights stay, so one block of a ticket may be
    kept in part; none is where k and all widths are multiples of blocks.

    Attributes:
        size: of a block.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def turn(self, magnitude: Tensor, arena: Arena) -> Tensor:
        """The rank of its block: whole ones first, so that a level adds no second partial block."""
        mean, partial, blocks = [], [], []
        for offset, out, inp in arena.prunable_layers():
            matrix = magnitude[:, offset : offset + out * inp].unflatten(1, (out, inp))
            area = _block_sums(torch.ones_like(matrix[:1]), self.size)
            mean.append((_block_sums(matrix.clamp(min=0), self.size) / area).flatten(1))
            partial.append((_block_sums(matrix >= 0, self.size) < area).flatten(1))
            blocks.append(area.shape[1:])
        order = torch.cat(mean, 1).argsort(dim=1, descending=True, stable=True)
        whole_first = torch.cat(partial, 1).gather(1, order).to(torch.uint8)
        order = order.gather(1, whole_first.argsort(dim=1, stable=True))
        turns = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, turns)
        parts = rank.split([rows * columns for rows, columns in blocks], 1)
        return torch.cat(
            [
                _spread(part.unflatten(1, shape), self.size, out, inp).flatten(1)
                for part, shape, (_, out, inp) in zip(
                    parts, blocks, arena.prunable_layers(), strict=True
                )
            ],
            1,
        )


def check_n_m(n: int, m: int) -> None:
    """Raise ``ValueError`` unless n of every m is something that a mask can keep."""
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    if not 0 <= n <= m:
        raise ValueError(f"n must be in [0, {m}], got {n}")


def _check_scores(scores: Tensor, axes: int) -> None:
    if scores.dim() < axes:
        raise ValueError(f"scores must have at least {axes} axes, got shape {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError("scores must not be NaN, got some that are")


def _rank(scores: Tensor) -> Tensor:
    """Place of each score along the last axis, 0 being the largest; ties in order of position."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _block_sums(matrices: Tensor, block: int) -> Tensor:
    """``[..., out, in] -> [..., blocks of rows, blocks of columns]``, edge blocks cut."""
    out, inp = matrices.shape[-2:]
    # In float64 the order of summation, which torch chooses by shape, decides no rank.
    padded = F.pad(matrices.double(), (0, -inp % block, 0, -out % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-3, -1))


def _spread(blocks: Tensor, block: int, out: int, inp: int) -> Tensor:
    """Each block's value for all its entries: ``[..., rows, columns] -> [..., out, in]``."""
    rows = torch.arange(out, device=blocks.device) // block
    columns = torch.arange(inp, device=blocks.device) // block
    return blocks[..., rows, :][..., columns]
