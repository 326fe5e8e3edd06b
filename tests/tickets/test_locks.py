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
    locks._claims.clear()
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


def eventually(happened):
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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

        monkeypatch.setattr(files.os, "link", refused)
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
        monkeypatch.setattr(locks, "_renewal", None)
        other = lock.with_name("other.lock")
        claim, second = locks.acquire(lock), locks.acquire(other)
        first = lock.read_text()
        eventually(lambda: lock.read_text() not in (first, ""))
        assert lock.read_text().split()[:3] == first.split()[:3]
        taken = ELSEWHERE.format(count=0)
        lock.write_text(taken)
        seen = other.read_text()
        eventually(lambda: other.read_text() not in (seen, ""))  # all were renewed once more
        assert lock.read_text() == taken
        claim.release()
        second.release()
        assert lock.read_text() == taken
        assert not other.exists()

    def test_a_renewal_never_ends_up_in_another_file(self, lock):
        """Where a daemon closes all files that it did not open, their numbers are given anew."""
        claim = locks.acquire(lock)
        other = lock.with_name("results")
        other.write_text("results")
        with open(other, "r+b") as file:
            os.dup2(file.fileno(), claim._descriptor)
        before = lock.read_text()
        claim._renew()
        assert other.read_text() == "results"
        assert lock.read_text() != before
        claim.release()

    def test_one_thread_renews_however_many_claims_there_are(self, lock):
        before = threading.active_count()
        claims = [locks.acquire(lock.with_name(f"{number}.lock")) for number in range(50)]
        assert threading.active_count() <= before + 1
        for claim in claims:
            claim.release()
        assert list(lock.parent.iterdir()) == []

    def test_a_claim_says_whether_it_was_left_by_a_dead_one(self, lock):
        claim = locks.acquire(lock)
        assert not claim.inherited
        claim.release()
        lock.write_text(f"9@here {locks._machine()} left 0000000000\n")
        claim = locks.acquire(lock)
        assert claim.inherited
        claim.release()


class Died(BaseException):
    """What a process that is killed does: nothing more."""


class Process(threading.Thread):
    """A process of an `Exploration`: runs until its next step, then waits to be told to go on."""

    def __init__(self, number, exploration):
        super().__init__(daemon=True)
        self.number = number
        self.exploration = exploration
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.dead = self.done = self.working = self.has_worked = False
        self.seen = []
        self.tokens = itertools.count()

    def run(self):
        with contextlib.suppress(Died):
            self._work()
        self.done = True
        self.working = False
        self.stopped.release()

    def _work(self):
        claim = locks.acquire(self.exploration.lock)
        if claim is None:
            return
        try:
            self.working = self.has_worked = True
            self.step("work", lambda: None)
            self.working = False
            claim.release()
        finally:
            if claim._descriptor >= 0:
                os.close(claim._descriptor)
                claim._descriptor = -1
                locks._claims.discard(claim)

    def step(self, name, act):
        """Wait for our turn, act, and remember what came of it."""
        if not self.dead:
            self.stopped.release()
            self.go.acquire()
        if self.dead:
            raise Died
        try:
            result = act()
        except OSError as error:
            self.seen.append((name, error.errno))
            raise
        self.seen.append((name, result if isinstance(result, bool | str | None) else "done"))
        return result

    def proceed(self, dies=False):
        """Do one step, or die before it."""
        self.dead |= dies
        self.go.release()
        self.stopped.acquire()


class Exploration:
    """Every order of the steps of some processes at one lock, with some of them dying anywhere.

    A step is whatever others can see, or sees others. What a process does next follows from what
    its steps gave so far; so two orders after which the files and all that was seen are the same
    have the same future, and one of them is enough.
    """

    def __init__(self, folder, processes, deaths, switches, monkeypatch):
        self.lock = folder / "unit.lock"
        self.number = processes
        self.deaths = deaths
        self.switches = switches
        self.processes = []
        monkeypatch.setattr(locks.Claim, "_renew", lambda claim: None)
        for owner, name, described in (
            (locks, "_said", "read"),
            (locks, "_is_silent", "wait"),
            (locks, "_kernel_lock", "probe"),
            (locks.Claim, "_close", "close"),
            (os, "link", "link"),
            (os, "unlink", "unlink"),
        ):
            monkeypatch.setattr(owner, name, self._stepping(getattr(owner, name), described))
        monkeypatch.setattr(locks.secrets, "token_hex", self._token)

    def _stepping(self, function, described):
        def call(*args, **settings):
            process = threading.current_thread()
            # What only this process sees is no step: its temporary file and its lock on that.
            own = described == "unlink" and args[0].name.startswith(".")
            if described == "probe":
                own = not settings.get("shared")
            if own or not isinstance(process, Process):
                return function(*args, **settings)
            return process.step(described, lambda: function(*args, **settings))

        return call

    def _token(self, length):
        process = threading.current_thread()
        if isinstance(process, Process):
            return f"{process.number}-{next(process.tokens)}"
        return "rest"

    def is_dead(self, said):
        """Who fell silent, by what a lock file says: the kernel's answer, had it one."""
        token = said.split(" ")[2]
        number = token.partition("-")[0]
        return token == "left" or self.processes[int(number)].done

    def follow(self, choices, known):
        """Do as told, then whatever comes first, until a known state; the choices left open."""
        for file in self.lock.parent.iterdir():
            file.unlink()
        self.lock.write_text(f"9@here {locks._machine()} left 0000000000\n")
        self.processes = [Process(number, self) for number in range(self.number)]
        for process in self.processes:
            process.start()
            process.stopped.acquire()
        ahead, opened = list(reversed(choices)), []
        choices = ()
        try:
            while True:
                if not ahead:
                    state, following = self._state(choices)
                    if not following:
                        self._check_end(choices)
                    if state in known or not following:
                        known.add(state)
                        return opened
                    known.add(state)
                    first, *others = following
                    opened += [(*choices, each) for each in others]
                    ahead.append(first)
                number, dies = ahead.pop()
                choices = (*choices, (number, dies))
                self.processes[number].proceed(dies)
                assert sum(each.working for each in self.processes) <= 1, choices
        finally:
            for process in self.processes:
                if not process.done:
                    process.proceed(dies=True)
                process.join()

    def _state(self, choices):
        """All that tells this state from others, and what may come next."""
        numbers = [each.number for each in self.processes if not each.done]
        state = (
            tuple((tuple(each.seen), each.dead) for each in self.processes),
            tuple(
                sorted(
                    (file.name, file.read_text())
                    for file in self.lock.parent.iterdir()
                    if not file.name.startswith(".")
                )
            ),
        )
        dying = sum(dies for _, dies in choices) < self.deaths
        if self.switches is not None:
            order = [number for number, _ in choices]
            last = order[-1] if order else None
            used = sum(one != other for one, other in itertools.pairwise(order))
            state = state, last, used
            # Who is done hands over for nothing.
            if last in numbers and used >= self.switches:
                numbers = [last]
        return state, [
            (number, dies) for number in numbers for dies in (False, True) if dying or not dies
        ]

    def _check_end(self, choices):
        """Nobody waits for ever; and what was left lying about is only what the dead left."""
        if not any(each.dead for each in self.processes):
            assert any(each.has_worked for each in self.processes), choices
            assert not list(self.lock.parent.iterdir()), choices
        assert free(self.lock), choices
        assert not self.lock.exists()

    def explore(self):
        """Every state there is; how many."""
        known, ways = set(), [()]
        while ways:
            ways += self.follow(ways.pop(), known)
        return len(known)


@pytest.fixture(params=["kernel locks", "leases"])
def explore(request, tmp_path, monkeypatch):
    """An exploration by the kernel's word or, without it, by leases that end with their owners."""

    def prepared(processes, deaths, switches=None):
        if request.param == "leases":
            refuse_kernel_locks(monkeypatch)
        exploration = None
        monkeypatch.setattr(locks, "_is_silent", lambda file, said: exploration.is_dead(said))
        exploration = Exploration(tmp_path, processes, deaths, switches, monkeypatch)
        return exploration.explore()

    return prepared


def test_no_order_of_steps_gives_a_dead_ones_lock_to_two(explore):
    assert explore(2, deaths=0) > 100


@pytest.mark.slow
def test_no_order_of_steps_and_deaths_gives_a_lock_to_two(explore):
    found = explore(2, deaths=2)
    print(found, "states of two processes with up to two deaths")
    assert found > 1000


@pytest.mark.slow
def test_few_switches_between_three_give_a_lock_to_one(explore):
    found = explore(3, deaths=0, switches=2)
    print(found, "states of three processes")
    assert found > 300


def test_the_exploration_finds_a_name_that_is_taken_twice(explore, monkeypatch):
    monkeypatch.setattr(os, "link", lambda temporary, file: os.replace(temporary, file))
    with pytest.raises(AssertionError):
        explore(2, deaths=0)
