"""What both kinds of timing may run on, checked and named."""

from __future__ import annotations

import torch

__all__ = ["check_machine", "name_machine"]


def check_machine(device: str, threads: int | None) -> None:
    """Raise ``ValueError`` for a device that is not there, or fewer than one thread."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {device} and torch sees no GPU")


def name_machine(device: str) -> str:
    """The GPU's name, or torch's number of threads in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"
