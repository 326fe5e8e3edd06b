"""Units of a run, and what its folder calls them and their files."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ALGO", "DATA", "MANIFEST", "REWIND", "ROWS", "TICKETS", "UNIT", "Unit"]

DATA = ("experts", "demonstrations")
"""Names of the data sets in data/."""

ROWS, TICKETS, REWIND = "rows.parquet", "tickets.safetensors", "rewind.safetensors"
MANIFEST = "manifest.json"
ALGO = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
UNIT = rf"({ALGO})-level-([0-9]{{2,9}})-chunk-([0-9]{{2,9}})"
"""How a unit's folder is named: algo, level and chunk."""


@dataclass(frozen=True, order=True)
class Unit:
    """What is computed and stored at once: some tracks of one algorithm at one level.

    Raises:
        ValueError: an algo that cannot be a file name, or a negative level or chunk.
    """

    algo: str
    level: int
    chunk: int

    def __post_init__(self) -> None:
        if not re.fullmatch(ALGO, self.algo):
            raise ValueError(f"algo must be letters, digits and _.+-, got {self.algo!r}")
        if self.level < 0 or self.chunk < 0:
            raise ValueError(f"level and chunk must be >= 0, got {self.level} and {self.chunk}")

    @property
    def name(self) -> str:
        """Name of the unit's folder."""
        return f"{self.algo}-level-{self.level:02d}-chunk-{self.chunk:02d}"
