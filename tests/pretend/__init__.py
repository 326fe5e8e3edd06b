"""A CUDA device made of host memory, so that what Python does with a GPU can be tested without one.

A pytest plugin: ``pytest -p pretend tests/pretended``. Tensors really are on ``cuda:0``: ATen's ops
run on the host below them, Triton's in its interpreter. What a real device refuses raises
`DeviceFault`: a host tensor among a kernel's arguments, a launch on another device, and, while a
CUDA graph is captured, whatever would wait for the device. A capture computes nothing, and its
replays run what it recorded on the memory it saw. What this cannot show: what a compiler makes of
a kernel, and time.
"""

from __future__ import annotations

import fcntl
import os

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch.utils import cpp_extension

from .faults import DeviceFault, counts

__all__ = ["DeviceFault", "counts"]


def _build() -> ModuleType:
    """Compile the device, once for all processes.

    torch's own lock outlives a build that was killed, and the next would wait for ever: under a
    lock that ends with its process, whatever lock there is belongs to nobody.
    """
    name = "pretend_device"
    folder = Path(cast(Any, cpp_extension)._get_build_directory(name, verbose=False))
    with (folder / "building").open("w") as building:
        fcntl.flock(building, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        source = Path(__file__).parent / "device.cpp"
        return cast(ModuleType, cpp_extension.load(name, [str(source)], extra_cflags=["-O1"]))


host = _build()

from . import ops, runtime, triton_launch  # noqa: E402, F401  (they change torch and triton)
