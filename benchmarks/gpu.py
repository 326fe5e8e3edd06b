"""Everything an hour with a GPU is for, in one go and under nine minutes: `make gpu`.

    python -m benchmarks.gpu                        tests, tuning, the table of targets, a sweep
    python -m benchmarks.gpu --only table --minutes 3
    python -m benchmarks.gpu --rehearse             the same on a CPU, tiny, in Triton's interpreter

Each part runs in a process of its own with a share of the time, and saves what it has after every
step: one that fails, hangs or is cut off costs nothing but itself. Nothing is downloaded. Results
go to ``results/<device>-<date>.json``, tuned launches to ``kernels/configs``; a rehearsal writes
to a temporary folder, or to ``--out``, and marks what it writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparse_tickets.files import write_atomic

from .results import RESULTS, Run, available_cores, load, provenance, save

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "tune", "table", "sweep")
"""In this order: nothing is timed before it was tested, nor swept before it was tuned."""

# A part gets its share of the time left by the shares still to come: what one does not use is left
# to the others.
_SHARES = {"tests": 2.0, "tune": 1.5, "table": 3.0, "sweep": 4.0}
# A part stops by itself at its deadline; one that does not is stopped after this.
_GRACE_S = 10.0
_END_S = 10.0
_REHEARSAL = "rehearsal"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status: 0 if all of them ran and nothing was wrong."""
    options = _parser().parse_args(arguments)
    if options.part:
        return _run_part(options)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if options.rehearse and options.out is not None and options.out.resolve() == RESULTS.resolve():
        raise SystemExit(f"error: out must not be {RESULTS} for a rehearsal: it measures nothing")
    if not options.rehearse and not torch.cuda.is_available():
        Console(stderr=True).print(
            "[red]error:[/red] torch sees no GPU; --rehearse tries the plumbing without one",
            highlight=False,
        )
        return 1
    return _run_all(options, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, help="folder for all that is written")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU, in a folder apart")
    parser.add_argument("--commit", help="of the code, where there is no checkout to tell it")
    # How the processes of the parts are called.
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _run_all(options: argparse.Namespace, console: Console) -> int:
    if options.rehearse:
        console.print("A rehearsal: no time and no rate below is a measurement.", style="yellow")
    began = time.monotonic()
    end = began + 60 * options.minutes - _END_S
    device = "cpu" if options.rehearse else "cuda"
    run = provenance(_REHEARSAL if options.rehearse else "gpu", device, None)
    run.commit = options.commit or run.commit
    if options.rehearse:
        run.device = f"{_REHEARSAL}-{run.device}"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="parts-", dir=options.out))
    out = options.out or (scratch if options.rehearse else None)
    path = (out or RESULTS) / f"{run.device}-{run.date[:10]}.json"
    wrong = False
    for part in (part for part in PARTS if part in options.only):
        left = end - time.monotonic()
        ahead = sum(_SHARES[later] for later in PARTS[PARTS.index(part) :] if later in options.only)
        seconds = left * _SHARES[part] / ahead
        console.print(f"[bold]{part}[/bold], up to {seconds:.0f} s", highlight=False)
        found = _in_a_process(part, seconds, scratch, options)
        wrong |= _is_wrong(found)
        _merge(run, part, found)
        run.seconds = time.monotonic() - began
        run.complete = not wrong and part == PARTS[-1] and len(options.only) == len(PARTS)
        save(run, path)
        if part == "tune" and found.get("configurations"):
            _write_configurations(run, found, out, console)
    _show(console, run)
    told = f"{run.seconds:.0f} s; written to {path}, logs in {scratch}"
    console.print(told, highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _in_a_process(
    part: str, seconds: float, scratch: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """What a part found, as far as it came; its output goes to the terminal and to a log."""
    began, log = time.monotonic(), scratch / f"{part}.log"
    state = scratch / f"{part}.json"
    state.unlink(missing_ok=True)
    command = _command(part, seconds, scratch)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        command.append("--rehearse")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"SPARSE_TICKETS_BACKEND": "triton"}
    stopped = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds + _GRACE_S)
            stopped = f"ended with status {code}: {_last_line(log)}" if code else ""
        except subprocess.TimeoutExpired:
            stopped = "stopped: it did not end in time"
        finally:
            _end(process)
    try:
        found = json.loads(state.read_text())
    except (OSError, ValueError):
        found = {}
    found["seconds"] = time.monotonic() - began
    if stopped:
        found["stopped"] = stopped
    return found


def _command(part: str, seconds: float, scratch: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part]
    return [*command, "--seconds", f"{seconds}", "--out", str(scratch)]


def _end(process: subprocess.Popen) -> None:
    """Stop a part and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def _is_wrong(found: dict[str, Any]) -> bool:
    """Whether something failed; what there was no time for is not wrong."""
    return bool(found.get("stopped") or found.get("failures") or found.get("failed"))


def _merge(run: Run, part: str, found: dict[str, Any]) -> None:
    """Add a part to the run; the table's times are records like any other run's."""
    stored = found.pop("run", None)
    if stored:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(stored, file)
            file.flush()
            inner = load(Path(file.name))
        run.records, run.refused = inner.records, inner.refused
        run.sgemm, run.copies = inner.sgemm, inner.copies
        found |= inner.parts.get(part, {})
    run.parts[part] = found


def _write_configurations(
    run: Run, found: dict[str, Any], out: Path | None, console: Console
) -> None:
    """Where the kernels read them, unless everything goes elsewhere."""
    from sparse_tickets.kernels.tuning import CONFIGS

    from .gpu_tune import write_configurations

    path = (CONFIGS if out is None else out / "configs") / f"{run.device}.json"
    about = {"device": run.hardware, "date": run.date, "commit": run.commit}
    write_configurations(path, found, {**about, "versions": run.versions})
    console.print(f"launches written to {path}", highlight=False, soft_wrap=True)


def _show(console: Console, run: Run) -> None:
    from .console import show_table
    from .gpu_report import gpu_tables, summary

    for table in gpu_tables(run):
        show_table(console, table)
    for line in summary(run):
        console.print(line, highlight=False, soft_wrap=True)


def _run_part(options: argparse.Namespace) -> int:
    """Inside the process of one part: writes ``<part>.json`` as it goes."""
    deadline = time.monotonic() + options.seconds
    state = options.out / f"{options.part}.json"
    found: dict[str, Any] = {}

    def keep() -> None:
        write_atomic(state, json.dumps(found).encode())

    device = torch.device("cpu" if options.rehearse else "cuda")
    part: Callable[[], None] = {
        "tests": lambda: _tests(options, found),
        "tune": lambda: _tune(options, device, deadline, found, keep),
        "table": lambda: _table(options, device, deadline, found, keep),
        "sweep": lambda: _sweep(options, device, deadline, found, keep),
    }[options.part]
    try:
        part()
    finally:
        keep()
    return 0


def _tests(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The tests marked gpu, and every test of a Triton kernel, which on a GPU run there."""
    report = options.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit2", "-m", "not slow and not bench", "-W", "default"]
    if importlib.util.find_spec("xdist"):
        # Most of the time goes into compiling kernels.
        command += ["-n", f"{min(8, available_cores())}"]
    if options.rehearse:
        command += ["tests/kernels/test_returns.py", "-k", "triton"]
    else:
        command += ["tests/gpu", "tests/kernels", "-k", "gpu or triton"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            process.wait(options.seconds)
        except subprocess.TimeoutExpired:
            # Interrupted, pytest still reports on the tests it has run.
            found["stopped"] = f"tests were interrupted after {options.seconds:.0f} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S / 2)
            process.kill()
    found.update(_outcome(report))


def _outcome(report: Path) -> dict[str, Any]:
    """Counts, and what failed with its first line, from pytest's report."""
    if not report.exists():
        return {"stopped": "pytest wrote no report: it did not end in time, or not at all"}
    failures, skipped, total = {}, 0, 0
    for case in ElementTree.parse(report).iter("testcase"):
        total += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            problem = case.find(kind)
            if problem is not None:
                failures[name] = (problem.get("message") or kind).split("\n")[0][:200]
    passed = total - skipped - len(failures)
    return {"passed": passed, "skipped": skipped, "failures": failures}


def _tune(
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
    found: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    from . import gpu_table
    from .gpu_tune import tune

    sizes = gpu_table.TINY if options.rehearse else gpu_table.REAL
    tune(sizes, device, deadline, found, keep)


def _table(
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
    found: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    from . import gpu_table

    sizes = gpu_table.TINY if options.rehearse else gpu_table.REAL
    run = provenance("gpu", str(device), None)
    inner = options.out / "table-run.json"

    def save_run() -> None:
        save(run, inner)
        found["run"] = json.loads(inner.read_text())
        keep()

    gpu_table.fill(run, sizes, device, deadline, save_run)


def _sweep(
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
    found: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    from . import gpu_sweep

    spec = gpu_sweep.TINY if options.rehearse else gpu_sweep.REAL
    backend = "reference" if options.rehearse else "auto"
    folder = options.out / "sweep"
    gpu_sweep.sweep(spec, folder, str(device), deadline, found, keep, backend)


if __name__ == "__main__":
    sys.exit(main())
