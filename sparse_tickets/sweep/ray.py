"""Run a sweep on a Ray cluster: each unit is a task, and the driver alone keeps the store.

A task gets the files of the units that its own is trained from, and returns its own files: no
machine but the driver's needs to see the store. Ray runs a task again whose process, machine or
memory is gone; it gives the same, so that the table does not depend on where anything ran.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.sweep.data import data_file, read_data
from sparse_tickets.sweep.experts import DEMONSTRATIONS, EXPERTS, refuse_guessing
from sparse_tickets.sweep.progress import expert_steps
from sparse_tickets.sweep.run import Progress, Runner, begin, units_before
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import DATA, Store, Unit
from sparse_tickets.sweep.tensors import checksum, parse_tensors

__all__ = ["run"]

_RETRIES = 10
_POLL_S = 0.5

Files = Mapping[str, bytes]


def run(
    spec: Sweep,
    out: str | Path,
    *,
    overwrite: bool = False,
    address: str | None = None,
    gpus_per_chunk: float = 0.0,
    on_progress: Progress | None = None,
) -> Store:
    """Train every cell of a sweep that the store does not hold yet, on a Ray cluster.

    As `sparse_tickets.sweep.run.run`, whose table it gives. A cluster that this process is
    connected to is used as it is, and stays connected.

    Args:
        spec: what to run.
        out: folder of the store, on the machine of this process.
        overwrite: throw away the run that the folder holds, of whatever specification.
        address: of the cluster, or ``auto``; None starts one on this machine.
        gpus_per_chunk: share of a GPU that a unit takes; 0 trains on CPUs.
        on_progress: called as units are finished.

    Returns:
        The store, complete.

    Raises:
        ValueError: Ray is not installed, or what the sweep asks for cannot work.
        StoreError: the folder belongs to another specification, the disk is full, or a task was
            lost more often than Ray may repeat it.
        ExpertError: behavioural cloning found too few experts.
        MemoryError: there is too little for a single ticket.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install 'sparse-tickets[ray]'") from error
    store = begin(spec, out, overwrite)
    notify = on_progress or (lambda description, steps: None)
    connected = ray.is_initialized()
    if not connected:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address, include_dashboard=False if address is None else None)
    try:
        with _Driver(spec, store, gpus_per_chunk, notify) as driver:
            driver.run()
    finally:
        if not connected:
            ray.shutdown()
    return store


@dataclass
class _Task:
    """A unit under way, or the experts."""

    unit: Unit
    tracks: Sequence[Track]
    claim: ExitStack


class _Driver:
    def __init__(self, spec: Sweep, store: Store, gpus: float, notify: Progress) -> None:
        import ray

        self._ray = ray
        self._spec = spec
        self._store = store
        self._notify = notify
        self._runner = Runner(spec, store, torch.device("cpu"), notify)
        self._device = "cuda" if gpus else "cpu"
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES}
        self._remote = ray.remote(**options)(_train)
        self._running: dict[Any, _Task] = {}
        self._under_way: set[Unit] = set()
        self._files: dict[Unit | str, Any] = {}

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *failure: object) -> None:
        """Stop what still runs, and let go of its claims."""
        for reference, task in self._running.items():
            self._ray.cancel(reference, force=True)
            task.claim.close()

    def run(self) -> None:
        """Submit what may run, take in what is done, until nothing is left."""
        algorithms = [self._algorithm(algo) for algo in self._spec.algos]
        while algorithms:
            algorithms = [each for each in algorithms if next(each, None) is not None]
            if self._running:
                done, _ = self._ray.wait(list(self._running), timeout=_POLL_S)
                for reference in done:
                    self._take_in(reference)
            elif algorithms:
                time.sleep(_POLL_S)
            self._notify(f"{len(self._running)} units on Ray", 0)

    def _algorithm(self, algo: str) -> Iterator[bool]:
        """Submit the units of an algorithm, level by level; yields while some are to come."""
        if algo in self._spec.imitating:
            while not self._has_demonstrations():
                yield True
        levels: dict[int, list[tuple[Unit, Sequence[Track]]]] = {}
        for level, chunk, tracks in self._spec.units(algo):
            levels.setdefault(level, []).append((Unit(algo, level, chunk), tracks))
        for level, units in levels.items():
            self._forget(algo, level)
            left = list(units)
            while left := [each for each in left if not self._is_done(*each)]:
                yield True
        if algo in self._spec.imitating:
            self._runner.teacher.check(algo)

    def _has_demonstrations(self) -> bool:
        if read_data(self._store, DEMONSTRATIONS) is not None:
            return True
        refuse_guessing(self._spec, self._store)
        self._submit(EXPERTS, ())
        return False

    def _is_done(self, unit: Unit, tracks: Sequence[Track]) -> bool:
        """Whether a unit is stored; submitted if not, and if nobody works on it."""
        if unit in self._under_way:
            return False
        if self._runner.is_stored(unit):
            steps = len(tracks) * self._spec.train_steps(unit.algo, unit.level)
            self._notify(self._runner.describe(unit), steps)
            return True
        self._submit(unit, tracks)
        return False

    def _submit(self, unit: Unit, tracks: Sequence[Track]) -> None:
        # As many as can run, and some to follow: each holds a claim that is kept alive.
        if unit in self._under_way:
            return
        if len(self._running) >= 16 + 2 * int(self._ray.cluster_resources().get("CPU", 0)):
            return
        claim = ExitStack()
        if not claim.enter_context(self._store.claim(unit)):
            claim.close()
            return
        try:
            before = units_before(self._spec, unit, tracks) if tracks else []
            data = DATA if unit.algo in (*self._spec.imitating, EXPERTS.algo) else ()
            reference = self._remote.remote(
                self._spec.to_dict(),
                unit,
                self._device,
                {each: self._reference(each) for each in before},
                {name: self._data(name) for name in data},
            )
        except BaseException:
            claim.close()
            raise
        self._running[reference] = _Task(unit, tracks, claim)
        self._under_way.add(unit)

    def _reference(self, unit: Unit) -> Any:
        """A unit's files, put into the cluster's memory once."""
        if unit not in self._files:
            self._files[unit] = self._ray.put(self._store.files(unit))
        return self._files[unit]

    def _forget(self, algo: str, level: int) -> None:
        """Let the cluster forget files that no unit from this level on is trained from."""
        for known in list(self._files):
            if isinstance(known, Unit) and known.algo == algo and 0 < known.level < level - 2:
                del self._files[known]

    def _data(self, name: str) -> Any:
        """A data set's file, put into the cluster's memory once; None if there is none yet."""
        if name not in self._files:
            if read_data(self._store, name) is None:
                return None
            self._files[name] = self._ray.put(data_file(self._store, name).read_bytes())
        return self._files[name]

    def _take_in(self, reference: Any) -> None:
        """Store what a task returned, and say what it had to say."""
        task = self._running.pop(reference)
        self._under_way.remove(task.unit)
        with task.claim:
            try:
                files, said = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except (
                self._ray.exceptions.WorkerCrashedError,
                self._ray.exceptions.OutOfMemoryError,
                self._ray.exceptions.NodeDiedError,
            ) as error:
                raise StoreError(
                    f"{task.unit.name} was lost {_RETRIES + 1} times with its process or machine. "
                    f"Finished units are safe; run the same command again ({error})"
                ) from error
            for line in said:
                warnings.warn(line, stacklevel=2)
            if task.unit == EXPERTS:
                self._store_data(files)
                self._notify("experts", expert_steps(self._spec))
            else:
                self._store.adopt(task.unit, files)

    def _store_data(self, files: Files) -> None:
        """Store experts and demonstrations, unless others were there when units were trained."""
        path = data_file(self._store, DEMONSTRATIONS)
        made = parse_tensors(path, files[path.name], DEMONSTRATIONS, self._store.spec_hash)
        for algo in self._spec.imitating:
            self._store.check_inputs(algo, DEMONSTRATIONS, checksum(made))
        for name, content in files.items():
            write_atomic(self._store.data / name, content, replace=False)


def _train(
    spec: Mapping[str, Any],
    unit: Unit,
    device: str,
    before: Mapping[Unit, Any],
    data: Mapping[str, Any],
) -> tuple[Files, list[str]]:
    """A task: train a unit, or the experts, in a store of its own; their files, and warnings."""
    import ray

    sweep = Sweep.from_dict(dict(spec))
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        store = Store.open(folder, sweep.to_dict())
        for each, files in before.items():
            store.adopt(each, ray.get(files))
        for name, content in data.items():
            if content is not None:
                write_atomic(data_file(store, name), ray.get(content))
        runner = Runner(sweep, store, torch.device(device), lambda description, steps: None)
        if unit == EXPERTS:
            runner.teacher.make()
            paths = [data_file(store, name) for name in DATA]
            found: Files = {path.name: path.read_bytes() for path in paths}
        else:
            tracks = next(
                tracks
                for level, chunk, tracks in sweep.units(unit.algo)
                if (level, chunk) == (unit.level, unit.chunk)
            )
            runner.finish(unit, tracks)
            found = store.files(unit)
    return found, [str(each.message) for each in said]
