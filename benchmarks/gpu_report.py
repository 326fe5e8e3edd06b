"""What `benchmarks.gpu` found, as tables: targets with rooflines, the sweep, tests and tuning.

``parts`` of a run holds, as far as they were run, ``tests``, ``tune``, ``table`` and ``sweep``,
each with ``seconds``; with ``stopped`` if it did not end well, ``accidents`` if it had to be begun
anew, and ``unfinished`` if the time was up.
"""

from __future__ import annotations

from typing import Any

from .gpu_sweep import ASKED_S
from .results import Run
from .tables import Table, duration

__all__ = ["gpu_tables", "summary"]

_KINDS = ("launches", "replay", "cold")


def gpu_tables(run: Run) -> list[Table]:
    """Every part of a run that there is something to show of."""
    made = (_targets(run), _sweep(run), _tests(run), _tune(run))
    return [table for table in made if table is not None]


def summary(run: Run) -> list[str]:
    """A few lines: what ran, what did not, and how far the rows came."""
    lines = []
    for name, part in run.parts.items():
        said = {"tests": _say_tests, "tune": _say_tune, "table": _say_table, "sweep": _say_sweep}
        line = f"{name}: {said[name](part)} in {part.get('seconds', 0.0):.0f} s"
        lines.append("; ".join([line, *part.get("accidents", []), *_of(part, "stopped")]))
    if run.refused:
        lines.append(f"refused, results being wrong: {', '.join(r.label for r in run.refused)}")
    return lines


def _of(part: dict[str, Any], name: str) -> list[str]:
    return [part[name]] if part.get(name) else []


def _targets(run: Run) -> Table | None:
    part = run.parts.get("table", {})
    if not part.get("rows"):
        return None
    columns = ["configuration", "time", "vs best peer", "asked"]
    columns += ["with launches", "cold", "vs our dense", "of bound"]
    table = Table("Targets on a GPU: replayed from CUDA graphs unless said otherwise", columns)
    for row in part["rows"]:
        replay = _best_timing(row)
        seconds = replay["seconds"]
        share = f"{row['bound_s'] / seconds:.0%}" if row.get("bound_s") and seconds else "-"
        table.rows.append(
            [
                row["label"],
                duration(seconds),
                _over(replay, name=True),
                "-" if row.get("asked") is None else f"{row['asked']:g}x",
                _over(row["launches"]),
                _over(row["cold"]),
                "-" if replay["over_our_dense"] is None else f"{replay['over_our_dense']:.2f}x",
                share,
            ]
        )
    rates = part["rates"]
    products = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates["products"].items())
    table.notes += [
        "Best peer: the fastest of plain torch, with or without torch.compile, in the same kind of "
        "timing and the same precision; one that cannot be captured by its direct calls. Over our "
        "dense: what sparsity alone gains.",
        "With launches: calls one after another from Python. Cold: one replay after 256 MB were "
        "written.",
        f"Bound: this run's large products ({products} TFLOP/s) and large copy "
        f"({rates['copy'] / 1e12:.2f} TB/s).",
    ]
    table.notes += [f"Failed - {name}: {why}." for name, why in part["failed"].items()]
    table.notes += [f"Not measured, the time was up - {name}." for name in part["left_out"]]
    skipped = {(peer, why) for row in part["rows"] for peer, why in row["skipped"].items()}
    table.notes += [f"Not run - {peer}: {why}." for peer, why in sorted(skipped)]
    table.notes += [
        f"{row['label']}, {name}: {note}."
        for row in part["rows"]
        for name, note in row["notes"].items()
    ]
    return table


def _best_timing(row: dict[str, Any]) -> dict[str, Any]:
    """Replayed if the subject could be captured."""
    return row["replay"] if row["replay"]["seconds"] is not None else row["launches"]


def _is_met(row: dict[str, Any]) -> bool:
    return (_best_timing(row)["ratio"] or 0.0) >= row["asked"]


def _over(found: dict[str, Any], *, name: bool = False) -> str:
    if found["ratio"] is None:
        return "-"
    return f"{found['ratio']:.2f}x" + (f" ({found['best_peer']})" if name else "")


def _sweep(run: Run) -> Table | None:
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


def _tests(run: Run) -> Table | None:
    part = run.parts.get("tests", {})
    if not part.get("failures"):
        return None
    table = Table("Tests that failed on the GPU", ["test", "reason"])
    table.rows = [[name, why] for name, why in part["failures"].items()]
    return table


def _tune(run: Run) -> Table | None:
    part = run.parts.get("tune", {})
    if not part.get("configurations"):
        return None
    table = Table("Launches tuned", ["op", "shapes", "configuration"])
    for op, classes in part["configurations"].items():
        for shapes, densities in classes.items():
            for chosen in densities.values():
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


def _say_table(part: dict[str, Any]) -> str:
    counts = (len(part.get(name, ())) for name in ("rows", "failed", "left_out"))
    said = "{} rows, {} failed, {} left out".format(*counts)
    asked = [row for row in part.get("rows", ()) if row.get("asked") is not None]
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
