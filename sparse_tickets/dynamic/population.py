"""`PopulationPruner`: a method of sparse training for tickets that train side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_tickets.kernels.errors import check_shape
from sparse_tickets.linear import count_kept
from sparse_tickets.population import Population

from .course import Course, find_method
from .distributions import Layer, layer_counts
from .method import Method
from .scores import DROP_SCORES, GROW_SCORES, Moment
from .update import update_mask

__all__ = ["PopulationPruner", "Pruning"]


@dataclass(frozen=True)
class Pruning:
    """What trainers are told of sparsity during training.

    Attributes:
        method: a `Method`, or one of `METHODS`.
        density: of the finished tickets, in [0, 1].
    """

    method: Method | str
    density: float

    def pruner(
        self, population: Population, steps: int, key: Tensor, gradient: Callable[[], Tensor]
    ) -> PopulationPruner:
        """For one training; see `PopulationPruner`."""
        return PopulationPruner(
            population, self.method, self.density, steps, key, gradient=gradient
        )


class PopulationPruner:
    """Prunes and regrows every ticket of a population while it trains, each by itself.

    Trainers make one where they are given a `Pruning`. In a loop of one's own `step` is called
    after the updates it is told of.

    All tickets keep exactly ``floor(density * N + 0.5)`` of their N prunable weights after an
    update. Grown weights and their moments start at zero. ``population.density``, by which kernels
    are chosen, follows the schedule.

    Args:
        population: changed in place; its masks must keep as many weights in every ticket.
        method: a `Method`, or one of `METHODS`.
        density: of the finished tickets, in [0, 1].
        steps: gradient steps of the whole training.
        key: ``[P]`` int64; all random scores of a ticket come from its key.
        gradient: the dense gradient ``[P, N]`` at the present weights, for methods that read it.

    Attributes:
        count: gradient steps so far.

    Raises:
        ValueError: an unknown method, numbers out of range, a key that does not fit, tickets of
            different densities, or no gradient for a method that reads one.
    """

    def __init__(
        self,
        population: Population,
        method: Method | str,
        density: float,
        steps: int,
        key: Tensor,
        *,
        gradient: Callable[[], Tensor] | None = None,
    ) -> None:
        method = find_method(method)
        check_shape("key", key, (len(population),))
        kept = population.parameters.mask.count_nonzero(1)
        if len(kept) and kept.min() != kept.max():
            raise ValueError(
                f"population must keep as many weights in every ticket, got {int(kept.min())} to "
                f"{int(kept.max())}"
            )
        if method.needs_gradient and gradient is None:
            raise ValueError("gradient must be given for this method, got None")
        size = population.arena.prunable
        start = int(kept[0]) / size if len(kept) and size else 1.0
        self._course = Course(method, steps, start, density)
        self._population, self._key, self._gradient = population, key, gradient
        self._initial = population.parameters.weight[:, :size].clone()
        self.count = 0
        if method.schedule == "constant":
            self._update_(replace(method, drop="random", grow="none"))

    def step(self, steps: int = 1) -> bool:
        """Count gradient steps; update the masks once if an update fell due in them.

        Returns:
            Whether the masks were updated.
        """
        passed = range(self.count + 1, self.count + steps + 1)
        self.count += steps
        due = any(map(self._course.is_due, passed))
        if due:
            self._update_(self._course.method)
        return due

    @torch.no_grad()
    def _update_(self, method: Method) -> None:
        population, size = self._population, self._population.arena.prunable
        parameters, layers = population.parameters, population.arena.prunable_layers()
        growing = GROW_SCORES[method.grow]
        density = self._course.density(self.count)
        k = count_kept(density, size)
        if growing is None and len(population):
            k = min(k, int(parameters.mask[0].count_nonzero()))
        weight = parameters.weight[:, :size]
        gradient = self._gradient() if method.needs_gradient and self._gradient else None
        moment = Moment(weight, self._initial, gradient, self._key, self.count)
        drop = _numbers(DROP_SCORES[method.drop](moment))
        grow = None if growing is None else _numbers(growing(moment))
        mask = torch.empty_like(parameters.mask)
        for available, rows in self._alike(layers, growing is None):
            mask[rows] = update_mask(
                parameters.mask[rows],
                drop[rows],
                None if grow is None else grow[rows],
                k,
                replaced=self._course.replaced(self.count),
                layers=layers,
                counts=layer_counts(method.distribution, layers, k, available),
            )
        for row in (weight, parameters.m[:, :size], parameters.v[:, :size]):
            row.masked_fill_(~mask, 0.0)
        parameters.mask.copy_(mask)
        population.density = density

    def _alike(
        self, layers: Sequence[Layer], shrinks: bool
    ) -> list[tuple[tuple[int, ...] | None, list[int]]]:
        """Tickets that keep as many weights in every layer, which is the most they can keep."""
        every = list(range(len(self._population)))
        if not shrinks:
            return [(None, every)]
        mask = self._population.parameters.mask
        kept = [mask[:, at : at + out * inp].count_nonzero(1).tolist() for at, out, inp in layers]
        groups: dict[tuple[int, ...], list[int]] = {}
        for ticket in every:
            groups.setdefault(tuple(row[ticket] for row in kept), []).append(ticket)
        return list(groups.items())


def _numbers(scores: Tensor) -> Tensor:
    """Scores without NaN: a ticket that diverged is pruned too, and the others go on."""
    return scores.masked_fill(scores.isnan(), 0.0)
