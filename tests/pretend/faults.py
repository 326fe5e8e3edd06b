"""What a real device refuses, and how often it would have been waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Counts", "DeviceFault", "capture", "counts", "set_waiting", "wait"]


class DeviceFault(RuntimeError):
    """Something that a CUDA device would not do."""


@dataclass
class Counts:
    """Since the process began.

    Attributes:
        waits: for the device.
        launches: of Triton kernels, replayed ones included.
        waiting: what comes of it: 0 nothing, 1 a warning, 2 an error.
    """

    waits: int = 0
    launches: int = 0
    waiting: int = 0


counts = Counts()

capture: list[Any] = []
"""The graph that is being captured, if there is one."""


def set_waiting(mode: int | str) -> None:
    """`torch.cuda.set_sync_debug_mode`."""
    names = ("default", "warn", "error")
    counts.waiting = names.index(mode) if isinstance(mode, str) else mode


def wait(reason: str) -> None:
    """Wait for the device, which nobody may do while a graph is captured."""
    if capture:
        raise DeviceFault(f"{reason} waits for the device while a graph is captured")
    if counts.waiting == 2:
        raise DeviceFault(f"{reason} waits for the device")
    counts.waits += 1
