"""Results as data: one JSON file per run, and what machine and code it came from.

A file is a `SuiteRun`: where and how, then one `measure.Record` per configuration, with a
`measure.Measured` per contender. Warm, cold and graph-replayed times stand side by side there;
what was not measured is null. Files of the first layout, which lacked some of these, still load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sparse_tickets.ceilings import Ceilings
from sparse_tickets.files import write_atomic
from sparse_tickets.provenance import processor, versions
from sparse_tickets.timing import Spread

from .measure import Record, Refusal

RESULTS = Path(__file__).parent / "results"

PART = "-part"
"""Ends the name of a suite some of whose configurations were left out: reports do not use it."""

_LAYOUT = 2
_LAYOUTS = (1, 2)
_PACKAGES = (
    *("torch", "triton", "numba", "numpy", "scipy"),
    *("jax", "sparseprop", "sparselab", "stable-baselines3"),
)


class _Labelled(Protocol):
    @property
    def label(self) -> str: ...


_Named = TypeVar("_Named", bound=_Labelled)


@dataclass
class SuiteRun:
    """One run of a suite.

    Attributes:
        device: a name for the hardware, e.g. ``cpu-amd-epyc-2c``.
        suite: see `suites.SUITES`.
        date: when it began, ISO 8601, UTC.
        threads: of torch and our kernels alike.
        hardware: model and cores, or GPU.
        versions: of the packages that matter.
        commit: of the code, with ``+`` and a digest of what was changed since, if anything was;
            None outside a checkout.
        sgemm: floating-point operations per second, 1024 x 1024 float32; None if nothing was timed.
        seconds: the run took.
        busy: share of the cores that other processes used meanwhile.
        records: verified and timed.
        refused: not verified, and therefore not timed.
        copies: bytes per second of copies, by the bytes each moves; empty in the first layout.
        rounds: samples per contender that were asked for; 0 in the first layout.
        complete: whether every configuration of the suite was measured.
        parts: what else `benchmarks.gpu` did, by part: see `gpu.report`.
        products: on a GPU, as `sgemm`, of a large product by precision.
    """

    device: str
    suite: str
    date: str
    threads: int
    hardware: str
    versions: dict[str, str]
    commit: str | None
    sgemm: Spread | None
    seconds: float = 0.0
    busy: float = 0.0
    records: list[Record] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    copies: dict[int, Spread] = field(default_factory=dict)
    rounds: int = 0
    complete: bool = True
    parts: dict[str, dict] = field(default_factory=dict)
    products: dict[str, Spread] = field(default_factory=dict)

    def bound(self, record: Record) -> float | None:
        """Seconds that a record's work takes at least on this machine; None where nobody counted.

        Its operations at the rate of a large product in its precision, or its bytes at the rate of
        a copy of as many.
        """
        product = self.products.get(record.precision, self.sgemm)
        if record.cost is None or product is None or not self.copies:
            return None
        return Ceilings(product, self.copies).bound(record.cost)


def device_slug(device: str) -> str:
    """A file name for the hardware."""
    if torch.device(device).type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"cpu {_cpu()} {available_cores()}c")


def provenance(suite: str, device: str, ceilings: Ceilings | None, rounds: int = 0) -> SuiteRun:
    """A run without records yet, with everything about here and now."""
    hardware = f"{_cpu()}, {available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.device(device).type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; host {hardware}"
    return SuiteRun(
        device=device_slug(device),
        suite=suite,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        threads=torch.get_num_threads(),
        hardware=hardware,
        versions=versions(_PACKAGES),
        commit=_commit(),
        sgemm=None if ceilings is None else ceilings.sgemm,
        copies={} if ceilings is None else ceilings.copies,
        rounds=rounds,
        complete=False,
    )


def header(run: SuiteRun) -> dict[str, object]:
    """What a record in a table of its own keeps of where and when it was measured."""
    kept = ("device", "date", "hardware", "versions", "commit")
    return {name: getattr(run, name) for name in kept}


def versions_in_words(versions: Mapping[str, str]) -> str:
    """``torch 2.13.0, numpy 2.4.6``."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


class RecordFile:
    """Records of a benchmark that has a table of its own, as JSON, and the table beside them.

    Args:
        folder: of `RESULTS`.
        table: Markdown of all records.
        rounds: of the run that adds some.
        out: default: <device>-<date>.json in the folder. What it has stays.
        ending: in the place of the date.

    Attributes:
        run: where and when this is.
        path: of the file.
        records: all there are, written or read.
    """

    def __init__(
        self,
        folder: str,
        table: Callable[[list[dict[str, Any]]], str],
        rounds: int,
        out: Path | None = None,
        ending: str = "",
    ) -> None:
        self.run = provenance(folder, "cpu", None, rounds)
        name = f"{self.run.device}-{ending or self.run.date[:10]}.json"
        self.path = out or RESULTS / folder / name
        self._table = table
        self.records = json.loads(self.path.read_text()) if self.path.exists() else []

    def add(
        self, record: dict[str, Any], same: Callable[[dict[str, Any]], bool] = lambda _: False
    ) -> None:
        """Write a record in the place of those that are the same."""
        self.records = [each for each in self.records if not same(each)] + [record]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(self.records, indent=1) + "\n").encode())
        write_atomic(self.path.with_suffix(".md"), str(self).encode())

    def __str__(self) -> str:
        return self._table(self.records)


def choose(among: Sequence[_Named], only: str) -> list[_Named]:
    """Those whose label contains this.

    Raises:
        ValueError: none does.
    """
    chosen = [each for each in among if only in each.label]
    if not chosen:
        labels = "; ".join(each.label for each in among)
        raise ValueError(f"only must be part of one of {labels}, got {only!r}")
    return chosen


def newest_table(folder: Path) -> Path | None:
    """The latest of such tables in a folder, by the date at the end of its name."""
    dated = folder.glob("*-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].json")
    return max(dated, key=lambda path: path.stem[-10:], default=None)


def default_path(run: SuiteRun) -> Path:
    """``results/<device>-<date>.json``; suites other than ``quick`` add their name."""
    ending = "" if run.suite == "quick" else f"-{run.suite}"
    return RESULTS / f"{run.device}-{run.date[:10]}{ending}.json"


def save(run: SuiteRun, path: Path | None = None) -> Path:
    """Write a run whole or not at all, by default to `default_path`."""
    path = default_path(run) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"layout": _LAYOUT, **asdict(run)}
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
    return path


def load(path: Path) -> SuiteRun:
    """Read a run.

    Raises:
        ValueError: the file is not of this layout; the message names it.
        FileNotFoundError: there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        layout = data.pop("layout")
        if layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
        records = [Record.from_dict(item) for item in data.pop("records")]
        refused = [Refusal(**item) for item in data.pop("refused")]
        data.pop("counts", None)  # of instructions: older runs have them
        stored = data.pop("sgemm")
        sgemm = None if stored is None else Spread(**stored)
        copies = {int(size): Spread(**item) for size, item in data.pop("copies", {}).items()}
        products = {name: Spread(**item) for name, item in data.pop("products", {}).items()}
        rates = {"sgemm": sgemm, "copies": copies, "products": products}
        return SuiteRun(**data, records=records, refused=refused, **rates)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a benchmark result: {error!r}") from error


def newest(folder: Path = RESULTS) -> dict[str, list[SuiteRun]]:
    """The latest run of each suite on each device, a stopped one only if none was completed.

    Runs of smoke tests and of parts of a suite do not count.

    Returns:
        By device its runs, those with most records first, scaling curves behind them.
    """
    latest: dict[tuple[str, str], SuiteRun] = {}
    for path in sorted(folder.glob("*.json")):
        run = load(path)
        key = run.device, run.suite
        if run.suite == "smoke" or run.suite.endswith(PART):
            continue
        if key not in latest or _rank(run) > _rank(latest[key]):
            latest[key] = run
    found: dict[str, list[SuiteRun]] = {}
    for run in sorted(latest.values(), key=lambda run: (run.suite == "curves", -len(run.records))):
        found.setdefault(run.device, []).append(run)
    return dict(sorted(found.items()))


def share_out(runs: Sequence[SuiteRun]) -> list[SuiteRun]:
    """The runs of one device with every table in one of them only: where it is longest, or latest.

    Runs that are left with nothing to show are left out.
    """
    owner: dict[tuple, tuple] = {}
    for index, run in enumerate(runs):
        for table, count in Counter(record.table for record in run.records).items():
            owner[table] = max(owner.get(table, ()), (count, *_rank(run), index))
    shared = []
    for index, run in enumerate(runs):
        kept = [record for record in run.records if owner[record.table][-1] == index]
        if kept or run.refused or run.parts:
            shared.append(replace(run, records=kept))
    return shared


def _rank(run: SuiteRun) -> tuple[bool, str]:
    return run.complete, run.date


def _cpu() -> str:
    """The processor's name without marks and frequencies."""
    return re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", processor()).strip()


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results and figures lie here and change with every run; the code under test does not.
        code = ("--", "../kernels", "../sparse_tickets", "*.py")
        changed = git("diff", "HEAD", *code)
        for name in git("ls-files", "--others", "--exclude-standard", *code).splitlines():
            changed += name + (Path(__file__).parent / name).read_text(errors="replace")
        digest = f"+{hashlib.sha256(changed.encode()).hexdigest()[:6]}" if changed else ""
        return git("rev-parse", "--short=12", "HEAD") + digest
    except (OSError, subprocess.CalledProcessError):
        return None
