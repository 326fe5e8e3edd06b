"""Every Triton kernel compiles for every supported GPU generation, and as it should.

Continuous integration compiles for Hopper a few cases of every kernel, with tensor cores and
without; `pytest -m slow` compiles every shipped configuration for every generation, and with
``-k sm_80`` for one.
"""

import ast
import json
from dataclasses import asdict, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_tickets.kernels import compile as compiling
from sparse_tickets.kernels.compile import (
    CompileError,
    Report,
    cases,
    compile_ops,
    cross_compile,
    ops_with_kernels,
)
from sparse_tickets.kernels.examples import CompileCase
from sparse_tickets.kernels.machine_code import CAPABILITIES, occupancy, spilled_bytes

pytest.importorskip("triton")


_seen: dict[tuple[bool, int], list[tuple[str, str]]] = {}


@cache
def _reports(smoke: bool, capability: int) -> dict[tuple[str, str], Report]:
    """Of all ops at once: starting Python and Triton costs more than compiling a kernel."""
    seen = _seen[smoke, capability] = []

    def see(report: Report) -> None:
        seen.append((report.op, report.case))

    reports = compile_ops(ops_with_kernels(), [capability], smoke=smoke, on_report=see)
    return {(report.op, report.case): report for report in reports}


def _names(smoke: bool) -> list[tuple[str, str]]:
    return [(op, case.name) for op in ops_with_kernels() for case in cases(op, smoke=smoke)]


@pytest.mark.long
@pytest.mark.parametrize(("op", "case"), _names(smoke=True))
def test_compiles_well_for_hopper(op: str, case: str) -> None:
    _check(_reports(True, 90)[op, case])


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize(("op", "case"), _names(smoke=False))
def test_compiles_well_everywhere(op: str, case: str, capability: int) -> None:
    _check(_reports(False, capability)[op, case])


def _check(report: Report) -> None:
    assert report.problems == []
    assert 0 < report.registers <= 255


def test_case_names_are_unique() -> None:
    names = _names(smoke=False)
    assert len(set(names)) == len(names)


@cache
def _compiled(smoke: bool) -> set[str]:
    """Every kernel of a case, of any op: a frame's are compiled with the heads of others."""
    every = [case.kernel.fn for op in ops_with_kernels() for case in cases(op, smoke=smoke)]
    return {f"{function.__module__}.{function.__name__}" for function in every}


@pytest.mark.parametrize("op", ops_with_kernels())
def test_every_kernel_is_among_those_always_compiled(op: str) -> None:
    launched = {
        f"sparse_tickets.kernels.{op}.{path.stem}.{node.name}"
        for path in compiling._gpu_files(op)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")
    }
    for smoke in (False, True):
        compiled = {name for name in _compiled(smoke) if f".kernels.{op}." in name}
        assert compiled == launched


@pytest.mark.parametrize("op", ["ppo", "imitation", "dqn"])
def test_every_head_is_compiled_in_registers_and_in_memory(op: str) -> None:
    kernels = {case.kernel.fn.__name__ for case in cases(op, smoke=True)}
    assert kernels == {"gradient_kernel", "loss_kernel"}


def test_types_within_tuples_are_those_of_the_launch() -> None:
    (case, *_) = [case for case in cases("ppo") if case.name.startswith("gradient_4_64")]
    assert case.signature["data"].action == "*i64:16"
    assert case.signature["numbers"] == ("fp32", "fp32", "fp32")


def test_one_case_per_kernel_with_tensor_cores_and_one_without_is_always_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def case(name: str, number: str, precision: str, block: int) -> CompileCase:
        constexprs = {"PRECISION": precision, "BLOCK": block}
        return CompileCase(name, "kernel", {"x": f"*{number}:16", "n": "i32"}, constexprs, {})

    shipped = [
        case("first", "fp32", "ieee", 16),
        case("larger", "fp32", "ieee", 64),
        case("tf32", "fp32", "tf32", 64),
        case("bf16", "bf16", "ieee", 64),
        case("seldom", "fp64", "ieee", 64),
        case("x3", "fp32", "tf32x3", 64),
        case("alone", "fp64", "ieee", 64)._replace(kernel="double"),
    ]
    monkeypatch.setattr(compiling, "_gpu_files", lambda op: [])
    monkeypatch.setattr(compiling, "record", lambda examples, op: iter(shipped))
    assert cases("op") == shipped
    assert [c.name for c in cases("op", smoke=True)] == ["first", "tf32", "alone"]


@pytest.fixture
def report() -> Report:
    return Report("op", "case", 90, 4, 64, 0, 0, 49152, 0, ("tf32",), ("HGMMA",))


def test_spills_wrong_units_and_what_does_not_fit_are_problems(report: Report) -> None:
    assert report.problems == []
    assert replace(report, spills=8).problems == ["spills 8 bytes of registers"]
    assert replace(report, matrix=()).problems == ["multiplies tf32 without tensor cores"]
    assert replace(report, matrix=(), dots=("ieee",)).problems == []
    assert replace(report, dots=("ieee",)).problems == ["rounds IEEE float32 for HGMMA"]
    assert replace(report, matrix=("DMMA",), dots=("fp64",)).problems == []
    assert replace(report, matrix=(), dots=("fp64",)).problems == []
    assert replace(report, matrix=(), dots=("bf16",)).problems
    assert replace(report, shared=228 * 1024).problems == ["does not fit: too much of shared"]


@pytest.mark.parametrize(
    ("resources", "programs", "limit"),
    [
        # By CUDA's occupancy calculator.
        ((80, 4, 32, 0), 16, "warps"),
        ((90, 1, 16, 0), 32, "programs"),
        ((80, 4, 33, 0), 12, "registers"),
        ((90, 8, 128, 0), 2, "registers"),
        ((90, 4, 255, 0), 2, "registers"),
        ((80, 4, 32, 48 * 1024), 3, "shared"),
        ((90, 4, 32, 48 * 1024), 4, "shared"),
        ((90, 4, 32, 227 * 1024), 1, "shared"),
        ((80, 4, 32, 164 * 1024), 0, "shared"),
        ((100, 4, 32, 0, 256), 2, "tensor memory"),
    ],
)
def test_occupancy(resources: tuple[int, ...], programs: int, limit: str) -> None:
    found = occupancy(*resources)
    assert (found.programs, found.limit) == (programs, limit)
    assert found.share == programs * resources[1] / 64


def test_occupancy_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"capability must be one of \(80, 90, 100\), got 75"):
        occupancy(75, 4, 32, 0)
    with pytest.raises(ValueError, match="at least 1, got warps=0"):
        occupancy(80, 0, 32, 0)


def test_reports_are_kept_until_something_changes(
    report: Report, tmp_path: compiling.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def fake(*arguments: object, **options: object) -> Report:
        calls.append(arguments)
        return report

    monkeypatch.setattr(compiling, "cross_compile", fake)

    def kernel(source: str, fp_fusion: bool = True) -> Any:
        run = partial(print, enable_fp_fusion=fp_fusion)
        return SimpleNamespace(cache_key=source, run=run)

    case = CompileCase("case", kernel("source"), {"x": "*fp32"}, {"BLOCK": 16}, {})
    for _ in range(2):
        assert compiling._compile_case("op", case, 90) == report
    assert len(calls) == 1

    helper = type("Helper", (), {"cache_key": "another kernel's source"})
    changes = [
        case._replace(kernel=kernel("changed")),
        case._replace(kernel=kernel("source", fp_fusion=False)),
        case._replace(signature={"x": "*fp16"}),
        case._replace(constexprs={"BLOCK": 32}),
        case._replace(constexprs={"BLOCK": helper}),
        case._replace(options={"num_warps": 8}),
    ]
    for changed in changes:
        compiling._compile_case("op", changed, 90)
    compiling._compile_case("op", case, 80)
    assert len(calls) == 1 + len(changes) + 1

    for file in (tmp_path / "sparse_tickets" / "kernels").iterdir():
        assert json.loads(file.read_text()) == json.loads(json.dumps(asdict(report)))
        file.write_text("{")
    compiling._compile_case("op", case, 90)
    assert len(calls) == 1 + len(changes) + 2


def test_a_cache_that_cannot_be_written_does_no_harm(
    report: Report, tmp_path: compiling.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path / "file"))
    monkeypatch.setattr(compiling, "cross_compile", lambda *_, **__: report)
    kernel = SimpleNamespace(cache_key="", run=partial(print))
    case = CompileCase("case", kernel, {}, {}, {})
    with pytest.warns(RuntimeWarning, match="is not kept"):
        assert compiling._compile_case("op", case, 90) == report


@pytest.mark.long
def test_reports_come_in_order_of_the_cases() -> None:
    names = _names(smoke=True)
    assert list(_reports(True, 90)) == names
    assert sorted(_seen[True, 90]) == sorted(names)


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        cross_compile(None, {}, {}, 90)


@pytest.mark.long
def test_unknown_op_is_reported() -> None:
    with pytest.raises(CompileError, match="invalid choice"):
        compile_ops(["nothing"], [90])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_assembler_reads_what_triton_writes_and_says_what_it_cannot(capability: int) -> None:
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

    version = ptx_get_version(get_ptxas(capability).version)
    ptx = f".version {version // 10}.{version % 10}\n.target sm_{capability}\n.address_size 64\n"
    assert spilled_bytes(ptx, capability) == 0
    with pytest.raises(RuntimeError, match=r"(?s)ptxas.* ended with \d+:\n.*Unsupported \.version"):
        spilled_bytes(ptx.replace(f".version {version // 10}", ".version 99"), capability)
