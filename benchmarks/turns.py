"""Whole programs that take turns, a slice each, so that all of them see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def take_turns(
    programs: Mapping[str, Callable[[], Any]], rounds: int, *, rates: bool = False
) -> dict[str, list[float]]:
    """Seconds of each program's slices by rounds; or units per second, of which a slice tells."""
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            begin = time.perf_counter()
            units = run()
            seconds = time.perf_counter() - begin
            found[name].append(units / seconds if rates else seconds)
    return found


def ratio(one: list[float], other: list[float], digits: int) -> tuple[str, str]:
    """Median and range of the ratios within rounds."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    low, high = (f"{value:.{digits}f}" for value in (ratios[0], ratios[-1]))
    return f"{statistics.median(ratios):.{digits}f}", f"({low}-{high})"
