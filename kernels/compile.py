"""Compile Triton kernels for GPUs that are not here, and report what the machine code holds.

Triton and its wheel carry everything from source to machine code, so no GPU is needed. What is
launched is recorded from the launchers (`examples`), and the tests compile it for Ampere, Hopper
and Blackwell; `Report.problems` says what must not be.
``python -m sparse_tickets.kernels.compile 90 linear`` prints one JSON line per case. Reports are
kept under the user's cache directory, by the source of the kernel and all that goes into it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .caching import cache_folder
from .dispatch import interpreting
from .examples import CompileCase, record
from .jit import options_of
from .machine_code import (
    CAPABILITIES,
    Occupancy,
    matrix_instructions,
    occupancy,
    registers_and_stack,
    spilled_bytes,
)

# To be raised when `Report` or what it is read from changes: older cache entries then do not count.
_LAYOUT = 1


class CompileError(RuntimeError):
    """A kernel does not compile; the message names the case and carries the compiler's words."""


@dataclass(frozen=True)
class Report:
    """What the compiler and the assembler made of a kernel.

    Attributes:
        op: folder of the op, or ``""``.
        case: name of the case, or of the kernel.
        capability: compute capability, e.g. 90.
        warps: per program.
        registers: per thread.
        spills: bytes of spill stores and loads per thread.
        stack: bytes of stack per thread; also holds arrays that are not spills.
        shared: bytes of shared memory per program.
        tensor_memory: columns of Blackwell's tensor memory per program.
        dots: what the kernel's ``tl.dot`` multiply: ``bf16``, ``fp64``, or for float32 the
            precision: ``ieee``, ``tf32``, ``tf32x3``...
        matrix: tensor-core instructions in the machine code, e.g. ``HMMA``, ``HGMMA``.
    """

    op: str
    case: str
    capability: int
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    tensor_memory: int
    dots: tuple[str, ...]
    matrix: tuple[str, ...]

    @property
    def occupancy(self) -> Occupancy:
        """How many programs fit on a multiprocessor."""
        return occupancy(
            self.capability, self.warps, self.registers, self.shared, self.tensor_memory
        )

    @property
    def needs_matrix(self) -> bool:
        """Whether a dot must use tensor cores: IEEE float32 cannot, float64 may not."""
        return any(dot not in ("ieee", "fp64") for dot in self.dots)

    @property
    def problems(self) -> list[str]:
        """What must not be in a shipped configuration; empty if all is well."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes of registers")
        if self.needs_matrix and not self.matrix:
            found.append(f"multiplies {', '.join(self.dots)} without tensor cores")
        if self.matrix and set(self.dots) == {"ieee"}:
            found.append(f"rounds IEEE float32 for {', '.join(self.matrix)}")
        if not self.occupancy.programs:
            found.append(f"does not fit: too much of {self.occupancy.limit}")
        return found


def cross_compile(
    kernel: Any,
    signature: dict[str, Any],
    constexprs: dict[str, Any],
    capability: int,
    **options: Any,
) -> Report:
    """Compile a `jit_kernel` for a compute capability; needs no GPU.

    Args:
        kernel: the decorated function.
        signature: see `CompileCase`.
        constexprs: see `CompileCase`.
        capability: e.g. 80, 90, 100.
        **options: see `CompileCase`; `jit_kernel` said the rest.

    Raises:
        RuntimeError: Triton was imported for the interpreter; see `compile_ops`.
        TypeError: the kernel is decorated with something else.
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
    options = options_of(kernel) | options
    types = dict.fromkeys(constexprs, "constexpr") | signature
    types = {name: types[name] for name in kernel.arg_names}
    divisible = {
        path: [["tt.divisibility", 16]]
        for path, kind in _entries(tuple(types.values()))
        if kind.endswith(":16")
    }
    source = ASTSource(kernel, _plain(types), constexprs, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    dots = _dots(compiled.asm["ttir"])
    return Report(
        op="",
        case=kernel.__name__,
        capability=capability,
        warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spilled_bytes(compiled.asm["ptx"], capability) if stack else 0,
        stack=stack,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        dots=dots,
        matrix=matrix_instructions(compiled.asm["cubin"]) if dots else (),
    )


def compile_ops(
    ops: Sequence[str],
    capabilities: Sequence[int] = CAPABILITIES,
    *,
    smoke: bool = False,
    on_report: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Compile the cases of these ops, in as many processes as there are cores.

    Their environment is this one without ``TRITON_INTERPRET``. Reports of earlier calls are used
    again as long as nothing that goes into them changed.

    Args:
        ops: folders under ``kernels/``, e.g. ``["linear"]``.
        capabilities: compute capabilities to compile for.
        smoke: only some of each kernel; see `cases`.
        on_report: called with each report as it comes, from any thread.

    Returns:
        One report per case and capability, in this order.

    Raises:
        CompileError: a case does not compile; the message names it and carries the compiler's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shares = os.cpu_count() or 1
    targets = ",".join(map(str, capabilities))

    def run(share: int) -> list[Report]:
        command = [sys.executable, "-m", "sparse_tickets.kernels.compile", targets, *ops]
        command += ["--share", f"{share}/{shares}", *(["--smoke"] if smoke else [])]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            reports = []
            with process:
                for line in process.stdout or ():
                    reports.append(_report(json.loads(line)))
                    if on_report is not None:
                        on_report(reports[-1])
            if process.returncode:
                errors.seek(0)
                raise CompileError(f"kernels do not compile for {targets}:\n{errors.read()}")
        return reports

    with ThreadPoolExecutor(shares) as pool:
        parts = list(pool.map(run, range(shares)))
    # Dealt out in turn, and so collected.
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


def ops_with_kernels() -> list[str]:
    """Folders under ``kernels/`` that hold a ``gpu.py`` or ``*_gpu.py``."""
    return sorted({path.parent.name for path in _gpu_files("*")})


def cases(op: str, *, smoke: bool = False) -> list[CompileCase]:
    """The cases of an op.

    Args:
        op: its folder.
        smoke: only the first case of a kernel for each combination of named choices, with tensor
            cores (tf32 or halves) and without; float64 and tf32x3 only in kernels that know
            nothing else.
    """
    modules = (
        importlib.import_module(f"sparse_tickets.kernels.{op}.{path.stem}")
        for path in _gpu_files(op)
    )
    # One module may list another's examples among its own.
    examples = [example for module in modules for example in getattr(module, "EXAMPLES", ())]
    found = list(record({id(example): example for example in examples}.values(), op))
    if not smoke:
        return found
    first: dict[tuple[object, ...], CompileCase] = {}
    # Sorting is stable: what is seldom used comes last, and counts where its kernel has no other.
    for case in sorted(found, key=_is_seldom):
        if not _is_seldom(case) or all(case.kernel is not other.kernel for other in first.values()):
            first.setdefault(_kind(case), case)
    chosen = {case.name for case in first.values()}
    return [case for case in found if case.name in chosen]


def _gpu_files(op: str) -> list[Path]:
    return sorted(
        path
        for path in Path(__file__).parent.glob(f"{op}/*gpu.py")
        if path.stem.split("_")[-1] == "gpu"
    )


def _kind(case: CompileCase) -> tuple[object, ...]:
    """What makes a case unlike another of its kernel, sizes apart."""
    constants = tuple(case.constexprs.values())
    choices = {value for _, value in _entries(constants) if isinstance(value, str)}
    types = " ".join(kind for _, kind in _entries(tuple(case.signature.values())))
    matrix = "tf32" in choices or "*fp16" in types or "*bf16" in types
    return case.kernel, matrix, frozenset(choices - {"ieee", "tf32"})


def _is_seldom(case: CompileCase) -> bool:
    return "tf32x3" in case.constexprs.values() or any(
        "fp64" in kind for _, kind in _entries(tuple(case.signature.values()))
    )


def _entries(values: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """What stands in tuples within tuples, and where."""
    if not isinstance(values, tuple):
        yield path, values
        return
    for place, entry in enumerate(values):
        yield from _entries(entry, (*path, place))


def _plain(types: Any) -> Any:
    """The same without what is known to be a multiple of 16."""
    if isinstance(types, str):
        return types.removesuffix(":16")
    if isinstance(types, dict):
        return {name: _plain(entry) for name, entry in types.items()}
    entries = [_plain(entry) for entry in types]
    return type(types)._make(entries) if hasattr(types, "_make") else tuple(entries)


def _dots(ttir: str) -> tuple[str, ...]:
    """What the dots of a kernel in Triton's first representation multiply."""
    kinds = set()
    for attributes, operand in re.findall(
        r"tt\.dot(?:_scaled)? ([^:\n]*): tensor<[\dx]*x(\w+)", ttir
    ):
        precision = re.search(r"inputPrecision = (\w+)", attributes)
        if operand == "f32":
            kinds.add(precision[1] if precision else "ieee")
        else:
            kinds.add(re.sub(r"^f(?=\d)", "fp", operand))
    return tuple(sorted(kinds))


def _compile_case(op: str, case: CompileCase, capability: int) -> Report:
    """Of the cache, if nothing changed since."""
    path = cache_folder() / "kernels" / f"{_key(case, capability)}.json"
    report = _read(path)
    if report is None:
        try:
            report = cross_compile(
                case.kernel, case.signature, case.constexprs, capability, **case.options
            )
        except Exception as error:
            error.add_note(f"in case {case.name!r} of {op!r} for sm_{capability}")
            raise
        _write(path, report)
    return replace(report, op=op, case=case.name)


def _key(case: CompileCase, capability: int) -> str:
    """A name for everything that goes into a report."""
    import triton

    def plain(value: Any) -> str:
        # Another kernel as a constexpr: its source counts, and that of all it calls.
        return getattr(value, "cache_key", None) or repr(value)

    constexprs = {name: plain(value) for name, value in case.constexprs.items()}
    parts = [_LAYOUT, triton.__version__, capability, case.kernel.cache_key]
    parts += [case.signature, constexprs, options_of(case.kernel) | case.options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _report(values: dict[str, Any]) -> Report:
    """Of `asdict`'s values once they were JSON, which knows no tuples."""
    return Report(**values | {name: tuple(values[name]) for name in ("dots", "matrix")})


def _read(path: Path) -> Report | None:
    """None if there is no such report, or none that can be read."""
    try:
        return _report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, report: Report) -> None:
    """Whole or not at all; a cache that cannot be written is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(asdict(report), file)
        os.replace(file.name, path)
    except OSError:
        return


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("capabilities", help="90 for Hopper, or several: 80,90,100")
    parser.add_argument("ops", nargs="+", choices=ops_with_kernels())
    parser.add_argument("--smoke", action="store_true", help="a few cases per kernel")
    parser.add_argument("--share", default="0/1", help="1/3: the second of three equal parts")
    arguments = parser.parse_args()
    first, shares = map(int, arguments.share.split("/"))
    wanted = [
        (op, case, int(capability))
        for op in arguments.ops
        for case in cases(op, smoke=arguments.smoke)
        for capability in arguments.capabilities.split(",")
    ]
    for item in wanted[first::shares]:
        print(json.dumps(asdict(_compile_case(*item))), flush=True)


if __name__ == "__main__":
    _main()
