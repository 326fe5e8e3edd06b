"""Panels: `PANEL` batch rows with the features outermost, so that one weight meets whole registers.

Activations arrive row-major, ``[batch][features]``; compressed rows want ``[features][PANEL]``.
A panel of 256 features is 64 KB on AVX-512: it stays in L2 while every nonzero passes over it.
"""

from __future__ import annotations

import numpy as np

from ..compiling import njit
from ..vector import LANES, aligned_empty, transpose

__all__ = ["PANEL", "from_panel", "to_panel"]

PANEL = 4 * LANES
"""Batch rows processed together: four chains of multiply-adds hide their latency."""


@njit(cache=True)
def to_panel(x, x0, width, count, panel):
    """``panel[f][b] = x[x0 + b*width + f]`` for ``count`` rows.

    Beyond ``count`` the panel is zero up to `LANES` columns, or to `PANEL` if ``count`` is more.
    """
    full = count // LANES * LANES
    blocks = width // LANES * LANES
    for b in range(0, full, LANES):
        for f in range(0, blocks, LANES):
            transpose(x, x0 + b * width + f, width, panel, f * PANEL + b, PANEL)
    for f in range(blocks, width):
        for b in range(full):
            panel[f * PANEL + b] = x[x0 + b * width + f]
    end = LANES if count <= LANES else PANEL
    if full < end:
        rest = count - full
        # The last rows, padded so that they can be transposed like the others.
        padded = aligned_empty(LANES * width)
        padded[rest * width :] = np.float32(0.0)
        padded[: rest * width] = x[x0 + full * width : x0 + count * width]
        for f in range(0, blocks, LANES):
            transpose(padded, f, width, panel, f * PANEL + full, PANEL)
        for f in range(blocks, width):
            for b in range(LANES):
                panel[f * PANEL + full + b] = padded[b * width + f]
        for f in range(width):
            panel[f * PANEL + full + LANES : f * PANEL + end] = np.float32(0.0)


@njit(cache=True)
def from_panel(panel, y, y0, width, count):
    """``y[y0 + b*width + f] = panel[f][b]`` for ``count`` rows."""
    full = count // LANES * LANES
    blocks = width // LANES * LANES
    for b in range(0, full, LANES):
        for f in range(0, blocks, LANES):
            transpose(panel, f * PANEL + b, PANEL, y, y0 + b * width + f, width)
    for f in range(blocks, width):
        for b in range(full):
            y[y0 + b * width + f] = panel[f * PANEL + b]
    if full < count:
        padded = aligned_empty(LANES * width)
        for f in range(0, blocks, LANES):
            transpose(panel, f * PANEL + full, PANEL, padded, f, width)
        for f in range(blocks, width):
            for b in range(LANES):
                padded[b * width + f] = panel[f * PANEL + full + b]
        y[y0 + full * width : y0 + count * width] = padded[: (count - full) * width]
