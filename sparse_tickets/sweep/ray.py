"""Run sweeps on a Ray cluster: each unit is a task, and the driver alone keeps the stores.

A task gets the files of the units that its own is trained from, and returns its own files: no
machine but the driver's needs to see a store. Ray runs a task again whose process, machine or
memory is gone; it gives the same, so that the table does not depend on where anything ran.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparse_tickets.algos.teaching import ExpertError
from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.sweep.cells import units_before
from sparse_tickets.sweep.data import data_file, read_data
from sparse_tickets.sweep.experts import DEMONSTRATIONS, EXPERTS, refuse_guessing
from sparse_tickets.sweep.plugins import load_source, places_told
from sparse_tickets.sweep.progress import expert_steps
from sparse_tickets.sweep.rows import from_parquet
from sparse_tickets.sweep.run import Progress, Runner, begin, find_device
from sparse_tickets.sweep.schedule import UnitSchedule
from sparse_tickets.sweep.shown import Shown
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.tensors import checksum, parse_tensors
from sparse_tickets.sweep.unit import DATA, ROWS, Unit
from sparse_tickets.tracking import Tracker

__all__ = ["run"]

_RETRIES = 10
_POLL_S = 0.5
_WRITERS = 16
# How long the size of the cluster is taken for what it was.
_SIZE_S = 5.0

Files = Mapping[str, bytes]


def run(
    sweeps: Mapping[str, Sweep],
    folders: Mapping[str, Path],
    *,
    overwrite: bool,
    address: str | None,
    gpus_per_chunk: float,
    plugins: Sequence[str | Path],
    trackers: Mapping[str, Tracker | None],
    on_progress: Progress,
) -> dict[str, Store | ExpertError]:
    """Train every cell of some sweeps that their stores do not hold yet, on one Ray cluster.

    The first sweeps come first, the others fill the cluster up. A cluster that this process is
    connected to is used as it is, and stays connected.

    Args:
        sweeps: by name.
        folders: of their stores by name, on the machine of this process.
        overwrite: throw away the runs that the folders hold, of whatever specification.
        address: of the cluster, or ``auto``; None starts one on this machine.
        gpus_per_chunk: share of a GPU that a unit takes; 0 trains on CPUs.
        plugins: Python files, loaded here already, that are sent along and run first.
        trackers: by name, shown the returns of units as they are finished.
        on_progress: called as units are finished.

    Returns:
        Of each sweep its store, complete; or that cloning found too few experts, where all else is.

    Raises:
        ValueError: Ray is not installed, or what a sweep asks for cannot work.
        StoreError: a folder belongs to another specification, the disk is full, or a task was lost
            more often than Ray may repeat it.
        MemoryError: there is too little for a single ticket.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install 'sparse-tickets[ray]'") from error
    jobs = [
        _Job(name, spec, begin(spec, folders[name], overwrite), trackers[name])
        for name, spec in sweeps.items()
    ]
    with _connected(ray, address), _Driver(ray, gpus_per_chunk, plugins, on_progress) as driver:
        driver.run(jobs)
    return {job.name: job.failure or job.store for job in jobs}


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Be connected to a cluster; one that this process is connected to already stays so."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    # Without an address Ray would join a cluster that it finds, or wait for one that is dead.
    ray.init(address=address or "local", include_dashboard=None if address else False)
    # Ray takes the signal over, and would end the process at once.
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


class _Job:
    """A sweep that is run: what is left of it, and what the cluster knows of it."""

    def __init__(self, name: str, spec: Sweep, store: Store, tracker: Tracker | None) -> None:
        self.name, self.spec, self.store = name, spec, store
        self.sent_spec = spec.to_dict()
        self.runner = Runner(spec, store, torch.device("cpu"), lambda description, steps: None)
        self.schedule = UnitSchedule(spec)
        self.shown = Shown(spec, tracker)
        # What other processes work on.
        self.elsewhere: list[Unit] = []
        # References of files that tasks are sent.
        self.files: dict[Unit | str, Any] = {}
        self.failure: ExpertError | None = None

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit is stored; or demonstrations, which must be those of stored units."""
        if unit != EXPERTS:
            return self.runner.is_stored(unit)
        if self.spec.bc.dataset:  # which need to be on this machine alone
            self.runner.teacher.make()
        made = read_data(self.store, DEMONSTRATIONS)
        if made is None:
            refuse_guessing(self.spec, self.store)
            return False
        for algo in self.spec.imitating:
            self.store.check_inputs(algo, DEMONSTRATIONS, checksum(made))
        return True

    def finish(self, unit: Unit) -> int:
        """Let others run, and files go that none needs any more; the agent-steps that are done."""
        for each in self.schedule.finish(unit):
            self.files.pop(each, None)
        if unit == EXPERTS:
            return expert_steps(self.spec)
        return len(self.spec.together(unit.level, unit.chunk)) * self.spec.train_steps(
            unit.algo, unit.level
        )

    def describe(self, unit: Unit) -> str:
        prefix = f"{self.name}: " if self.name else ""
        return prefix + ("experts" if unit == EXPERTS else self.runner.describe(unit))

    def check(self) -> None:
        """Look at what is complete as a whole."""
        for algo in self.spec.imitating if self.failure is None else ():
            self.runner.teacher.check(algo)


@dataclass
class _Task:
    """A unit under way, or experts."""

    job: _Job
    unit: Unit
    claim: ExitStack = field(default_factory=ExitStack)


class _Driver:
    def __init__(
        self, ray: Any, gpus: float, plugins: Sequence[str | Path], notify: Progress
    ) -> None:
        self._ray = ray
        self._notify = notify
        self._gpus = gpus
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES}
        self._remote = ray.remote(**options)(_train)
        sources = {str(Path(file).resolve()): Path(file).read_bytes() for file in plugins}
        self._plugins = ray.put(sources)
        self._running: dict[Any, _Task] = {}
        self._most, self._sized = 0, -_SIZE_S
        self._writers = ThreadPoolExecutor(_WRITERS, "store")

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *failure: object) -> None:
        """Stop what still runs, and let go of its claims."""
        with ExitStack() as left:
            left.callback(self._writers.shutdown)
            for task in self._running.values():
                left.callback(task.claim.close)
            for reference in self._running:
                self._ray.cancel(reference, force=True)

    def run(self, jobs: Sequence[_Job]) -> None:
        """Submit what may run, take in what is done, until nothing is left."""
        while True:
            for job in jobs:
                while len(self._running) < self._room() and self._submit(job):
                    pass
            waiting = [job for job in jobs if job.elsewhere]
            if self._running:
                self._take_in()
            elif waiting:
                time.sleep(_POLL_S)
            else:
                break
            for job in waiting:
                job.schedule.put_back(job.elsewhere)
                job.elsewhere = []
            self._notify(f"{len(self._running)} units on Ray", 0)
        for job in jobs:
            job.check()

    def _room(self) -> int:
        """How many tasks to have under way: all that can run, and as many to follow.

        Each holds a claim that is kept alive.
        """
        if time.monotonic() - self._sized > _SIZE_S:
            there = self._ray.cluster_resources()
            slots = there.get("CPU", 0)
            if self._gpus:
                gpus = there.get("GPU", 0)
                slots = min(slots, gpus / self._gpus)
                if gpus < self._gpus:
                    # More machines may come; Ray waits for them.
                    warnings.warn(
                        f"waiting for GPUs: the cluster has {gpus:g}, a unit takes {self._gpus:g}",
                        stacklevel=2,
                    )
            self._most, self._sized = 16 + 2 * int(slots), time.monotonic()
        return self._most

    def _submit(self, job: _Job) -> bool:
        """Submit a job's next unit that is neither stored nor worked on; False if there is none."""
        while (unit := job.schedule.pop()) is not None:
            if job.is_done(unit):
                self._finish(job, unit)
                continue
            task = _Task(job, unit)
            if not task.claim.enter_context(job.store.claim(unit)):
                task.claim.close()
                job.elsewhere.append(unit)
                continue
            try:
                # Another process may have finished it a moment ago.
                if job.is_done(unit):
                    task.claim.close()
                    self._finish(job, unit)
                    continue
                self._running[self._start(job, unit)] = task
            except BaseException:
                task.claim.close()
                raise
            return True
        return False

    def _start(self, job: _Job, unit: Unit) -> Any:
        before: list[Unit] = []
        if unit != EXPERTS:
            tracks = job.spec.together(unit.level, unit.chunk)
            before = units_before(job.spec, unit, tracks)
        taught = unit.algo in (*job.spec.imitating, EXPERTS.algo)
        return self._remote.remote(
            job.sent_spec,
            unit,
            "cuda" if self._gpus else "cpu",
            {each: self._reference(job, each) for each in before},
            {name: self._data(job, name) for name in (DATA if taught else ())},
            self._plugins,
        )

    def _reference(self, job: _Job, unit: Unit) -> Any:
        """A unit's files, put into the cluster's memory once."""
        if unit not in job.files:
            job.files[unit] = self._ray.put(job.store.files(unit))
        return job.files[unit]

    def _data(self, job: _Job, name: str) -> Any:
        """A data set's file, put into the cluster's memory once; None if there is none yet."""
        if name not in job.files:
            if read_data(job.store, name) is None:
                return None
            job.files[name] = self._ray.put(data_file(job.store, name).read_bytes())
        return job.files[name]

    def _take_in(self) -> None:
        """Wait for a task, and store what it and all others that are done returned."""
        under_way = list(self._running)
        done, _ = self._ray.wait(under_way, num_returns=1, timeout=_POLL_S)
        if done:
            done, _ = self._ray.wait(under_way, num_returns=len(under_way), timeout=0)
        returned = [(self._running[each], self._returned(each)) for each in done]
        # Side by side: of storing a unit most is waiting for the disk.
        for _ in self._writers.map(self._store, *zip(*returned, strict=True)) if done else ():
            pass
        for reference, (task, files) in zip(done, returned, strict=True):
            self._running.pop(reference).claim.close()
            if files:
                self._finish(task.job, task.unit)
            if task.job.shown.wanted and ROWS in files:
                task.job.shown.level(from_parquet(files[ROWS]), curves=True)

    def _returned(self, reference: Any) -> Files:
        """The files a task returned, once what it had to say is said; none without experts."""
        task = self._running[reference]
        try:
            files, said = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ExpertError):
                raise error.cause from error
            task.job.failure = error.cause
            return {}
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
        return files

    def _store(self, task: _Task, files: Files) -> None:
        """Store a unit; or experts and demonstrations, unless units were trained on others."""
        spec, store = task.job.spec, task.job.store
        if task.unit != EXPERTS:
            store.adopt(task.unit, files)
            return
        if not files:
            return
        path = data_file(store, DEMONSTRATIONS)
        made = parse_tensors(path, files[path.name], DEMONSTRATIONS, store.spec_hash)
        for algo in spec.imitating:
            store.check_inputs(algo, DEMONSTRATIONS, checksum(made))
        for name, content in files.items():
            write_atomic(store.data / name, content, replace=False)

    def _finish(self, job: _Job, unit: Unit) -> None:
        self._notify(job.describe(unit), job.finish(unit))


def _train(
    spec: Mapping[str, Any],
    unit: Unit,
    device: str,
    before: Mapping[Unit, Any],
    data: Mapping[str, Any],
    plugins: Mapping[str, bytes],
) -> tuple[Files, list[str]]:
    """A task: train a unit, or the experts, in a store of its own; their files, and warnings."""
    import ray

    for place, source in plugins.items():
        load_source(place, source)
    sweep = Sweep.from_dict(dict(spec))
    with (
        TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as said,
        places_told(plugins),
    ):
        warnings.simplefilter("default")
        store = Store.open(folder, sweep.to_dict())
        for each, files in before.items():
            store.adopt(each, ray.get(files))
        for name, content in data.items():
            if content is not None:
                write_atomic(data_file(store, name), ray.get(content))
        runner = Runner(sweep, store, find_device(device), lambda description, steps: None)
        if unit == EXPERTS:
            runner.teacher.make()
            paths = [data_file(store, name) for name in DATA]
            found: Files = {path.name: path.read_bytes() for path in paths if path.exists()}
        else:
            runner.finish(unit, sweep.together(unit.level, unit.chunk))
            found = store.files(unit)
    return found, [str(each.message) for each in said]
