"""The backends that pytest-benchmark's suites run over, and where their tensors live."""

from __future__ import annotations

import torch

from sparse_tickets.kernels.dispatch import has_triton

__all__ = ["BACKENDS", "device_of"]

BACKENDS = ("reference", "cpu", *(["triton"] if torch.cuda.is_available() and has_triton() else []))
"""Triton's interpreter is far too slow to time: only with a GPU."""


def device_of(backend: str) -> str:
    """``cuda`` for Triton, the CPU for others."""
    return "cuda" if backend == "triton" else "cpu"
