"""The command line: `sparse-tickets sweep`, `report` and so on; `_COMMANDS` has them all."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparse_tickets.algos.teaching import ExpertError
from sparse_tickets.commands import (
    BenchCommand,
    InspectCommand,
    ReportCommand,
    ShowCommand,
    StudyCommand,
    SweepCommand,
    TransferCommand,
    VerifyCommand,
)
from sparse_tickets.envs import use_workers
from sparse_tickets.files import StoreError
from sparse_tickets.kernels.compile import CompileError
from sparse_tickets.provenance import commit, processor, versions
from sparse_tickets.sweep.engines import run_study
from sparse_tickets.sweep.plugins import load_plugins, place_of
from sparse_tickets.sweep.progress import SweepProgress
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store
from sparse_tickets.timing import Unverified

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 if all went well, 2 if what was asked for cannot be, 130 or 143 if told
        to stop, 141 if nobody reads the output any more, 1 otherwise.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _survive_narrow_encodings()
    console = Console()
    known = bool(arguments) and arguments[0] in _COMMANDS
    try:
        if arguments[:1] == ["--version"]:
            print(_version())
            return 0
        if not known:
            return _usage(arguments, console)
        with _plain_warnings():
            return _COMMANDS[arguments[0]][1](arguments[1:], console)
    except BrokenPipeError:
        # Its reader has seen enough. What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        Console(stderr=True).print("\n[yellow]stopped.[/yellow]")
        return 128 + signal.SIGINT
    except Exception as error:
        plugins = {str(Path(plugin).resolve()) for plugin in _option(arguments[1:], "--plugin")}
        where = place_of(error, plugins)
        reported = isinstance(error, _REPORTED)
        if not reported and where is None:
            raise
        message = str(error) if reported else f"{type(error).__name__}: {error}"
        message += "" if where is None else f" ({where})"
        Console(stderr=True).print(
            f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True
        )
        return 2 if isinstance(error, ValueError | TypeError) and where is None else 1


def _version() -> str:
    """Of this library, its commit where it runs from a clone, and what its numbers depend on."""
    packages = ("sparse-tickets", "torch", "triton", "numba", "numpy", "gymnasium")
    found = versions(packages)
    own = f"sparse-tickets {found['sparse-tickets']}"
    lines = [own if commit() is None else f"{own} (commit {commit()})"]
    lines += [f"{name} {found.get(name, 'is not installed')}" for name in ("python", *packages[1:])]
    return "\n".join([*lines, f"processor {processor()}"])


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as one line, without the line of our source they come from."""
    before = warnings.formatwarning
    # Gymnasium colours its own, into files too.
    colours = re.compile("\x1b\\[[0-9;]*m")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {colours.sub('', str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _survive_narrow_encodings() -> None:
    """Print what an ASCII, latin-1 or cp1252 terminal cannot show as what comes closest.

    Output into a file or pipe is written line by line, as it is produced.
    """
    codecs.register_error("sparse_tickets", _closest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sparse_tickets", line_buffering=True)


_CLOSEST = {"≥": ">=", "≤": "<=", "→": "->", "−": "-", "×": "x", "…": "...", "•": "*"}  # noqa: RUF001


def _closest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    shown = (_CLOSEST.get(one) or _line_drawing(one) for one in lost)
    return "".join(shown), error.end


def _line_drawing(character: str) -> str:
    if character in "─━═╌╍":
        return "-"
    if character in "│┃║":
        return "|"
    return "+" if "\u2500" <= character <= "\u257f" else "?"


def _usage(arguments: list[str], console: Console) -> int:
    known = bool(arguments) and arguments[0] not in ("-h", "--help")
    if known:
        console = Console(stderr=True)
        names = ", ".join(_COMMANDS)
        said = escape(repr(arguments[0]))
        console.print(f"[red]error:[/red] no command {said}, there are: {names}\n")
    console.print("[bold]sparse-tickets[/bold]: lottery-ticket research on policies\n")
    for name, (about, _) in _COMMANDS.items():
        console.print(f"  [bold]{name:8}[/bold] {about}")
    console.print("\n  sparse-tickets COMMAND --help  explains a command", highlight=False)
    console.print("  sparse-tickets --version       versions to report with a bug", highlight=False)
    return 2 if known else 0


def _sweep(rest: list[str], console: Console) -> int:
    # The protocol's defaults depend on the environment, so that --help shows the right ones.
    load_plugins([Path(value) for value in _option(rest, "--plugin")])
    env = _option(rest, "--env")
    default = SweepCommand(out=tyro.MISSING, spec=protocol(env[0] if env else Sweep.env))
    command = tyro.cli(
        SweepCommand, prog="sparse-tickets sweep", args=rest, config=_STYLE, default=default
    )
    spec, out = command.spec, command.out
    if command.dry_run:
        from sparse_tickets.sweep.estimate import estimate

        with Console(stderr=True).status(_TIMING), use_workers(command.workers):
            table = estimate(spec)
        _print_table(console, table)
        return 0
    failed, stopped = _run({"": spec}, out, command, console)
    for failure in failed.values():
        raise failure
    return stopped or _print_report(out, console, ())


def _study(rest: list[str], console: Console) -> int:
    from sparse_tickets.analysis.study import study_report
    from sparse_tickets.sweep.estimate import estimate_study
    from sparse_tickets.sweep.study import load_study

    command = tyro.cli(StudyCommand, prog="sparse-tickets study", args=rest, config=_STYLE)
    load_plugins(command.plugin)
    study = load_study(command.file)
    if command.dry_run:
        with Console(stderr=True).status(_TIMING), use_workers(command.workers):
            table = estimate_study(study)
        _print_table(console, table)
        return 0
    failed, stopped = _run(study, command.out, command, console)
    if stopped:
        return stopped
    for name, failure in failed.items():
        Console(stderr=True).print(Text(f"error: {name}: {failure}"), soft_wrap=True)
    # A sweep whose experts failed has its other algorithms all the same.
    reported = [name for name in study if Store(command.out / name).units()]
    if reported:
        table, files = study_report(command.out, reported)
        _print_table(console, table)
        for file in files:
            console.print(f"  {file}", highlight=False, soft_wrap=True, markup=False)
    return 1 if failed else 0


def _run(
    study: Mapping[str, Sweep],
    out: Path,
    command: SweepCommand | StudyCommand,
    console: Console,
) -> tuple[dict[str, ExpertError], int]:
    """Run sweeps with a progress bar: which found no experts; the status if a signal stopped it."""
    try:
        with SweepProgress(study.values(), console) as progress, _held_signals(console) as check:

            def advance(description: str, steps: int) -> None:
                progress.advance(description, steps)
                check()

            found = run_study(
                study,
                out,
                overwrite=command.overwrite,
                device=command.device,
                engine=command.engine,
                address=command.address,
                gpus_per_chunk=command.gpus_per_chunk,
                workers=command.workers,
                plugins=command.plugin,
                track=command.track,
                on_progress=advance,
            )
            failed = {name: e for name, e in found.items() if isinstance(e, ExpertError)}
            return failed, 0
    except _Stopped as stopped:
        console.print(
            f"\n[yellow]stopped.[/yellow] Finished units are safe in {escape(str(out))}; "
            "run the same command again to resume."
        )
        return {}, stopped.status


class _Stopped(KeyboardInterrupt):
    """A signal asked this process to end; its exit status says which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@contextmanager
def _held_signals(console: Console) -> Iterator[Callable[[], None]]:
    """Hold the first Ctrl-C or SIGTERM back until the function yielded is called.

    A second one acts at once. Raised at any moment, it may surface from a C extension as another
    error: a file being read would seem damaged.
    """
    held: int | None = None

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        if held is not None:
            raise _Stopped(number)
        held = number
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        # This may interrupt a write into the same stream, which then takes no other.
        with suppress(RuntimeError):
            console.print(f"stopping after this iteration; {again} stops at once")

    def check() -> None:
        if held is not None:
            raise _Stopped(held)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(rest: list[str], console: Console) -> int:
    command = tyro.cli(ReportCommand, prog="sparse-tickets report", args=rest, config=_STYLE)
    load_plugins(command.plugin)
    return _print_report(command.run, console, command.metric)


def _print_report(out: Path, console: Console, metrics: Sequence[str]) -> int:
    from sparse_tickets.analysis.report import report

    tables, files = report(out, metrics)
    for table in tables:
        _print_table(console, table)
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _print_table(console: Console, table: Table) -> None:
    """Print a table as wide as it is: a narrow terminal wraps lines, but no number is cut."""
    wanted = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    whole = Console(file=console.file, width=max(wanted, console.width), highlight=False)
    whole.print(table)


def _show(rest: list[str], console: Console) -> int:
    from sparse_tickets.analysis.report import show

    command = tyro.cli(ShowCommand, prog="sparse-tickets show", args=rest, config=_STYLE)
    load_plugins(command.plugin)
    files = show(
        command.run,
        algo=command.algo,
        condition=command.condition,
        controls=command.controls,
        seed=command.seed,
        level=command.level,
        export=command.export,
    )
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _transfer(rest: list[str], console: Console) -> int:
    from sparse_tickets.analysis.transfer import transfer_into

    command = tyro.cli(TransferCommand, prog="sparse-tickets transfer", args=rest, config=_STYLE)
    load_plugins(command.plugin)
    with Console(stderr=True).status("training under transferred masks"):
        rows = transfer_into(
            command.out,
            command.run,
            command.algo,
            command.levels,
            masks=command.masks,
            found_by=command.found_by,
            condition=command.condition,
            controls=command.controls,
            keep=command.keep,
            shift=command.shift,
            device=command.device,
        )
    first = rows.row(0, named=True)
    what = "masks" if command.keep == "mask" else "inputs"
    table = Table(
        title=Text(
            f"{first['env']}: {command.algo} under the {what} of {first['masks_algo']} on "
            f"{first['masks_env']}, means of {rows['seed'].n_unique()} seeds"
        )
    )
    shown = {
        "before training": "return_initial",
        "learning curve": "return_auc",
        "final": "return_final",
    }
    for name in ("level", "density", *shown):
        table.add_column(name, justify="right")
    for (level, density), group in rows.group_by("level", "density", maintain_order=True):
        means = (f"{group[column].to_numpy().mean():.4g}" for column in shown.values())
        table.add_row(str(level), f"{density:.1%}", *means)
    _print_table(console, table)
    return 0


def _verify(rest: list[str], console: Console) -> int:
    from sparse_tickets.analysis.verify import verify

    command = tyro.cli(VerifyCommand, prog="sparse-tickets verify", args=rest, config=_STYLE)
    load_plugins(command.plugin)
    table, agree = verify(command.run, command.cells, console)
    _print_table(console, table)
    return 0 if agree else 1


def _bench(rest: list[str], console: Console) -> int:
    import torch

    from sparse_tickets.bench.layer import bench_layer
    from sparse_tickets.bench.steps import Problem, bench_steps
    from sparse_tickets.bench.tables import bench_table, steps_table

    command = tyro.cli(BenchCommand, prog="sparse-tickets bench", args=rest, config=_STYLE)
    device = command.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = command.policy or (17, command.width, command.width, 6)
    problem = Problem(sizes, command.activation, command.batch)
    with Console(stderr=True).status("measuring what this machine can do") as status:
        if command.what != "layer":
            steps = bench_steps(
                problem,
                device,
                sparsities=command.sparsities,
                threads=command.threads,
                on_line=lambda line: status.update(
                    f"{line.sparsity:g}% pruned, a whole step: {line.gain_by_us.median:.2f}x"
                ),
            )
            console.print(steps_table(steps), highlight=False)
        if command.what != "steps":
            layer = bench_layer(
                command.width,
                command.batch,
                device,
                sparsities=command.sparsities,
                threads=command.threads,
                on_line=lambda line: status.update(
                    f"{line.sparsity:g}% pruned, {line.direction}: {line.speedup.median:.2f}x"
                ),
            )
            console.print(bench_table(layer), highlight=False)
    return 0


def _inspect(rest: list[str], console: Console) -> int:
    from sparse_tickets.inspect import inspect, inspect_table, plain

    command = tyro.cli(InspectCommand, prog="sparse-tickets inspect", args=rest, config=_STYLE)
    finished = itertools.count(1)
    with Console(stderr=True).status("compiling") as status:
        reports = inspect(
            command.op,
            command.arch,
            everything=command.all,
            on_report=lambda report: status.update(
                f"{next(finished)} compiled; sm_{report.capability} {report.op} "
                f"{escape(report.case)}"
            ),
        )
    if command.json:
        print(json.dumps(plain(reports), indent=1))
    else:
        _print_table(console, inspect_table(reports))
    return 1 if any(report.problems for report in reports) else 0


def _option(arguments: list[str], name: str) -> list[str]:
    """The values given to an option, read before parsing proper."""
    values: list[str] = []
    taking = False
    for argument in arguments:
        if argument.startswith("--"):
            taking = argument == name
            if argument.startswith(f"{name}="):
                values.append(argument.split("=", 1)[1])
        elif taking:
            values.append(argument)
    return values


_WIDEST = 1_000
_TIMING = "timing a few iterations (the first time kernels compile, for a minute)"
_REPORTED = (
    ValueError,
    TypeError,
    StoreError,
    ExpertError,
    Unverified,
    CompileError,
    MemoryError,
    OSError,
)
# A flag is on or not there: no --no-flag beside it.
_STYLE = (tyro.conf.FlagCreatePairsOff,)
_COMMANDS: dict[str, tuple[str, Callable[[list[str], Console], int]]] = {
    "sweep": ("train every seed, condition and level; resumable", _sweep),
    "report": ("print a run's table and draw its figures", _report),
    "show": ("draw a ticket's masks; export its policy", _show),
    "transfer": ("train under masks that another algorithm or task found", _transfer),
    "verify": ("retrain some cells in plain torch and compare", _verify),
    "study": ("run several sweeps of a TOML file, with one report", _study),
    "bench": ("measure what sparsity gains for a layer of your size", _bench),
    "inspect": ("what the compiler made of the GPU kernels; needs no GPU", _inspect),
}

if __name__ == "__main__":
    sys.exit(main())
