"""`sparse-tickets inspect`: the table, the JSON, what it refuses and what fails."""

import json

import pytest
from rich.console import Console

from sparse_tickets import inspect as inspecting
from sparse_tickets.cli import main
from sparse_tickets.inspect import inspect, inspect_table, plain
from sparse_tickets.kernels.compile import CompileError, Report

pytest.importorskip("triton")

GOOD = Report("linear", "forward", 90, 4, 64, 0, 0, 49152, 0, ("tf32",), ("HGMMA",))
NO_DOT = Report("prune", "prune", 80, 4, 40, 0, 0, 0, 0, (), ())
SPILLED = Report("mlp", "backward", 100, 4, 255, 24, 24, 0, 0, ("bf16",), ())


@pytest.fixture
def compiled(monkeypatch):
    """What was asked of the compiler, which answers with `reports`."""
    asked = {"reports": [GOOD, NO_DOT]}

    def fake(ops, capabilities, *, smoke, on_report):
        asked.update(ops=ops, capabilities=capabilities, smoke=smoke)
        for report in asked["reports"]:
            if on_report is not None:
                on_report(report)
        return asked["reports"]

    monkeypatch.setattr(inspecting, "compile_ops", fake)
    return asked


def rendered(reports):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(inspect_table(reports))
    return capture.get()


def test_everything_by_default_but_one_case_per_kernel_and_type(compiled):
    inspect()
    assert "linear" in compiled["ops"]
    assert compiled["capabilities"] == [80, 90, 100]
    assert compiled["smoke"]


def test_the_choice_is_passed_on(compiled):
    inspect(["prune"], [90], everything=True)
    assert (compiled["ops"], compiled["capabilities"], compiled["smoke"]) == (
        ["prune"],
        [90],
        False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((["nothing"],), "op must be one of .*linear.*got nothing"), (((), [70]), "arch .*got 70")],
)
def test_unknown_choices_are_refused(compiled, arguments, message):
    with pytest.raises(ValueError, match=message):
        inspect(*arguments)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(inspecting, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the triton package"):
        inspect()


def test_the_table_names_instructions_and_problems():
    good = rendered([GOOD, NO_DOT])
    assert "HGMMA" in good
    assert "25% shared" in good
    assert "2 configurations, no problems" in good
    bad = rendered([GOOD, SPILLED])
    assert "sm_100 mlp/backward: spills 24 bytes of registers" in bad
    assert "sm_100 mlp/backward: multiplies bf16 without tensor cores" in bad
    assert "no problems" not in bad


def test_a_case_in_brackets_is_no_markup():
    bracketed = Report("mlp", "[red] tile [16]", 100, 4, 255, 24, 24, 0, 0, ("bf16",), ())
    shown = " ".join(rendered([bracketed]).split())
    assert "mlp [red] tile [16]" in shown
    assert "mlp/[red] tile [16]: spills" in shown


def test_data_holds_what_follows_from_the_report():
    (data,) = plain([GOOD])
    assert data["occupancy"] == {"programs": 4, "share": 0.25, "limit": "shared"}
    assert data["problems"] == []
    assert data["registers"] == 64


def test_the_command_prints_and_returns_whether_all_is_well(compiled, capsys):
    assert main(["inspect", "--op", "linear", "prune", "--arch", "90"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert (compiled["ops"], compiled["capabilities"]) == (["linear", "prune"], [90])
    compiled["reports"] = [SPILLED]
    assert main(["inspect", "--json", "--all"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["problems"]
    assert not compiled["smoke"]


def test_a_kernel_that_does_not_compile_is_an_error_not_a_traceback(monkeypatch, capsys):
    def fail(*_, **__):
        raise CompileError("kernels do not compile for 90:\nin case 'forward'")

    monkeypatch.setattr(inspecting, "compile_ops", fail)
    assert main(["inspect"]) == 1
    assert "in case 'forward'" in capsys.readouterr().err
