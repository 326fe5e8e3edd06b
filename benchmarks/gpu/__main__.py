"""Everything an hour with a GPU is for, in one go and under nine minutes: `make gpu`.

    python -m benchmarks.gpu                        tests, tuning, the table of targets, a sweep
    python -m benchmarks.gpu --only table --minutes 3
    python -m benchmarks.gpu --rehearse             the same on a CPU, tiny, in Triton's interpreter

Each part runs in a process of its own with a share of the time, and saves what it has after every
step: one that fails, hangs or is cut off costs nothing but the step it was at. While the tests run,
what the others will launch is compiled on the remaining cores. Nothing is downloaded. Results go to
``results/<device>-<date>.json``, tuned launches to ``kernels/configs``; with ``--out`` results,
launches and the log go to a folder. A rehearsal writes to a temporary folder, or to ``--out``, and
marks what it writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..results import RESULTS, SuiteRun, load, provenance, save
from .process import Work, attempt, compilers, read_state, until_done

PARTS = ("tests", "tune", "table", "sweep")
"""In this order: nothing is timed before it was tested, nor swept before it was tuned."""

# A part gets its share of the time left by the shares still to come: what one does not use is left
# to the others.
_SHARES = {"tests": 2.5, "tune": 1.5, "table": 3.0, "sweep": 3.5}
# A part stops by itself at its deadline; one that does not is stopped after this.
_GRACE_S = 10.0
_END_S = 10.0
_REHEARSAL = "rehearsal"
_WARM = "warm"
_NEEDED = ("triton", "numba", "pyarrow", "gymnasium", "safetensors")
_NEEDED_BY_TESTS = ("pytest", "xdist", "hypothesis")


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
    needed = _NEEDED + (_NEEDED_BY_TESTS if "tests" in options.only else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        Console(stderr=True).print(
            f"[red]error:[/red] not installed: {', '.join(missing)}", highlight=False
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
    parser.add_argument("--part", choices=(*PARTS, _WARM), help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
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
    # Apart from what is kept: a sweep's store is hundreds of files.
    scratch = Path(tempfile.mkdtemp(prefix="sparse-tickets-gpu-"))
    out = options.out or (scratch if options.rehearse else None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    name = f"{run.device}-{run.date[:10]}"
    path, log = (out or RESULTS) / f"{name}.json", (out or scratch) / f"{name}.log"
    wrong = False
    whole = len(options.only) == len(PARTS)
    for part in (part for part in PARTS if part in options.only):
        left = end - time.monotonic()
        ahead = sum(_SHARES[later] for later in PARTS[PARTS.index(part) :] if later in options.only)
        seconds = left * _SHARES[part] / ahead
        console.print(f"[bold]{part}[/bold], up to {seconds:.0f} s", highlight=False)
        found = _in_a_process(part, seconds, scratch, log, options, console)
        _merge(run, part, found)
        wrong |= _is_wrong(found) or bool(run.refused)
        # Launches that were not tuned are no gap in the results.
        whole &= not (found.get("unfinished") or (part == "table" and found.get("left_out")))
        run.seconds = time.monotonic() - began
        run.complete = whole and not wrong and part == PARTS[-1]
        save(run, path)
        if part == "tune" and found.get("configurations"):
            _write_configurations(run, found, options, out, console)
    _show(console, run)
    told = f"{run.seconds:.0f} s; written to {path}, log in {log}, all else in {scratch}"
    console.print(told, highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _in_a_process(
    part: str,
    seconds: float,
    scratch: Path,
    log: Path,
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """What a part found, as far as it came."""
    environment = {}
    if options.rehearse:
        environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"SPARSE_TICKETS_BACKEND": "triton"}
    state = scratch / f"{part}.json"
    state.unlink(missing_ok=True)
    command = _command(part, scratch, options.rehearse)

    def tell(line: str) -> None:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    compiling = part == "tests" and len(options.only) > 1 and not options.rehearse
    with ThreadPoolExecutor(compilers()) as pool:
        ahead = _compile_ahead(pool, seconds, scratch) if compiling else []
        found = until_done(command, environment, state, log, seconds, _GRACE_S, tell)
        for each in ahead:
            each.result()
    return found


def _compile_ahead(pool: ThreadPoolExecutor, seconds: float, scratch: Path) -> list[Future[str]]:
    """Begin to compile what the later parts launch; it ends when the time for tests does."""
    begun, count = [], compilers()
    # Each has a core; torch's compiler would start as many workers as there are, in each.
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for index in range(count):
        command = [
            *_command(_WARM, scratch, False),
            f"{seconds:.1f}",
            "--share",
            f"{index}/{count}",
        ]
        log = scratch / f"{_WARM}-{index}.log"
        begun.append(pool.submit(attempt, command, environment, log, seconds, lambda line: None))
    return begun


def _command(part: str, scratch: Path, rehearse: bool) -> list[str]:
    """Of a part's process; the time when it is up comes last."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--out", str(scratch)]
    return [*command, *(["--rehearse"] if rehearse else []), "--until"]


def _is_wrong(found: dict[str, Any]) -> bool:
    """Whether something failed; what there was no time for is not wrong."""
    return any(found.get(name) for name in ("stopped", "failures", "failed"))


def _merge(run: SuiteRun, part: str, found: dict[str, Any]) -> None:
    """Add a part to the run; the table's times are records like any other run's."""
    stored = Path(found.pop("run", ""))
    if stored.is_file():
        inner = load(stored)
        for name in ("records", "refused", "sgemm", "copies", "products"):
            setattr(run, name, getattr(inner, name))
        found |= inner.parts.get(part, {})
    run.parts[part] = found


def _write_configurations(
    run: SuiteRun,
    found: dict[str, Any],
    options: argparse.Namespace,
    out: Path | None,
    console: Console,
) -> None:
    """Where the kernels of the table and the sweep read them, and to the folder of results."""
    from sparse_tickets.kernels.tuning import CONFIGS

    from .tune import write_configurations

    folders = [] if options.rehearse else [CONFIGS]
    folders += [] if out is None else [out / "configs"]
    about = {"device": run.hardware, "date": run.date, "commit": run.commit}
    for folder in folders:
        path = folder / f"{run.device}.json"
        write_configurations(path, found, {**about, "versions": run.versions})
        console.print(f"launches written to {path}", highlight=False, soft_wrap=True)


def _show(console: Console, run: SuiteRun) -> None:
    from ..console import show_table
    from ..tables import STAGES, tables
    from .report import gpu_tables, summary

    for table in gpu_tables(run):
        show_table(console, table)
    for table in tables(run, brief=True):
        if table.title.startswith(STAGES):
            show_table(console, table)
    for line in summary(run):
        console.print(line, highlight=False, soft_wrap=True)


def _run_part(options: argparse.Namespace) -> int:
    """Inside the process of one part: goes on with ``<part>.json``, and writes it as it goes."""
    # By the clock on the wall: importing took seconds of the time there is.
    deadline = time.monotonic() + options.until - time.time()
    state = options.out / f"{options.part}.json"
    found = read_state(state)
    found.pop("again", None)
    device = torch.device("cpu" if options.rehearse else "cuda")
    share, shares = map(int, options.share.split("/"))
    work = Work(options.out, state, found, deadline, device, options.rehearse, share, shares)
    try:
        found["again"] = import_module(f".{options.part}", __package__).part(work)
    finally:
        work.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
