"""Which units of a sweep may run: those whose units before are finished, longest chains first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from sparse_tickets.sweep.cells import units_before
from sparse_tickets.sweep.experts import EXPERTS
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.unit import Unit

__all__ = ["UnitSchedule"]


class UnitSchedule:
    """The units of a sweep, each handed out once what it is trained from is finished.

    A level waits for the level before in chains alone: random masks need level 0 and nothing else.
    Of units that may run, those come first that most others wait for in a row. Every unit costs the
    same, however many there are.

    Args:
        spec: the sweep; algorithms that imitate wait for `EXPERTS`.
    """

    def __init__(self, spec: Sweep) -> None:
        self._before: dict[Unit, list[Unit]] = {EXPERTS: []} if spec.imitating else {}
        for algo in spec.algos:
            first = [EXPERTS] if algo in spec.imitating else []
            for level, chunk, tracks in spec.units(algo):
                unit = Unit(algo, level, chunk)
                self._before[unit] = units_before(spec, unit, tracks) or first
        self._after: dict[Unit, list[Unit]] = {unit: [] for unit in self._before}
        for unit, needed in self._before.items():
            for each in needed:
                self._after[each].append(unit)
        self._missing = {unit: len(needed) for unit, needed in self._before.items()}
        self._waiting = {unit: len(later) for unit, later in self._after.items()}
        self._height: dict[Unit, int] = {}
        # Units stand behind those they need.
        for unit in reversed(self._before):
            later = (self._height[each] for each in self._after[unit])
            self._height[unit] = 1 + max(later, default=0)
        self._ready: list[tuple[int, Unit]] = []
        self.put_back(unit for unit, missing in self._missing.items() if not missing)

    def pop(self) -> Unit | None:
        """A unit that may run; None where none may now."""
        return heapq.heappop(self._ready)[1] if self._ready else None

    def put_back(self, units: Iterable[Unit]) -> None:
        """Hand out once more what could not be run."""
        for unit in units:
            heapq.heappush(self._ready, (-self._height[unit], unit))

    def finish(self, unit: Unit) -> list[Unit]:
        """Take note that a unit is finished; which units no other is going to be trained from."""
        for each in self._after[unit]:
            self._missing[each] -= 1
            if not self._missing[each]:
                self.put_back([each])
        for each in self._before[unit]:
            self._waiting[each] -= 1
        return [each for each in (*self._before[unit], unit) if not self._waiting[each]]
