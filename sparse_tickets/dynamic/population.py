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
        critic: how critics under the mask are pruned, apart from the actor; by default all
            networks are pruned together.
    """

    method: Method | str
    density: float
    critic: Pruning | None = None

    def pruner(
        self, population: Population, steps: int, key: Tensor, gradient: Callable[[], Tensor]
    ) -> PopulationPruner:
        """For one training; see `PopulationPruner`."""
        return PopulationPruner(
            population,
            self.method,
            self.density,
            steps,
            key,
            gradient=gradient,
            critic=self.critic,
        )


class PopulationPruner:
    """Prunes and regrows every ticket of a population while it trains, each by itself.

    Trainers make one where they are given a `Pruning`. In a loop of one's own `step` is called
    after the updates it is told of.

    All tickets keep exactly ``floor(density * N + 0.5)`` of their N prunable weights after an
    update; where critics are pruned apart, of the actor's and of the critics'. Grown weights and
    their moments start at zero. ``population.density``, by which kernels are chosen, follows.

    Args:
        population: changed in place; its masks must keep as many weights in every ticket.
        method: a `Method`, or one of `METHODS`.
        density: of the finished tickets, in [0, 1].
        steps: gradient steps of the whole training.
        key: ``[P]`` int64; all random scores of a ticket come from its key.
        gradient: the dense gradient ``[P, N]`` at the present weights, for methods that read it.
        critic: method and density of the critics, if they are pruned apart from the actor.

    Attributes:
        count: gradient steps so far.

    Raises:
        ValueError: an unknown method, numbers out of range, a key that does not fit, tickets of
            different densities, no gradient for a method that reads one, or ``critic`` where no
            critic is under the mask.
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
        critic: Pruning | None = None,
    ) -> None:
        check_shape("key", key, (len(population),))
        layers, size = population.arena.prunable_layers(), population.arena.prunable
        self._population, self._key, self._gradient = population, key, gradient
        if critic is None:
            self._parts = [self._part(method, density, steps, layers)]
        else:
            inner = population.arena.actor.depth
            if inner == len(layers):
                raise ValueError(
                    "critic must be None where the arena has no critic under its mask: build it "
                    "with prune_critic=True"
                )
            self._parts = [
                self._part(method, density, steps, layers[:inner]),
                self._part(critic.method, critic.density, steps, layers[inner:]),
            ]
        self._initial = population.parameters.weight[:, :size].clone()
        self.count = 0
        methods = [(part, part.course.method) for part in self._parts]
        self._update_(
            [
                (part, replace(method, drop="random", grow="none"))
                for part, method in methods
                if method.schedule == "constant"
            ]
        )

    def _part(
        self, method: Method | str, density: float, steps: int, layers: Sequence[Layer]
    ) -> _Part:
        method, mask = find_method(method), self._population.parameters.mask
        begin = layers[0][0] if layers else 0
        size = sum(out * inp for _, out, inp in layers)
        at = slice(begin, begin + size)
        kept = mask[:, at].count_nonzero(1)
        if len(kept) and kept.min() != kept.max():
            raise ValueError(
                f"population must keep as many weights in every ticket, got {int(kept.min())} to "
                f"{int(kept.max())}"
            )
        if method.needs_gradient and self._gradient is None:
            raise ValueError("gradient must be given for this method, got None")
        start = int(kept[0]) / size if len(kept) and size else 1.0
        places = tuple((offset - begin, out, inp) for offset, out, inp in layers)
        return _Part(at, places, Course(method, steps, start, density))

    def step(self, steps: int = 1) -> bool:
        """Count gradient steps; update the masks once if an update fell due in them.

        Returns:
            Whether the masks were updated.
        """
        passed = range(self.count + 1, self.count + steps + 1)
        self.count += steps
        due = [part for part in self._parts if any(map(part.course.is_due, passed))]
        self._update_([(part, part.course.method) for part in due])
        return bool(due)

    @torch.no_grad()
    def _update_(self, due: list[tuple[_Part, Method]]) -> None:
        """Update the masks of some parts, each by a method."""
        if not due:
            return
        population, size = self._population, self._population.arena.prunable
        parameters, weight = population.parameters, population.parameters.weight[:, :size]
        reads = any(method.needs_gradient for _, method in due)
        gradient = self._gradient() if reads and self._gradient else None
        moment = Moment(weight, self._initial, gradient, self._key, self.count)
        mask = parameters.mask.clone()
        for part, method in due:
            mask[:, part.at] = self._updated(part, method, moment)
        for row in (weight, parameters.m[:, :size], parameters.v[:, :size]):
            row.masked_fill_(~mask, 0.0)
        parameters.mask.copy_(mask)
        population.density = self._density()

    def _updated(self, part: _Part, method: Method, moment: Moment) -> Tensor:
        """The mask of a part after an update."""
        old, growing = self._population.parameters.mask[:, part.at], GROW_SCORES[method.grow]
        k = count_kept(part.course.density(self.count), part.size)
        if growing is None and len(old):
            k = min(k, int(old[0].count_nonzero()))
        drop = _numbers(DROP_SCORES[method.drop](moment))[:, part.at]
        grow = None if growing is None else _numbers(growing(moment))[:, part.at]
        mask = torch.empty_like(old)
        for available, rows in _alike(old, part.layers, growing is None):
            mask[rows] = update_mask(
                old[rows],
                drop[rows],
                None if grow is None else grow[rows],
                k,
                replaced=part.course.replaced(self.count),
                layers=part.layers,
                counts=layer_counts(method.distribution, part.layers, k, available, method.shares),
            )
        return mask

    def _density(self) -> float:
        """What the schedules say that all parts keep together."""
        densities = [part.course.density(self.count) for part in self._parts]
        if len(densities) == 1:
            return densities[0]
        kept = map(count_kept, densities, (part.size for part in self._parts))
        return sum(kept) / sum(part.size for part in self._parts)


@dataclass(frozen=True)
class _Part:
    """Layers that are pruned together: their slice of a row, places in it, and course."""

    at: slice
    layers: tuple[Layer, ...]
    course: Course

    @property
    def size(self) -> int:
        return self.at.stop - self.at.start


def _alike(
    mask: Tensor, layers: Sequence[Layer], shrinks: bool
) -> list[tuple[tuple[int, ...] | None, list[int]]]:
    """Tickets that keep as many weights in every layer, which is the most they can keep."""
    every = list(range(len(mask)))
    if not shrinks:
        return [(None, every)]
    kept = [mask[:, at : at + out * inp].count_nonzero(1).tolist() for at, out, inp in layers]
    groups: dict[tuple[int, ...], list[int]] = {}
    for ticket in every:
        groups.setdefault(tuple(row[ticket] for row in kept), []).append(ticket)
    return list(groups.items())


def _numbers(scores: Tensor) -> Tensor:
    """Scores without NaN: a ticket that diverged is pruned too, and the others go on."""
    return scores.masked_fill(scores.isnan(), 0.0)
