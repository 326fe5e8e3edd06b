"""What `benchmarks.gpu` found, as tables: targets with rooflines, the sweep, tests and tuning.

``parts`` of a run holds, as far as they were run, ``tests``, ``tune``, ``table`` and ``sweep``,
each with ``seconds``; with ``stopped`` if it did not end well, ``accidents`` if it had to be begun
anew, and ``unfinished`` if the time was up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..cases import is_ours
from ..measure import Record
from ..results import SuiteRun
from ..tables import Table, duration, speedup_of, time_of
from .sweep import ASKED_S


def gpu_tables(run: SuiteRun) -> list[Table]:
    """Every part of a run that there is something to show of."""
    made = (_targets(run), _sweep(run), _tests(run), _tune(run))
    return [table for table in made if table is not None]


def summary(run: SuiteRun) -> list[str]:
    """A few lines: what ran, what did not, and how far the rows came."""
    lines = []
    said: dict[str, Callable[[dict[str, Any]], str]] = {
        "tests": _say_tests,
        "tune": _say_tune,
        "table": lambda part: _say_table(part, run.records),
        "sweep": _say_sweep,
    }
    for name, part in run.parts.items():
        line = f"{name}: {said[name](part)} in {part.get('seconds', 0.0):.0f} s"
        lines.append("; ".join([line, *part.get("accidents", []), *_of(part, "stopped")]))
    if run.refused:
        lines.append(f"refused, results being wrong: {', '.join(r.label for r in run.refused)}")
    return lines


def _of(part: dict[str, Any], name: str) -> list[str]:
    return [part[name]] if part.get(name) else []


def _targets(run: SuiteRun) -> Table | None:
    part = run.parts.get("table")
    if part is None or not (run.records or part.get("failed")):
        return None
    columns = ["configuration", "time", "vs best peer", "asked"]
    columns += ["with launches", "cold", "vs our dense", "of bound"]
    table = Table("Targets on a GPU: replayed from CUDA graphs unless said otherwise", columns)
    for record in run.records:
        kind, bound = _kind(record), run.bound(record)
        seconds = time_of(record, kind).median
        own = next((x for name, x in speedup_of(record, kind).items() if is_ours(name)), None)
        table.rows.append(
            [
                record.label,
                duration(seconds),
                _over(record, kind, name=True),
                "-" if record.asked is None else f"{record.asked:g}x",
                _over(record, "wall"),
                _over(record, "cold"),
                "-" if own is None else f"{own.median:.2f}x",
                "-" if bound is None else f"{bound / seconds:.0%}",
            ]
        )
    rates = ", ".join(f"{name} {x.median / 1e12:.0f}" for name, x in run.products.items())
    table.notes += [
        "Best peer: the fastest of plain torch, with or without torch.compile, in the same kind of "
        "timing and the same precision; one that cannot be captured by its direct calls. Over our "
        "dense: what sparsity alone gains.",
        "With launches: calls one after another from Python. Cold: a replay after L2 was emptied.",
        f"Bound: this run's large products ({rates} TFLOP/s), or its copy of as many bytes.",
    ]
    table.notes += [f"Failed - {name}: {why}." for name, why in part.get("failed", {}).items()]
    left_out = part.get("left_out", ())
    table.notes += [f"Not measured, the time was up - {name}." for name in left_out]
    return table


def _kind(record: Record) -> str:
    """Replayed if the subject could be captured."""
    return "wall" if time_of(record, "replay") is None else "replay"


def _best(record: Record, kind: str) -> tuple[float, str] | None:
    """Our speed-up over the strongest peer that is not our own."""
    speedup = speedup_of(record, kind)
    others = [(x.median, name) for name, x in speedup.items() if not is_ours(name)]
    return min(others, default=None)


def _is_met(record: Record) -> bool:
    best = _best(record, _kind(record))
    return best is not None and best[0] >= record.asked


def _over(record: Record, kind: str, *, name: bool = False) -> str:
    best = _best(record, kind)
    if best is None:
        return "-"
    return f"{best[0]:.2f}x" + (f" ({best[1]})" if name else "")


def _sweep(run: SuiteRun) -> Table | None:
    part = run.parts.get("sweep", {})
    if not part.get("levels"):
        return None
    asked = part["asked"]
    conditions = list(dict.fromkeys(n for level in part["levels"] for n in level["return_final"]))
    title = (
        f"Sweep of {asked['env']} by {', '.join(asked['algos'])}: {asked['seeds']} seeds x "
        f"{len(asked['conditions'])} conditions, {asked['steps']:,} steps each"
    )
    columns = ["level", "density", "trainings", "time", "agent-steps/s", *conditions]
    table = Table(title, columns, bars_are="agent-steps/s")
    for level in part["levels"]:
        returns = [level["return_final"].get(name) for name in conditions]
        table.rows.append(
            [
                f"{level['level']}",
                f"{level['density']:.1%}",
                f"{level['trainings']}",
                duration(level["seconds"]),
                f"{level['agent_steps_per_second']:,.0f}",
                *("-" if each is None else f"{each['median']:.0f}" for each in returns),
            ]
        )
        table.bars.append(level["agent_steps_per_second"])
    table.notes.append(f"{_say_sweep(part)}. Returns: median over seeds of the final weights.")
    return table


def _tests(run: SuiteRun) -> Table | None:
    part = run.parts.get("tests", {})
    if not part.get("failures"):
        return None
    table = Table("Tests that failed on the GPU", ["test", "reason"])
    table.rows = [[name, why] for name, why in part["failures"].items()]
    return table


def _tune(run: SuiteRun) -> Table | None:
    part = run.parts.get("tune", {})
    if not part.get("configurations"):
        return None
    table = Table("Launches tuned", ["op", "shapes", "configuration"])
    for op, classes in part["configurations"].items():
        for shapes, chosen in classes.items():
            told = ", ".join(f"{name} {value}" for name, value in chosen.items())
            table.rows.append([op, shapes, told])
    return table


def _say_tests(part: dict[str, Any]) -> str:
    if "passed" not in part:
        return "no outcome"
    said = f"{part['passed']} passed, {len(part['failures'])} failed, {part['skipped']} skipped"
    return said + (f", {part['unfinished']} not run" if part.get("unfinished") else "")


def _say_tune(part: dict[str, Any]) -> str:
    asked, tried = len(part.get("asked", [])), len(part.get("tried", []))
    better = sum(len(classes) for classes in part.get("configurations", {}).values())
    return f"{asked} launches, {tried} candidates, {better} better than built in"


def _say_table(part: dict[str, Any], records: Sequence[Record]) -> str:
    failed, left_out = (len(part.get(name, ())) for name in ("failed", "left_out"))
    said = f"{len(records)} cases, {failed} failed, {left_out} left out"
    asked = [record for record in records if record.asked is not None]
    return f"{said}, {sum(map(_is_met, asked))} of {len(asked)} targets met"


def _say_sweep(part: dict[str, Any]) -> str:
    if "asked" not in part:
        return "nothing"
    said = f"{part['levels_finished']} of {part['asked']['levels']} levels"
    said += f", {part.get('agent_steps', 0):,} agent-steps"
    if part.get("agent_steps_per_second"):
        said += f" at {part['agent_steps_per_second']:,.0f}/s, evaluation included"
    if part["complete"] and part.get("sweep_seconds"):
        said += f", finished after {part['sweep_seconds']:.0f} s (asked: {ASKED_S:.0f})"
    if not part["complete"] and part.get("projected_seconds"):
        said += f"; all levels would take about {part['projected_seconds'] / 60:.0f} min"
    return said
