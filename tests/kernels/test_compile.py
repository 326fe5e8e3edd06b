"""Every Triton kernel compiles for every supported GPU generation, without spilling registers."""

from functools import cache
from importlib import import_module

import pytest

from sparse_tickets.kernels.compile import (
    CAPABILITIES,
    Case,
    Report,
    compile_ops,
    cross_compile,
    ops_with_kernels,
)

pytest.importorskip("triton")


@cache
def _reports() -> dict[tuple[str, str, int], Report]:
    """Of all ops at once: starting Python and Triton costs more than compiling a kernel."""
    reports = compile_ops(ops_with_kernels())
    return {(report.op, report.case, report.capability): report for report in reports}


def _cases() -> list[tuple[str, str]]:
    modules = {op: import_module(f"sparse_tickets.kernels.{op}.gpu") for op in ops_with_kernels()}
    return [
        (op, Case(*case).name) for op, module in modules.items() for case in module.COMPILE_CASES
    ]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("op", "case"), _cases())
def test_compiles_without_spills(op: str, case: str, capability: int) -> None:
    report = _reports()[op, case, capability]
    assert report.spills == 0
    assert 0 < report.registers <= 255


def test_case_names_are_unique() -> None:
    cases = _cases()
    assert len(set(cases)) == len(cases)


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        cross_compile(None, {}, {}, 90)


def test_unknown_op_is_reported() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        compile_ops(["nothing"], [90])
