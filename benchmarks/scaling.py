"""Curves: what our cost does as one size grows and all else stays; found in a run's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .measure import Record
from .tables import in_words

AXES = {
    "P": "tickets",
    "width": "width",
    "B": "batch",
    "density": "% of weights kept",
    "threads": "threads",
}
"""Sizes that curves run over, and how figures name them."""

_FEWEST = 4
_PER_TICKET = ("agent-step",)


@dataclass(frozen=True)
class Curve:
    """One op along one axis.

    Attributes:
        axis: one of `AXES`.
        op: as in `Case`.
        fixed: the other sizes, in words.
        points: size and record, ascending.
    """

    axis: str
    op: str
    fixed: str
    points: tuple[tuple[float, Record], ...]

    def ideal(self, size: float) -> float:
        """Cost if it grew with the work alone, or fell with the threads, from the largest point.

        The work of a layer grows with the square of its width. Of a population's agent-steps each
        costs the same.
        """
        last, record = self.points[-1]
        if record.unit in _PER_TICKET and self.axis == "P":
            power = 0
        else:
            power = {"threads": -1, "width": 2}.get(self.axis, 1)
        if self.axis == "threads":
            last, record = self.points[0]
        return record.contenders[record.subject].wall.median * (size / last) ** power


def curves(records: Sequence[Record]) -> list[Curve]:
    """One curve per axis and op, that with most points, in the order of `AXES`.

    A curve has at least four points, or two where threads vary. Agent-steps have none over density,
    since the critic's share of them is dense.
    """
    found: dict[tuple[str, str, str], dict[float, Record]] = {}
    for record in records:
        sizes = _sizes(record)
        for axis in AXES:
            if axis not in sizes or (axis == "density" and record.unit in _PER_TICKET):
                continue
            rest = {name: size for name, size in sizes.items() if name != axis}
            fixed = in_words(rest)
            found.setdefault((axis, record.op, fixed), {})[sizes[axis]] = record
    longest: dict[tuple[str, str], Curve] = {}
    for (axis, op, fixed), points in found.items():
        curve = Curve(axis, op, fixed, tuple(sorted(points.items(), key=lambda point: point[0])))
        enough = len(points) >= (2 if axis == "threads" else _FEWEST)
        if enough and len(points) > len(getattr(longest.get((axis, op)), "points", ())):
            longest[axis, op] = curve
    return sorted(longest.values(), key=lambda curve: list(AXES).index(curve.axis))


def _sizes(record: Record) -> dict[str, float]:
    """Sizes by name; a square layer has one width, and sparsity is the density it leaves."""
    sizes: dict[str, float] = dict(record.shape)
    if "I" in sizes and sizes["I"] == sizes.get("O"):
        sizes["width"] = sizes.pop("I")
        del sizes["O"]
    return sizes | {"density": round(100 - record.sparsity, 4)}
