"""Claims: by the kernel on one machine, by leases between machines; every order of their steps."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparse_tickets import files
from sparse_tickets.files import StoreError
from sparse_tickets.sweep import locks

# Claims a lock, says so, and holds it until its input ends.
HOLD = """
import sys
from pathlib import Path
from sparse_tickets.sweep import locks
claim = locks.acquire(Path(sys.argv[1]))
print("held" if claim else "refused", flush=True)
sys.stdin.read()
if claim:
    claim.release()
"""


@pytest.fixture
def lock(tmp_path):
    locks._seen.clear()
    return tmp_path / "unit.lock"


@contextlib.contextmanager
def holder(lock, *wrapper):
    """A process of its own that claims a lock, and whether it got it."""
    child = subprocess.Popen(
        [*wrapper, sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.send_signal(signal.SIGCONT)
        child.kill()
        child.communicate()


class Clock:
    """A monotonic clock that tests move."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(locks.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def refuse_kernel_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def free(lock):
    claim = locks.acquire(lock)
    if claim is not None:
        claim.release()
    return claim is not None


class TestOneMachine:
    def test_one_holds_and_lets_go(self, lock):
        claim = locks.acquire(lock)
        assert locks.owner(lock).startswith(f"process {os.getpid()} on ")
        assert locks.acquire(lock) is None
        claim.release()
        claim.release()
        assert not lock.exists()
        assert list(lock.parent.iterdir()) == []
        assert free(lock)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_a_claim_ends_with_its_process(self, lock, number):
        with holder(lock) as (child, said):
            assert said == "held"
            assert not free(lock)
            child.send_signal(number)
            child.wait()
            assert lock.exists()
            assert free(lock)

    def test_a_stopped_process_keeps_its_claim(self, lock, clock):
        """However long: it may go on at any moment, and can be seen."""
        with holder(lock) as (child, _):
            child.send_signal(signal.SIGSTOP)
            for _ in range(4):
                assert not free(lock)
                clock.now += locks.LEASE_S
            child.send_signal(signal.SIGCONT)
            assert not free(lock)
            child.communicate("")
            assert free(lock)

    def test_containers_of_one_host_see_each_other(self, lock):
        """In a PID namespace of its own every process number means another process."""
        wrapper = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
        if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"]).returncode:
            pytest.skip("no PID namespaces here")
        with holder(lock, *wrapper) as (child, said):
            assert said == "held"
            assert locks.owner(lock).startswith("process 1 on ")
            assert not free(lock)
            with holder(lock, *wrapper) as (_, second):
                assert second == "refused"
            child.communicate("")
            assert free(lock)

    def test_a_forked_child_does_not_keep_its_parents_claim(self, lock):
        claim = locks.acquire(lock)
        event = multiprocessing.get_context("fork").Event()
        # As the workers of a vector environment: they may outlive a killed parent.
        pid = os.fork()
        if pid == 0:
            event.wait(30)
            claim.release()  # not its to release
            os._exit(0)
        try:
            assert lock.exists()
            os.close(claim._descriptor)  # what the kernel does to a killed process
            claim._released.set()
            claim._descriptor = -1
            deadline = time.monotonic() + 10
            while not (freed := free(lock)) and time.monotonic() < deadline:
                time.sleep(0.01)  # until the child has begun
            assert freed
        finally:
            event.set()
            os.waitpid(pid, 0)

    @pytest.mark.parametrize("kind", ["folder", "link"])
    def test_what_is_not_a_lock_file_is_named(self, lock, kind):
        if kind == "folder":
            lock.mkdir()
        else:
            lock.symlink_to(lock.parent / "elsewhere")
        with pytest.raises(StoreError, match=r"unit\.lock is not a lock file: delete it"):
            locks.acquire(lock)

    def test_a_folder_that_cannot_be_written(self, lock, monkeypatch):
        def refused(*_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(files.os, "fsync", refused)
        with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
            locks.acquire(lock)


ELSEWHERE = "7@far-away another-boot 00ff {count:010d}\n"


class TestLeases:
    """Between machines, and where the file system has no locks."""

    def test_a_process_elsewhere_is_waited_for_while_it_renews(self, lock, clock):
        for count in range(5):
            lock.write_text(ELSEWHERE.format(count=count))
            assert not free(lock)
            clock.now += locks.LEASE_S + 1
        assert free(lock)

    @pytest.mark.parametrize(
        "left", ["", "garbage", "123-456@host", ELSEWHERE.format(count=1), "\0" * 40]
    )
    @pytest.mark.parametrize("written", [0, 2**33], ids=["long ago", "in the future"])
    def test_a_silent_one_is_taken_over(self, lock, clock, left, written):
        """Whatever it says, and whenever some clock says that it was written."""
        lock.write_text(left)
        os.utime(lock, (written, written))
        assert not free(lock)
        clock.now += locks.LEASE_S - 1
        assert not free(lock)
        clock.now += 2
        assert free(lock)
        assert not lock.exists()

    def test_without_kernel_locks_leases_decide(self, lock, clock, monkeypatch):
        refuse_kernel_locks(monkeypatch)
        claim = locks.acquire(lock)
        assert not free(lock)
        clock.now += locks.LEASE_S - 1
        assert not free(lock)
        claim.release()
        assert free(lock)
        assert list(lock.parent.iterdir()) == []

    def test_owners_renew_and_stop_once_they_lost_the_claim(self, lock, monkeypatch):
        monkeypatch.setattr(locks, "RENEW_S", 0.01)
        claim = locks.acquire(lock)
        first = lock.read_text()
        deadline = time.monotonic() + 10
        while lock.read_text() in (first, "") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.read_text().split()[:3] == first.split()[:3]
        assert lock.read_text() != first
        taken = ELSEWHERE.format(count=0)
        lock.write_text(taken)
        claim._renewal.join(10)
        assert not claim._renewal.is_alive()
        claim.release()
        assert lock.read_text() == taken


class Schedule:
    """Runs threads one step at a time; a step ends at the next call of a watched function.

    ``choices`` says which thread goes next, as often as it tells; then the lowest that can.
    """

    def __init__(self, choices):
        self.choices = list(choices)
        self.turn = threading.Condition()
        self.running = None
        self.waiting = set()
        self.finished = set()

    def run(self, bodies):
        self.waiting = set(range(len(bodies)))
        threads = [
            threading.Thread(target=self._body, args=(number, body))
            for number, body in enumerate(bodies)
        ]
        for number, thread in enumerate(threads):
            thread.name = f"step-{number}"
            thread.start()
        with self.turn:
            while self.waiting:
                wanted = self.choices.pop(0) if self.choices else min(self.waiting)
                self.running = wanted if wanted in self.waiting else min(self.waiting)
                self.turn.notify_all()
                assert self.turn.wait_for(lambda: self.running is None, 20)
        for thread in threads:
            thread.join()

    def _body(self, number, body):
        self._wait(number)
        try:
            body()
        finally:
            with self.turn:
                self.waiting.discard(number)
                self.running = None
                self.turn.notify_all()

    def _wait(self, number):
        with self.turn:
            self.turn.wait_for(lambda: self.running == number)

    def step(self):
        """Let another thread go on, if it is its turn."""
        name = threading.current_thread().name
        if not name.startswith("step-"):
            return
        number = int(name.removeprefix("step-"))
        with self.turn:
            self.running = None
            self.turn.notify_all()
        self._wait(number)


WATCHED = {
    os: ("rename", "replace", "link", "open", "lstat", "unlink", "close", "ftruncate", "scandir"),
    Path: ("mkdir", "unlink", "read_bytes"),
}


def watch(monkeypatch, schedule):
    """Make every call that others can see, or that sees others, a step."""

    def stepping(function):
        def call(*args, **kwargs):
            schedule.step()
            return function(*args, **kwargs)

        return call

    for owner, functions in WATCHED.items():
        for name in functions:
            monkeypatch.setattr(owner, name, stepping(getattr(owner, name)))
    if locks.fcntl:
        monkeypatch.setattr(locks.fcntl, "flock", stepping(locks.fcntl.flock))


def schedules(steps, switches):
    """Orders of two threads with at most so many switches: who starts, and after how many steps."""
    for count in range(switches + 1):
        for gaps in itertools.product(range(1, steps, 1), repeat=count):
            if sum(gaps) < steps:
                for first in (0, 1):
                    order, thread = [], first
                    for gap in gaps:
                        order += [thread] * gap
                        thread = 1 - thread
                    yield order + [thread] * steps


def explore_takeover(path, switches, steps, monkeypatch):
    """Every order in which two processes ask for the lock that a dead one left; how many."""
    monkeypatch.setattr(locks.Claim, "_renew", lambda claim: None)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    number = 0
    for number, order in enumerate(schedules(steps, switches), 1):
        lock = path / f"{number}.lock"
        lock.write_text(f"9@here {locks._machine()} 00 0000000000\n")
        working, most, done = set(), [], []
        schedule = Schedule(order)

        def body(lock=lock, working=working, most=most, done=done, schedule=schedule):
            me = threading.current_thread().name
            claim = locks.acquire(lock)
            if claim is None:
                return
            working.add(me)
            most.append(len(working))
            schedule.step()
            working.discard(me)
            claim.release()
            done.append(me)

        with monkeypatch.context() as patch:
            watch(patch, schedule)
            schedule.run([body, body])
        assert max(most, default=0) == 1, order
        assert done, order
        assert not lock.exists(), order
    return number


def test_no_order_of_steps_gives_a_dead_ones_lock_to_two(tmp_path, monkeypatch):
    """The race at a lock that two find stale: all orders with one change of turns and back."""
    assert explore_takeover(tmp_path, 2, 18, monkeypatch) > 250


@pytest.mark.slow
def test_no_order_of_steps_gives_a_dead_ones_lock_to_two_with_three_switches(tmp_path, monkeypatch):
    assert explore_takeover(tmp_path, 3, 24, monkeypatch) > 3000
