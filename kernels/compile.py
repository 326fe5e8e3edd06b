"""Compile Triton kernels for GPUs that are not here, and report registers, spills and memory.

Triton and its wheel carry everything from source to cubin, so no GPU is needed. Each ``gpu.py``
lists what it would launch in ``COMPILE_CASES``, and the tests compile every case for Ampere,
Hopper and Blackwell and fail on spills::

    COMPILE_CASES = [
        Case(
            "forward_fp16",                                     # unique within the module
            _forward_kernel,                                    # the @triton.jit function
            {"x": "*fp16:16", "y": "*fp16:16", "rows": "i32"},  # every runtime argument
            {"BLOCK": 64},                                      # every tl.constexpr argument
            {"num_warps": 4, "num_stages": 3},                  # launch options
        ),
    ]

A type ends in ``:16`` where the launch will see a multiple of 16 (pointers from torch's allocator
are; sizes only if the shape says so); an argument that is None at launch is a constexpr None.
``python -m sparse_tickets.kernels.compile 90 linear`` prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sparse_tickets.kernels.dispatch import interpreting

__all__ = ["CAPABILITIES", "Case", "Report", "compile_ops", "cross_compile", "ops_with_kernels"]

CAPABILITIES = (80, 90, 100)
"""Compute capabilities every kernel compiles for: Ampere, Hopper, Blackwell (data centre)."""

_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


class Case(NamedTuple):
    """One launch of a kernel, as far as the compiler needs to know it.

    Attributes:
        name: unique within its module.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of every runtime argument, e.g. ``"*fp32:16"``, ``"i32"``.
        constexprs: value of every ``tl.constexpr`` argument.
        options: launch options, e.g. ``{"num_warps": 4, "num_stages": 3}``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the assembler made of a kernel.

    Attributes:
        op: folder of the op, or ``""``.
        case: name of the case, or of the kernel.
        capability: compute capability, e.g. 90.
        registers: per thread.
        spills: bytes of spill stores and loads per thread.
        stack: bytes of stack per thread; also holds arrays that are not spills.
        shared: bytes of shared memory per program.
        has_mma: whether it uses tensor cores.
    """

    op: str
    case: str
    capability: int
    registers: int
    spills: int
    stack: int
    shared: int
    has_mma: bool


def cross_compile(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    **options: Any,
) -> Report:
    """Compile a ``@triton.jit`` function for a compute capability; needs no GPU.

    Args:
        kernel: the decorated function.
        signature: see `Case`.
        constexprs: see `Case`.
        capability: e.g. 80, 90, 100.
        **options: see `Case`.

    Raises:
        RuntimeError: Triton was imported for the interpreter; see `compile_ops`.
        ValueError: `signature` and `constexprs` together do not name every argument once.
    """
    if interpreting():
        raise RuntimeError(
            "cross_compile needs Triton imported without TRITON_INTERPRET=1 (its own library is "
            "interpreted too); compile_ops runs in a process of its own"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = sorted([*signature, *constexprs])
    if named != sorted(kernel.arg_names):
        raise ValueError(
            f"signature and constexprs must name each of {kernel.arg_names} once, got {named}"
        )
    types = dict.fromkeys(constexprs, "constexpr")
    types |= {name: kind.removesuffix(":16") for name, kind in signature.items()}
    divisible = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(
        kernel, {name: types[name] for name in kernel.arg_names}, constexprs, divisible
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Report(
        op="",
        case=kernel.__name__,
        capability=capability,
        registers=registers,
        spills=_spills(ptx, capability) if stack else 0,
        stack=stack,
        shared=compiled.metadata.shared,
        has_mma=any(instruction in ptx for instruction in _TENSOR_CORE),
    )


def compile_ops(ops: Sequence[str], capabilities: Sequence[int] = CAPABILITIES) -> list[Report]:
    """Compile every case of these ops' ``gpu.py``, in one process per capability.

    Their environment is this one without ``TRITON_INTERPRET``.

    Args:
        ops: folders under ``kernels/``, e.g. ``["linear"]``.
        capabilities: compute capabilities to compile for.

    Returns:
        One report per case and capability.

    Raises:
        RuntimeError: a case does not compile; the message names it and carries the compiler's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(capability: int) -> list[Report]:
        done = subprocess.run(
            [sys.executable, "-m", "sparse_tickets.kernels.compile", f"{capability}", *ops],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kernels do not compile for sm_{capability}:\n{done.stderr}")
        return [Report(**json.loads(line)) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        return [report for reports in pool.map(run, capabilities) for report in reports]


def ops_with_kernels() -> list[str]:
    """Folders under ``kernels/`` that hold a ``gpu.py``."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/gpu.py"))


def _compile_cases(op: str, capability: int) -> Iterator[Report]:
    module = importlib.import_module(f"sparse_tickets.kernels.{op}.gpu")
    for name, kernel, signature, constexprs, options in module.COMPILE_CASES:
        try:
            report = cross_compile(kernel, signature, constexprs, capability, **options)
        except Exception as error:
            error.add_note(f"in case {name!r} of {op!r}")
            raise
        yield replace(report, op=op, case=name)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as the cubin itself says."""
    from triton import knobs

    text = _run_on(cubin, ".cubin", [knobs.nvidia.cuobjdump.path, "-res-usage"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{text}")
    return int(found[1]), int(found[2])


def _spills(ptx: str, capability: int) -> int:
    """Bytes of spill stores and loads per thread: a stack alone may be an array, as in ``sin``."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    target = re.search(r"\.target (\w+)", ptx)
    if target is None:
        raise RuntimeError("the PTX names no target")
    command = [tool.path, "-v", f"--gpu-name={target[1]}", "-o", os.devnull]
    text = _run_on(ptx.encode(), ".ptx", command)
    return sum(map(int, re.findall(r"(\d+) bytes spill", text)))


def _run_on(content: bytes, suffix: str, command: list[str]) -> str:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, help="e.g. 90 for Hopper")
    parser.add_argument("ops", nargs="+", choices=ops_with_kernels())
    arguments = parser.parse_args()
    for op in arguments.ops:
        for report in _compile_cases(op, arguments.capability):
            print(json.dumps(asdict(report)), flush=True)
