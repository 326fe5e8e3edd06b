"""What a sweep's driver costs per unit: ``python -m benchmarks scheduling``.

Sweeps of ever more units are run by the driver of the Ray engine, store and all, on a pretended
cluster whose tasks return at once what a unit's training would. What is left is the driver: which
unit is next, what it is sent, its claim, its files and their flushes, what has to be looked up. The
stored run is then read: listed, asked for its demonstrations, started again with nothing to do, and
loaded as a table.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from rich.console import Console

from sparse_tickets.ceilings import BUSY, Neighbours
from sparse_tickets.sweep.cells import units_before
from sparse_tickets.sweep.engines import run
from sparse_tickets.sweep.experts import DEMONSTRATIONS, EXPERTS
from sparse_tickets.sweep.integrity import Manifest
from sparse_tickets.sweep.rows import COLUMNS, to_parquet
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store, load_results, spec_hash
from sparse_tickets.sweep.tensors import checksum, dump_tensors
from sparse_tickets.sweep.unit import MANIFEST, ROWS, TICKETS, Unit
from sparse_tickets.ticket import ROWS as WEIGHTS
from sparse_tickets.ticket import Ticket, dump_tickets

from .pretended_ray import PretendedRay
from .results import RecordFile, header
from .tables import grid

SIZES = (1_000, 10_000, 100_000)
# As sweeps are by default: what large files cost.
_LARGE = (400, 64, (64, 64))
_SLOTS = 4000
_AT_ONCE = 40


def spec_of(units: int, chunk: int = 1, hidden: tuple[int, ...] = (8,)) -> Sweep:
    """A sweep of about so many units: 20 levels, four conditions, units of so many tracks."""
    seeds = max(1, round(units * chunk / (2 * (1 + 19 * 4))))
    return Sweep(seeds=seeds, levels=20, chunk=chunk, hidden=hidden)


class Trainer:
    """Gives at once what training a unit would, and counts what it is given.

    Args:
        spec: the sweep.

    Attributes:
        seconds: that it took itself.
        units: that it was asked for.
        devices: that it was to train on.
        returned: bytes it gave.
    """

    def __init__(self, spec: Sweep) -> None:
        self._spec, self._hash = spec, spec_hash(spec.to_dict())
        self._trained: set[Unit] = set()
        self._data = dump_tensors({"obs": torch.zeros(1)}, DEMONSTRATIONS, self._hash)
        self._inputs = {DEMONSTRATIONS: checksum({"obs": torch.zeros(1)})}
        self._like: dict[tuple[str, int], dict[str, bytes]] = {}
        self.seconds, self.units, self.returned = 0.0, 0, 0
        self.devices: set[str] = set()

    def __call__(
        self,
        spec: Mapping[str, Any],
        unit: Unit,
        device: str,
        before: Mapping[Unit, Any],
        data: Mapping[str, Any],
        plugins: Any,
    ) -> tuple[dict[str, bytes], list[str]]:
        begin = time.perf_counter()
        files = self._files(unit, set(before), data)
        self._trained.add(unit)
        self.devices.add(device)
        self.units += 1
        self.returned += sum(map(len, files.values()))
        self.seconds += time.perf_counter() - begin
        return files, []

    def _files(self, unit: Unit, before: set[Unit], data: Mapping[str, Any]) -> dict[str, bytes]:
        """
        Raises:
            RuntimeError: it is asked for twice, or before what it is trained from.
        """
        if unit == EXPERTS:
            return {f"{DEMONSTRATIONS}.safetensors": self._data}
        tracks = self._spec.together(unit.level, unit.chunk)
        needed = set(units_before(self._spec, unit, tracks))
        taught = unit.algo not in self._spec.imitating or data[DEMONSTRATIONS] is not None
        if unit in self._trained or not taught or before != needed or not needed <= self._trained:
            raise RuntimeError(f"{unit.name} came too early or twice")
        files = self._like.get((unit.algo, unit.level))
        if files is None:
            files = self._like[unit.algo, unit.level] = self._made(unit, tracks)
        inputs = self._inputs if unit.algo in self._spec.imitating else {}
        manifest = Manifest.of(
            unit.name, self._hash, rows=len(tracks), tickets=len(tracks), inputs=inputs, files=files
        )
        return files | {MANIFEST: manifest.to_bytes()}

    def _made(self, unit: Unit, tracks: list[Track]) -> dict[str, bytes]:
        """Rows and tickets as large as those of a real unit of this level."""
        spec = self._spec
        arena = spec.arena(unit.algo)
        kinds = {
            "string": "x",
            "int64": 0,
            "double": 1.5,
            "bool": False,
            "list<double>": [2.0] * 20,
        }
        row = {name: kinds[kind] for name, kind in COLUMNS.items()}
        mask = torch.arange(arena.prunable) < spec.kept(unit.algo, unit.level)
        weights = torch.randn(arena.size, generator=torch.Generator().manual_seed(unit.level))
        weights[: arena.prunable] *= mask
        origin = {"env": spec.env, "algo": unit.algo, "level": unit.level}
        rows, tickets = [], []
        for track in tracks:
            about = origin | asdict(track)
            rows.append(row | about)
            tickets.append(Ticket.of(arena, mask=mask, **dict.fromkeys(WEIGHTS, weights), **about))
        return {ROWS: to_parquet(rows), TICKETS: dump_tickets(tickets)}


def simulate(
    spec: Sweep, folder: Path, *, slots: int = _SLOTS, at_once: int = _AT_ONCE
) -> dict[str, float]:
    """Run a sweep on a pretended cluster.

    Args:
        spec: the sweep.
        folder: for the store; empty or not there.
        slots: tasks that run at once.
        at_once: tasks that end between two looks of the driver.

    Returns:
        Counts, bytes per unit, and milliseconds of the driver per unit.

    Raises:
        RuntimeError: a unit was trained too early, twice or not at all.
    """
    trainer = Trainer(spec)
    cluster = PretendedRay(slots, at_once, trainer)
    with cluster.installed():
        seconds = _seconds(lambda: run(spec, folder, engine="ray"))
        store = Store(folder)
        units = len(store.units())
        wanted = sum(1 for algo in spec.algos for _ in spec.units(algo))
        if units != wanted or trainer.units != wanted + bool(spec.imitating):
            raise RuntimeError(f"{units} units are stored and {trainer.units} ran, not {wanted}")
        found: dict[str, float] = {
            "units": units,
            "most at once": cluster.most_running,
            "driver": 1e3 * (seconds - trainer.seconds) / units,
            "bytes returned": trainer.returned / units,
            "bytes sent": cluster.put_bytes / units,
        }
    return found


def reading(spec: Sweep, folder: Path, units: int) -> Iterator[tuple[str, float]]:
    """Read a simulated run in several ways: each and its milliseconds per unit."""
    store = Store(folder)

    def again() -> None:
        with PretendedRay(_SLOTS).installed():
            run(spec, folder, engine="ray")

    timed: dict[str, Callable[[], object]] = {
        "listing": store.units,
        "demonstrations": lambda: store.check_inputs("bc", DEMONSTRATIONS),
        "again": again,
        "table": lambda: load_results(folder),
    }
    for name, act in timed.items():
        yield name, 1e3 * _seconds(act) / units


def time_ray(tasks: int, in_flight: int, size: int) -> dict[str, float]:
    """Milliseconds of Ray's own per task that returns ``size`` bytes, as the driver uses it.

    Args:
        tasks: how many.
        in_flight: submitted and not taken in, at most.
        size: bytes that each returns.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=1)(lambda size: bytes(size))
        ray.get([task.remote(size) for _ in range(100)])
        running: set[Any] = set()
        left = tasks
        begin = time.perf_counter()
        while left or running:
            while left and len(running) < in_flight:
                running.add(task.remote(size))
                left -= 1
            here = list(running)
            ray.wait(here, num_returns=1, timeout=1)
            done, _ = ray.wait(here, num_returns=len(here), timeout=0)
            for each in done:
                ray.get(each)
            running.difference_update(done)
        seconds = time.perf_counter() - begin
        return {"tasks": tasks, "in flight": in_flight, "bytes": size, "ms": 1e3 * seconds / tasks}
    finally:
        ray.shutdown()


def run_scheduling(
    console: Console,
    sizes: Sequence[int] = SIZES,
    out: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Simulate sweeps of several sizes, and time Ray alone where it is installed; write results.

    Args:
        console: where progress and the table go.
        sizes: units of each sweep, about.
        out: default: results/scheduling/<device>-<date>.json, with the table beside it. What it
            has of other sizes stays.
        folder: where stores are written and deleted again: the disk that is measured.

    Returns:
        The file written.
    """
    file = RecordFile("scheduling", table, 1, out)
    about_run = {"run": header(file.run)}
    for kind in [*((size,) for size in sizes), _LARGE]:
        spec, place = spec_of(*kind), Path(mkdtemp(dir=folder))
        neighbours = Neighbours()
        try:
            about = {"chunk": spec.chunk, "files": _file_system(place)}
            found: dict[str, Any] = simulate(spec, place / "run") | about
            console.print(f"{found['units']:,} units: {found['driver']:.2f} ms of the driver each")
            for name, milliseconds in reading(spec, place / "run", found["units"]):
                found |= {name: milliseconds, "busy": neighbours.share()}
                file.add(found | about_run, partial(_same, found, ("units", "chunk", "files")))
        finally:
            shutil.rmtree(place)
    if find_spec("ray") is not None:
        for in_flight in (64, 8016):
            neighbours = Neighbours()
            found = time_ray(10_000, in_flight, 1 << 16)
            found |= {"busy": neighbours.share()}
            file.add(found | about_run, partial(_same, found, ("in flight",)))
    console.print(str(file), highlight=False, soft_wrap=True)
    return file.path


def _file_system(place: Path) -> str:
    """The kind of file system that a folder is in; where Linux does not say, ``unknown``."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [mount for mount in mounts if place.resolve().is_relative_to(mount[0])]
    return max(above, key=lambda mount: len(mount[0]))[1]


def _same(record: dict[str, Any], names: Sequence[str], other: dict[str, Any]) -> bool:
    return all(record[name] == other.get(name) for name in names)


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds per unit as Markdown."""
    names = {
        "driver": "driver",
        "listing": "listing",
        "demonstrations": "whose demonstrations",
        "again": "again, nothing to do",
        "table": "table",
    }
    heads = ["units", "tickets", "files in", *names.values(), "bytes returned", "bytes sent"]
    rows, lines = [], []
    for record in sorted(
        (r for r in records if "units" in r), key=lambda r: (r["chunk"], r["units"])
    ):
        mark = "~" if record["busy"] > BUSY else ""
        times = [f"{mark}{record[name]:.3f}" if name in record else "" for name in names]
        sizes = [f"{record[name]:,.0f}" for name in ("bytes returned", "bytes sent")]
        about = [f"{record['units']:,}", f"{record['chunk']}", record["files"]]
        rows.append([*about, *times, *sizes])
    lines.append(
        "Milliseconds and bytes per unit; ~: other processes used more than "
        f"{BUSY:.0%} of the cores."
    )
    for record in (r for r in records if "tasks" in r):
        mark = "~" if record["busy"] > BUSY else ""
        lines.append(
            f"Ray alone, {record['bytes']:,} bytes a task, {record['in flight']:,} under way: "
            f"{mark}{record['ms']:.3f} ms a task."
        )
    return "\n".join([grid(heads, rows, text=0), "", *lines]) + "\n"


def _seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
