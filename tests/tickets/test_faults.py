"""A run killed, interrupted, refused or without power at any write: afterwards the same table."""

import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import faults
import pytest

from sparse_tickets.files import StoreError
from sparse_tickets.sweep import experts, locks
from sparse_tickets.sweep import run as run_module
from sparse_tickets.sweep.store import Store

KINDS = ("least", "empty", "zeros", "mixed")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """What a process wrote outlives it without; `faults.Disk` pretends to flush."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def short_lease(monkeypatch):
    """Of a lock whose contents were lost nobody knows whether its owner is on this machine."""
    monkeypatch.setattr(locks, "LEASE_S", 0.01)
    for module in (run_module, experts):
        monkeypatch.setattr(module, "POLL_S", 0.02)


@pytest.fixture
def bare_disk(monkeypatch):
    """Neither hard links nor locks of the kernel, as some network disks have it."""

    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def inflict(*what):
    """Faults in processes that another one forks; how many."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, faults.__file__, *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr
    print(*what, done.stdout.strip())
    return int(done.stdout)


@pytest.mark.long
def test_killed_at_writes_of_a_unit(tmp_path):
    assert inflict("kill", "units", tmp_path, 4) > 15


@pytest.mark.slow
@pytest.mark.parametrize(("job", "least"), [("units", 60), ("sweep", 150)])
def test_killed_at_every_write(job, least, tmp_path):
    assert inflict("kill", job, tmp_path, 1) > least


@pytest.mark.long
def test_several_processes_on_one_store_killed_and_stopped(tmp_path):
    assert inflict("crowd", "units", tmp_path, 4, "leases") > 4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["locks", "leases"])
def test_several_processes_on_one_sweep_killed_and_stopped(kernel, tmp_path):
    assert inflict("crowd", "sweep", tmp_path, 20, kernel) > 150


class Interrupted(KeyboardInterrupt):
    pass


def interrupt():
    raise Interrupted


def interrupt_everywhere(job, folder, step):
    """Raise what a second Ctrl-C or SIGTERM raises at every step-th write; how often."""
    job(folder / "whole")
    expected = faults.contents(folder / "whole")
    points = range(0, len(faults.steps_of(job, folder / "counted")), step)
    for point in points:
        out = folder / f"interrupted-{point}"
        with pytest.raises(Interrupted), faults.watched(faults.at_step(point, interrupt)):
            job(out)
        job(out)
        assert faults.contents(out) == expected, point
        shutil.rmtree(out)
    print(len(points), "interrupts")
    return len(points)


def test_interrupted_at_writes_of_a_unit(tmp_path):
    assert interrupt_everywhere(faults.JOBS["units"], tmp_path, 2) > 30


@pytest.mark.usefixtures("short_lease", "bare_disk")
def test_interrupted_on_a_bare_disk(tmp_path):
    assert interrupt_everywhere(faults.JOBS["units"], tmp_path, 3) > 20


@pytest.mark.slow
@pytest.mark.usefixtures("short_lease", "bare_disk")
def test_interrupted_at_every_write_to_a_bare_disk(tmp_path):
    assert interrupt_everywhere(faults.JOBS["sweep"], tmp_path, 1) > 150


@pytest.mark.slow
@pytest.mark.parametrize(("job", "least"), [("units", 60), ("sweep", 150)])
def test_interrupted_at_every_write(job, least, tmp_path):
    assert interrupt_everywhere(faults.JOBS[job], tmp_path, 1) > least


def refuse_everywhere(job, folder, step, codes):
    """Let the disk refuse every step-th write, in each way; how often."""
    job(folder / "whole")
    expected = faults.contents(folder / "whole")
    points = range(0, len(faults.steps_of(job, folder / "counted")), step)
    for code, point in itertools.product(codes, points):
        out = folder / f"refused-{code}-{point}"

        def refuse(code=code):
            raise OSError(code, os.strerror(code))

        with (
            pytest.raises(StoreError, match=r"no space left|cannot be written"),
            faults.watched(faults.at_step(point, refuse)),
        ):
            job(out)
        job(out)
        assert faults.contents(out) == expected, (code, point)
        shutil.rmtree(out)
    print(len(codes) * len(points), "refusals")
    return len(codes) * len(points)


def test_a_disk_that_refuses_writes_of_a_unit(tmp_path):
    codes = (errno.ENOSPC, errno.EROFS)
    assert refuse_everywhere(faults.JOBS["units"], tmp_path, 3, codes) > 40


@pytest.mark.slow
@pytest.mark.parametrize(("job", "step"), [("units", 1), ("sweep", 3)])
def test_a_disk_that_refuses_any_write(job, step, tmp_path):
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    assert refuse_everywhere(faults.JOBS[job], tmp_path, step, codes) > 200


def cut_power_everywhere(job, folder, step, kinds):
    """Cut the power at every step-th write, in each way a disk may look then; how often."""
    job(folder / "whole")
    expected = faults.contents(folder / "whole")
    home, out = folder / "home", Path("of", "mine", "run")
    home.mkdir()
    disk = faults.Disk(home)
    cuts, stored = [], []
    write = Store.write
    steps = itertools.count()

    def write_unit(store, unit, *args, **settings):
        written = write(store, unit, *args, **settings)
        stored.append(unit)
        return written

    def cut(name):
        number = next(steps)
        for kind in kinds if number % step == 0 else ():
            place = folder / f"cut-{len(cuts)}"
            disk.after_power_cut(place, kind, random.Random(len(cuts)))
            cuts.append((place / out, f"before {name}, step {number}: {kind}", tuple(stored)))

    with (
        mock.patch.object(os, "fsync", disk.fsync),
        mock.patch.object(Store, "write", write_unit),
        faults.watched(cut),
    ):
        job(home / out)
    disk.close()
    for place, case, kept in cuts:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for unit in kept:
                assert Store(place).has(unit), f"lost what was stored: {case}"
            job(place)
        assert faults.contents(place) == expected, case
    print(len(cuts), "power cuts")
    return len(cuts)


@pytest.mark.long
@pytest.mark.usefixtures("short_lease")
def test_without_power_at_writes_of_a_unit(tmp_path):
    assert cut_power_everywhere(faults.JOBS["units"], tmp_path, 3, KINDS) > 80


@pytest.mark.slow
@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize(("job", "step"), [("units", 1), ("sweep", 4)])
def test_without_power_at_every_write(job, step, tmp_path):
    assert cut_power_everywhere(faults.JOBS[job], tmp_path, step, KINDS) > 150
