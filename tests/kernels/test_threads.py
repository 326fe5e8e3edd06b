"""Tickets shared out to threads, and torch's own thread count left as it was."""

import threading
import time
import weakref

import pytest
import torch

from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.threads import (
    _Helpers,
    claim,
    count_threads,
    finish,
    over_tickets,
    share,
)


@pytest.fixture
def threads():
    """Set torch's thread count for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tickets", [0, 1, 2, 7, 60])
def test_slices_partition_the_tickets(count, tickets, threads):
    threads(count)
    done, lock = [], threading.Lock()

    def work(thread, begin, end):
        with lock:
            assert 0 <= thread < count_threads(tickets)
            done.extend(range(begin, end))

    over_tickets(tickets, work)
    assert sorted(done) == list(range(tickets))


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_in_a_slice_reaches_the_caller(count, threads):
    threads(count)

    def work(thread, begin, end):
        if begin <= 8 < end:
            raise ValueError("ticket 8")

    with pytest.raises(ValueError, match="ticket 8"):
        over_tickets(9, work)


def test_several_callers_at_once(threads):
    threads(2)
    sums = [0] * 6

    def call(index):
        lock = threading.Lock()

        def work(thread, begin, end):
            with lock:
                sums[index] += sum(range(begin, end))

        over_tickets(100, work)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(sums))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == [4950] * len(sums)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tickets", [0, 1, 2, 60])
def test_every_ticket_is_claimed_once(count, tickets, threads):
    threads(count)
    done, lock = [], threading.Lock()

    def work(thread, progress):
        while (ticket := claim(progress)) < tickets:
            with lock:
                done.append(ticket)
            finish(progress)

    share(tickets, work)
    assert sorted(done) == list(range(tickets))


def test_a_slow_helper_is_waited_for_and_its_error_raised(threads):
    threads(2)
    claimed = threading.Event()

    def work(thread, progress, error=None):
        if thread == 0:
            # The helper claims first.
            claimed.wait(10)
        while claim(progress) < 4:
            if thread == 1:
                claimed.set()
                time.sleep(0.05)
                if error is not None:
                    raise error
            finish(progress)
            done.append(thread)

    done = []
    share(4, work)
    assert len(done) == 4
    assert 1 in done
    claimed.clear()
    with pytest.raises(ValueError, match="helper"):
        share(4, lambda thread, progress: work(thread, progress, ValueError("helper")))


def test_helpers_keep_nothing_alive(threads):
    threads(2)

    class Data:
        pass

    data = Data()
    gone = weakref.ref(data)
    share(2, lambda thread, progress, data=data: [finish(progress), finish(progress)])
    del data
    for _ in range(100):
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None


def test_a_helper_that_wakes_up_late_kept_nothing_alive(threads, monkeypatch):
    threads(2)
    asleep = []
    monkeypatch.setattr(_Helpers, "start", lambda self, calls: asleep.extend(calls))

    class Data:
        pass

    data = Data()
    gone = weakref.ref(data)
    share(2, lambda thread, progress, data=data: [finish(progress), finish(progress)])
    del data
    (late,) = asleep
    assert gone() is None
    late()


@pytest.mark.parametrize("count", [1, 2])
def test_a_parallel_launch_leaves_torchs_thread_count(count, threads):
    # Large enough for a parallel region: Numba's OpenMP layer then sets torch's count too.
    threads(count)
    scores = torch.rand(4, 100_000)
    prune(scores, torch.ones_like(scores, dtype=torch.bool), 10)
    assert torch.get_num_threads() == count
