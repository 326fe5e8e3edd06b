"""The baseline conditions: where a level's mask and weights come from, compared to the ticket.

A condition is a pure function of the rewind values, the IMP mask, a key and fresh initial values.
Comparing conditions separates what a ticket owes to its mask, to the share of weights in each
layer, and to its initial values. A condition is about the policy: a critic, pruned or not, is
treated alike in all of them (`imp.next_population`). All shuffles are over whole layers: shuffling
rows only would keep every unit's fan-in and every dead input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .kernels.arena import Arena
from .kernels.errors import check_dtype, check_shape
from .kernels.random import Stream, permutation
from .prune import erk_counts, random_layer_mask, random_mask

__all__ = ["CONDITIONS", "Condition", "draw", "find_condition", "register_condition"]

MaskSource = Literal["imp", "permuted", "random", "erk-random"]
WeightSource = Literal["init", "permuted", "fresh"]
Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Arena], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Condition:
    """How a track draws its mask and its weights at each level.

    Attributes:
        name: what results and figures call it.
        mask: ``imp``, the IMP mask; ``permuted``, the IMP mask shuffled within each layer;
            ``random``, as many weights drawn over all layers jointly; ``erk-random``, as many
            drawn with Erdos-Renyi-Kernel layer densities.
        weights: ``init``, the rewind values; ``permuted``, the surviving rewind values shuffled
            within each layer; ``fresh``, freshly initialised.
        function: a user's own draw; `mask` and `weights` then only describe what it does.

    Raises:
        ValueError: an unknown source, or permuted weights on a mask that changes layer counts.
    """

    name: str
    mask: MaskSource
    weights: WeightSource
    function: Draw | None = None

    def __post_init__(self) -> None:
        for field, value, known in (
            ("mask", self.mask, get_args(MaskSource)),
            ("weights", self.weights, get_args(WeightSource)),
        ):
            if value not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")
        if self.weights == "permuted" and not self.chained and self.function is None:
            raise ValueError(
                "weights='permuted' needs mask 'imp' or 'permuted', whose layers keep their counts,"
                f" got mask={self.mask!r}"
            )

    @property
    def chained(self) -> bool:
        """Whether a level needs the trained network of the level before."""
        return self.mask in ("imp", "permuted")


CONDITIONS: dict[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition("mask/weights", "imp", "init"),
        Condition("mask/permuted", "imp", "permuted"),
        Condition("permuted/permuted", "permuted", "permuted"),
        Condition("random/re-init", "random", "fresh"),
        Condition("mask/re-init", "imp", "fresh"),
        Condition("permuted/re-init", "permuted", "fresh"),
        Condition("erk-random/re-init", "erk-random", "fresh"),
    )
}


def find_condition(name: str) -> Condition:
    """The registered condition called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {name!r}")
    return CONDITIONS[name]


def register_condition(
    name: str, *, mask: MaskSource = "imp", weights: WeightSource = "init"
) -> Callable[[Draw], Draw]:
    """Add a condition of your own, a function, to `CONDITIONS`.

    The function takes and returns what `draw` does, without the condition. It must use each
    ticket's own row and key only, and keep as many weights as the IMP mask does.

    Args:
        name: a new name.
        mask: what kind of mask it draws. With ``imp`` or ``permuted`` its levels form a chain, the
            IMP mask at each level coming from the level before; with ``random`` or ``erk-random``
            only the IMP mask's count is meaningful, and no trained network is needed.
        weights: what kind of weights it draws.

    Raises:
        ValueError: the name is taken, or an unknown source.
    """

    def register(function: Draw) -> Draw:
        if name in CONDITIONS:
            raise ValueError(f"name must be new, got {name!r}; registered: {', '.join(CONDITIONS)}")
        CONDITIONS[name] = Condition(name, mask, weights, function)
        return function

    return register


def draw(
    condition: Condition,
    rewind_values: Tensor,
    imp_mask: Tensor,
    key: Tensor,
    fresh: Tensor,
    arena: Arena,
) -> tuple[Tensor, Tensor]:
    """Draw the weights and masks that the tickets of one level start from.

    Args:
        condition: how.
        rewind_values: ``[P, N]`` float32, the values at the rewind point, also off the mask.
        imp_mask: ``[P, N]`` bool, the mask pruning arrived at; conditions with random masks use
            only the number of its weights.
        key: ``[P]`` int64, one Philox key per ticket (of env, algo, seed, condition and level).
        fresh: ``[P, N]`` float32, freshly sampled initial values.
        arena: the layout.

    Returns:
        ``(weight [P, N], mask [P, N])``; the weight is exactly zero off the mask, and each row
        depends on its own inputs alone.

    Raises:
        ValueError: a wrong shape, or a user's function that breaks this contract.
        TypeError: a mask that is not bool or a key that is not int64.
    """
    shape = (key.shape[0], arena.prunable)
    inputs = (("rewind_values", rewind_values), ("imp_mask", imp_mask), ("fresh", fresh))
    for name, tensor in inputs:
        check_shape(name, tensor, shape)
    check_dtype("imp_mask", imp_mask, torch.bool)
    check_dtype("key", key, torch.int64)
    if condition.function is not None:
        weight, mask = condition.function(rewind_values, imp_mask, key, fresh, arena)
        _check_drawn(condition.name, weight, mask, imp_mask)
        return weight, mask
    mask = _draw_mask(condition.mask, imp_mask, key, arena)
    if condition.weights == "permuted":
        return _permute_values(rewind_values, imp_mask, mask, key, arena), mask
    values = rewind_values if condition.weights == "init" else fresh
    return torch.where(mask, values, torch.zeros_like(values)), mask


def _draw_mask(source: MaskSource, imp_mask: Tensor, key: Tensor, arena: Arena) -> Tensor:
    if source == "imp":
        return imp_mask.clone()
    if source == "permuted":
        mask = torch.empty_like(imp_mask)
        for index, (offset, out, inp) in enumerate(arena.prunable_layers()):
            layer = slice(offset, offset + out * inp)
            order = permutation(key, out * inp, stream=Stream.MASK, step=index)
            mask[:, layer] = imp_mask[:, layer].gather(1, order)
        return mask
    k = imp_mask.sum(dim=1)
    if source == "random":
        return random_mask(key, k, arena)
    layers = arena.prunable_layers()
    counts = {count: erk_counts(layers, count) for count in set(k.tolist())}
    wanted = torch.tensor([counts[count] for count in k.tolist()], dtype=torch.int64, device="cpu")
    return random_layer_mask(key, wanted.reshape(len(k), len(layers)), arena)


def _permute_values(
    values: Tensor, survivors: Tensor, mask: Tensor, key: Tensor, arena: Arena
) -> Tensor:
    """Place each layer's surviving values, in random order, on the mask's positions."""
    weight = torch.zeros_like(values)
    for index, (offset, out, inp) in enumerate(arena.prunable_layers()):
        layer = slice(offset, offset + out * inp)
        order = permutation(key, out * inp, stream=Stream.PERMUTE, step=index)
        shuffled = values[:, layer].gather(1, order)
        # Boolean indexing walks rows in order, and survivors and mask agree in count in every row,
        # so the values stay with their ticket.
        weight[:, layer][mask[:, layer]] = shuffled[survivors[:, layer].gather(1, order)]
    return weight


def _check_drawn(name: str, weight: Tensor, mask: Tensor, imp_mask: Tensor) -> None:
    """Hold a user's function to the contract of `draw`."""
    who = f"condition {name!r}:"
    check_shape(f"{who} weight", weight, tuple(imp_mask.shape))
    check_shape(f"{who} mask", mask, tuple(imp_mask.shape))
    check_dtype(f"{who} mask", mask, torch.bool)
    if weight[~mask].count_nonzero():
        raise ValueError(f"{who} weight must be zero where the mask is False")
    wanted, got = imp_mask.sum(dim=1), mask.sum(dim=1)
    if not torch.equal(wanted, got):
        raise ValueError(f"{who} mask must keep {wanted.tolist()} weights, got {got.tolist()}")
