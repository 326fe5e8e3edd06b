"""A CUDA device made of host memory, so that what Python does with a GPU can be tested without one.

A pytest plugin: ``pytest -p pretend tests/pretended``. Tensors really are on ``cuda:0``: ATen's ops
run on the host below them, Triton's in its interpreter. What a real device refuses raises
`DeviceFault`: a host tensor among a kernel's arguments, a launch on another device, and, while a
CUDA graph is captured, whatever would wait for the device. A capture computes nothing, and its
replays run what it recorded on the memory it saw. What this cannot show: what a compiler makes of
a kernel, and time.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

from torch.utils.cpp_extension import load

from .faults import DeviceFault, counts

__all__ = ["DeviceFault", "counts"]

host = load("pretend_device", [str(Path(__file__).parent / "device.cpp")], extra_cflags=["-O1"])

from . import ops, runtime, triton_launch  # noqa: E402, F401  (they change torch and triton)
