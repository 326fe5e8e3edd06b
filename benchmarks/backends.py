"""The backends that pytest-benchmark's suites run over, and where their tensors live."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_tickets.kernels.dispatch import has_triton

__all__ = ["BACKENDS", "device_of", "swept"]

BACKENDS = ("reference", "cpu", *(["triton"] if torch.cuda.is_available() and has_triton() else []))
"""Triton's interpreter is far too slow to time: only with a GPU."""


def device_of(backend: str) -> str:
    """``cuda`` for Triton, the CPU for others."""
    return "cuda" if backend == "triton" else "cpu"


def swept(levels: Sequence[float], backends: Sequence[str] = BACKENDS) -> list[tuple[str, float]]:
    """Every backend at every sparsity or level, but the reference at the first and the middle.

    Plain torch multiplies by zeros as by anything else: two levels show that its time stays.
    """
    few = {levels[0], levels[len(levels) // 2]}
    return [
        (backend, level)
        for backend in backends
        for level in levels
        if backend != "reference" or level in few
    ]
