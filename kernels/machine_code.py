"""What a compiled kernel says of itself: registers, spills, matrix instructions; how many fit.

Read with the tools of CUDA that Triton's wheel carries, so no GPU and no CUDA toolkit is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple


class _Multiprocessor(NamedTuple):
    """What the programs resident on one multiprocessor share."""

    name: str
    warps: int
    programs: int
    registers: int
    shared: int
    tensor_memory: int


# From CUDA's table of compute capabilities; shared memory in bytes, tensor memory in columns.
_MULTIPROCESSORS = {
    80: _Multiprocessor("Ampere", 64, 32, 65536, 164 * 1024, 0),
    90: _Multiprocessor("Hopper", 64, 32, 65536, 228 * 1024, 0),
    100: _Multiprocessor("Blackwell", 64, 32, 65536, 228 * 1024, 512),
}
CAPABILITIES = tuple(_MULTIPROCESSORS)
"""Compute capabilities every kernel compiles for: Ampere, Hopper, Blackwell (data centre)."""

_WARP = 32
# Registers are handed out to a warp in units of 256, from the four schedulers' own files.
_REGISTER_UNIT, _SCHEDULERS = 256, 4
# Shared memory comes in units of 128 bytes, and the system takes 1 KB of every program.
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024

# HMMA, IMMA, DMMA and QMMA of a warp, HGMMA and its like of a warp group, UTCHMMA and its like of
# Blackwell's tensor memory. An instruction stands behind its address and perhaps a predicate.
_MATRIX = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[\dT]\s+)?((?:UTC)?[A-Z]{1,2}MMA)\b", re.M)


class Occupancy(NamedTuple):
    """How many programs of a kernel one multiprocessor holds at once.

    Attributes:
        programs: at most; 0 if not even one fits, and the launch would fail.
        share: of the warps that the multiprocessor has room for.
        limit: what runs out first: ``warps``, ``programs``, ``registers``, ``shared`` or
            ``tensor memory``.
    """

    programs: int
    share: float
    limit: str


def occupancy(
    capability: int, warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> Occupancy:
    """The bound that a kernel's resources set, by CUDA's own rules.

    Args:
        capability: one of `CAPABILITIES`.
        warps: per program.
        registers: per thread.
        shared: bytes of shared memory per program.
        tensor_memory: columns of tensor memory per program.

    Raises:
        ValueError: the capability is not among `CAPABILITIES`, or there are no warps or registers.
    """
    if capability not in _MULTIPROCESSORS:
        raise ValueError(f"capability must be one of {CAPABILITIES}, got {capability}")
    if warps < 1 or registers < 1:
        raise ValueError(
            f"warps and registers must be at least 1, got warps={warps}, registers={registers}"
        )
    chip = _MULTIPROCESSORS[capability]
    per_warp = _round_up(registers * _WARP, _REGISTER_UNIT)
    warps_with_registers = chip.registers // _SCHEDULERS // per_warp * _SCHEDULERS
    bounds = {
        "warps": chip.warps // warps,
        "programs": chip.programs,
        "registers": warps_with_registers // warps,
        "shared": chip.shared // _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT),
    }
    if tensor_memory:
        bounds["tensor memory"] = chip.tensor_memory // tensor_memory
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps / chip.warps, limit)


def matrix_instructions(cubin: bytes) -> tuple[str, ...]:
    """Names of the tensor-core instructions in the machine code, e.g. ``("HGMMA",)``."""
    from triton import knobs

    text = _run_on(cubin, ".cubin", [knobs.nvidia.nvdisasm.path, "-c"])
    return tuple(sorted(set(_MATRIX.findall(text))))


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    from triton import knobs

    text = _run_on(cubin, ".cubin", [knobs.nvidia.cuobjdump.path, "-res-usage"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{text}")
    return int(found[1]), int(found[2])


def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes of spill stores and loads per thread: a stack alone may be an array, as in ``sin``."""
    # Of the assemblers in Triton's wheel each reads some versions of PTX: its own choice counts.
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    if target is None:
        raise RuntimeError("the PTX names no target")
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", "-o", os.devnull]
    text = _run_on(ptx.encode(), ".ptx", command)
    return sum(map(int, re.findall(r"(\d+) bytes spill", text)))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _run_on(content: bytes, suffix: str, command: Sequence[str]) -> str:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True)
    if done.returncode:
        words = (done.stdout + done.stderr).strip()
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{words}")
    return done.stdout + done.stderr
