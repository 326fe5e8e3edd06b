"""Faults put into a run of the store: kills at every write, stops, and what a power cut leaves.

As a program it forks processes of its own, prints how many faults there were, and ends with an
error where one did harm:

    python tests/faults.py kill JOB FOLDER STEP       one process, killed at every STEP-th write
    python tests/faults.py crowd JOB FOLDER ROUNDS LOCKS   several on one store, killed and stopped
"""

import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sparse_tickets import files
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.sweep import experts, locks
from sparse_tickets.sweep import run as run_module
from sparse_tickets.sweep.data import checksum, read_data, write_data
from sparse_tickets.sweep.rows import COLUMNS
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.sweep.unit import DATA, Unit
from sparse_tickets.ticket import ROWS, Ticket

SPEC = Sweep(
    conditions=("mask/weights", "random/re-init"),
    seeds=2,
    levels=2,
    hidden=(4,),
    rewind_step=64,
    chunk=3,
    ppo=PPO(steps=128, horizon=16),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=Evaluation(points=1, episodes=1, final_episodes=2),
)
UNITS = (Unit("ppo", 0, 0), Unit("ppo", 1, 0))
_ARENA = Arena.build((4, 3, 2))


def write_units(out: Path) -> None:
    """The store's part of a sweep: two units and a data set, nothing trained."""
    store = Store.open(out, {"levels": 2})
    if read_data(store, "experts") is None:
        write_data(store, "experts", {"weight": torch.arange(6.0)})
    for unit in UNITS:
        while not store.has(unit):
            with store.claim(unit) as mine:
                if mine and not store.has(unit):
                    rewind = {"weight": torch.ones(1, 3)} if unit.level == 0 else None
                    store.write(unit, [_row(unit)], [_ticket(unit)], rewind=rewind)
            if not mine:
                time.sleep(0.01)


def _row(unit: Unit) -> dict[str, Any]:
    kinds = {"string": "x", "int64": 0, "double": 1.5, "bool": False, "list<double>": [2.0]}
    row = {name: kinds[kind] for name, kind in COLUMNS.items()}
    return row | {"algo": unit.algo, "level": unit.level}


def _ticket(unit: Unit) -> Ticket:
    weights = {name: torch.linspace(0, 1, _ARENA.size) for name in ROWS}
    return Ticket.of(
        _ARENA,
        mask=torch.ones(_ARENA.prunable, dtype=torch.bool),
        **weights,
        env="x",
        algo=unit.algo,
        seed=0,
        condition="mask/weights",
        controls="own",
        level=unit.level,
    )


JOBS: dict[str, Callable[[Path], object]] = {
    "units": write_units,
    "sweep": lambda out: run(SPEC, out),
}


def contents(out: Path) -> dict[str, str]:
    """Digests of all that a run's folder gives to who reads it, times aside."""
    store = Store(out)
    found = {}
    for unit in store.units():
        for index, ticket in enumerate(store.read_tickets(unit)):
            found[f"{unit.name} {index}"] = checksum(
                {name: getattr(ticket, name) for name in ("mask", *ROWS)}
            )
        rewind = store.read_rewind(unit)
        if rewind is not None:
            found[f"{unit.name} rewind"] = checksum(rewind)
    for name in DATA:
        data = read_data(store, name)
        if data is not None:
            found[name] = checksum(data)
    frame = load_results(out)
    times = [name for name in ("wall_s", "train_s") if name in frame.columns]
    return found | {"table": frame.drop(times).write_json()}


@contextmanager
def watched(before: Callable[[str], None]) -> Iterator[None]:
    """Call ``before`` with a name at every step that changes a disk, just before it is done.

    The contents of a file are written in two steps: a process may die in between.
    """

    busy = False
    here = threading.current_thread()

    def step(name: str) -> None:
        """What is done on the way is no step of its own; nor is a renewal, whenever that falls."""
        nonlocal busy
        if not busy and threading.current_thread() is here:
            busy = True
            try:
                before(name)
            finally:
                busy = False

    def stepping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            step(name)
            return function(*args, **settings)

        return call

    def open_stepping(path: Any, flags: int, *args: Any, **settings: Any) -> int:
        if flags & os.O_CREAT:
            step("create")
        return os_open(path, flags, *args, **settings)

    def write_synced(path: Path, data: bytes) -> None:
        step("create")
        with open(path, "x+b", buffering=0) as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                step("write")
                file.write(part)
            os.fsync(file.fileno())

    os_open = os.open
    names = ["fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "unlink", "write"]
    patches = [mock.patch.object(os, name, stepping(name, getattr(os, name))) for name in names]
    patches.append(mock.patch.object(os, "open", open_stepping))
    patches.append(mock.patch.object(files, "_write_synced", write_synced))
    with _all(patches):
        yield


@contextmanager
def _all(patches: list[Any]) -> Iterator[None]:
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def steps_of(job: Callable[[Path], object], out: Path) -> list[str]:
    """The steps of a job, by name."""
    steps: list[str] = []
    with watched(steps.append):
        job(out)
    return steps


def at_step(number: int, fault: Callable[[], None]) -> Callable[[str], None]:
    """Something for `watched` that lets a fault happen at the step of this number, from 0."""
    left = number

    def before(name: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            fault()

    return before


def kill_everywhere(job: Callable[[Path], object], folder: Path, step: int) -> int:
    """Kill a job at every ``step``-th write, go on, and compare; how many kills.

    Raises:
        AssertionError: a kill that changed what is read afterwards.
    """
    os.fsync = lambda descriptor: None  # What a process wrote outlives it unflushed.
    job(folder / "whole")
    expected = contents(folder / "whole")
    names = steps_of(job, folder / "counted")
    points = range(0, len(names), step)
    for point in points:
        out = folder / f"killed-{point}"
        child = os.fork()
        if child == 0:
            with watched(at_step(point, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                job(out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"step {point} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        job(out)
        assert contents(out) == expected, f"killed before step {point}, {names[point]}"
        shutil.rmtree(out)
    return len(points)


class Disk:
    """What is on a disk for certain: files and folders as they were when they were last flushed.

    ``fsync`` takes note; `after_power_cut` builds what a cut at this moment could leave.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._contents: dict[int, bytes] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._is_folder: dict[int, bool] = {}
        # Of files held open no number is given to another.
        self._held: list[int] = []
        descriptor = os.open(root, os.O_RDONLY)
        self.fsync(descriptor)
        os.close(descriptor)

    def fsync(self, descriptor: int) -> None:
        """Take note of a file or folder as it is now."""
        status = os.fstat(descriptor)
        self._held.append(os.dup(descriptor))
        if stat.S_ISDIR(status.st_mode):
            entries = {}
            for entry in os.scandir(descriptor):
                entries[entry.name] = self._number(entry)
            self._entries[status.st_ino] = entries
        else:
            self._contents[status.st_ino] = os.pread(descriptor, status.st_size, 0)

    def _number(self, entry: os.DirEntry[str]) -> int:
        status = entry.stat(follow_symlinks=False)
        self._is_folder[status.st_ino] = stat.S_ISDIR(status.st_mode)
        return status.st_ino

    def close(self) -> None:
        """Let go of all files."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()

    def after_power_cut(self, out: Path, kind: str, draw: random.Random) -> None:
        """Build a disk after a cut.

        Args:
            out: where.
            kind: ``least``: nothing but what was flushed; ``empty`` and ``zeros``: every name as it
                is now, with nothing or zeros in files not flushed; ``mixed``: one of these for
                each folder and file.
            draw: for ``mixed``.
        """
        self._build(self.root.stat().st_ino, self.root, out, kind, draw)

    def _build(
        self, inode: int, now: Path | None, out: Path, kind: str, draw: random.Random
    ) -> None:
        """Build a folder, from what was flushed of it and what it is ``now``."""
        out.mkdir()
        flushed = self._entries.get(inode, {})
        current = {}
        if now is not None:
            for entry in os.scandir(now):
                current[entry.name] = self._number(entry)
        places = {number: now / name for name, number in current.items()} if now else {}
        here = draw.choice(("least", "empty", "zeros")) if kind == "mixed" else kind
        for name, number in (flushed if here == "least" else current).items():
            place = places.get(number)
            if self._is_folder[number]:
                self._build(number, place, out / name, kind, draw)
                continue
            data = self._contents.get(number, b"")
            if number not in self._contents and here == "zeros" and place is not None:
                data = bytes(place.stat().st_size)
            (out / name).write_bytes(data)


def crowd(job: Callable[[Path], object], folder: Path, rounds: int, has_locks: bool) -> int:
    """Let 2 to 4 processes do a job on one store, killed, replaced, and stopped; how many signals.

    Stops last up to three leases, so that claims are taken over from processes that go on later. So
    do some writes of some processes, whose disk is slow; and their clocks jump by decades.

    Args:
        job: what each does.
        folder: where.
        rounds: how often, each time with other moments.
        has_locks: whether the kernel's locks decide who is dead, or leases alone.

    Raises:
        AssertionError: a unit was lost, stored twice, or is not what one process alone makes.
    """
    os.fsync = lambda descriptor: None
    locks.RENEW_S, locks.LEASE_S = 0.02, 0.2
    run_module.POLL_S = experts.POLL_S = 0.02
    if not has_locks:
        locks.fcntl = None  # type: ignore[assignment]
    job(folder / "whole")
    expected = contents(folder / "whole")
    signals = 0
    for number in range(rounds):
        draw = random.Random(number)
        out, log = folder / f"crowd-{number}", folder / f"log-{number}"
        workers = {_worker(job, out, log, draw.random()) for _ in range(draw.randint(2, 4))}
        left = 12
        while workers:
            time.sleep(draw.uniform(0.001, 0.03))
            for worker in list(workers):
                ended, status = os.waitpid(worker, os.WNOHANG)
                if ended:
                    workers.remove(worker)
                    assert os.WIFSIGNALED(status) or status == 0, f"round {number}: {status}"
                    if os.WIFSIGNALED(status):
                        workers.add(_worker(job, out, log, draw.random()))
            if workers and left:
                left -= 1
                signals += 1
                worker = draw.choice(sorted(workers))
                if draw.random() < 0.5:
                    os.kill(worker, signal.SIGKILL)
                else:
                    os.kill(worker, signal.SIGSTOP)
                    time.sleep(draw.uniform(0, 3 * locks.LEASE_S))
                    os.kill(worker, signal.SIGCONT)
        assert contents(out) == expected, f"round {number}"
        stored = log.read_text().split()
        assert len(stored) == len(set(stored)), f"round {number}: stored twice: {stored}"
        assert not list(out.rglob("*.damaged*")), f"round {number}"
    return signals


def _worker(job: Callable[[Path], object], out: Path, log: Path, seed: float) -> int:
    """Fork a process that does a job and notes each unit it stored; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    write = Store.write

    def noted(store: Store, unit: Unit, *args: Any, **settings: Any) -> bool:
        stored = write(store, unit, *args, **settings)
        if stored:
            with open(log, "a") as file:
                file.write(f"{unit.name}\n")
        return stored

    draw = random.Random(seed)
    time.time = lambda: draw.uniform(0, 4e9)
    slow = 0.03 if draw.random() < 0.4 else 0.0

    def linger(name: str) -> None:
        if draw.random() < slow:
            time.sleep(1.5 * locks.LEASE_S)

    try:
        with mock.patch.object(Store, "write", noted), watched(linger):
            job(out)
        status = 0
    finally:
        os._exit(status)


def main(fault: str, job: str, folder: str, count: str, kernel_locks: str = "") -> None:
    torch.set_num_threads(1)  # A fork must not have threads of OpenMP behind it.
    if fault == "kill":
        print(kill_everywhere(JOBS[job], Path(folder), int(count)))
    else:
        print(crowd(JOBS[job], Path(folder), int(count), kernel_locks == "locks"))


if __name__ == "__main__":
    main(*sys.argv[1:])
