"""Work shared out to torch's own threads: every item once, errors, forks, other runtimes."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numba import njit

from sparse_tickets.kernels import threads as kernel_threads
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.threads import WORTH_A_THREAD, count_threads, share


@njit(nogil=True)
def _square(thread, item, x, seen):
    seen[thread, item] += 1
    if x[item] < 0:
        raise ValueError("negative")
    x[item] = x[item] ** 2


@njit(nogil=True)
def _square_all(threads, x, seen):
    share(_square, threads, x.shape[0], (x, seen))


@njit(nogil=True)
def _work_long(thread, item, taken, result):
    taken[item] = thread
    value = 0.5
    for _ in range(20_000_000):
        value = value * 0.999 + 0.001
    result[item] = value


@njit(nogil=True)
def _work_twice(threads, taken, result):
    share(_work_long, threads, 2, (taken, result))


@pytest.fixture
def threads():
    """Set torch's thread count for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's", "python's", "none"])
def runtime(request, monkeypatch):
    """The threads of each runtime that kernels may find."""
    found = kernel_threads._fork.value
    if request.param != "torch's":
        run = {"python's": kernel_threads._run_in_python, "none": kernel_threads._run_alone}
        kernel_threads._fork.value = kernel_threads._address(run[request.param])
    yield request.param
    kernel_threads._fork.value = found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 1000])
def test_every_item_is_taken_once(items, threads, runtime):
    x, seen = np.arange(items, dtype=np.float64), np.zeros((threads, items), np.int64)
    _square_all(threads, x, seen)
    assert (seen.sum(0) == 1).all()
    assert (x == np.arange(items) ** 2.0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_reaches_the_caller_and_ends_the_launch(threads, runtime):
    x = np.arange(100_000, dtype=np.float64)
    x[8] = -1
    seen = np.zeros((threads, x.size), np.int64)
    with pytest.raises(ValueError, match="negative"):
        _square_all(threads, x, seen)
    assert seen[:, 8].sum() == 1
    x[8] = 1
    _square_all(threads, x, seen)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("runtime", ["torch's", "python's"], indirect=True)
def test_threads_run_at_once(runtime):
    # Tens of milliseconds: time enough for another thread to wake up and take the other item.
    taken, result = np.full(2, -1), np.zeros(2)
    _work_twice(2, taken, result)
    assert sorted(taken) == [0, 1]


def test_torch_offers_its_threads_on_linux():
    if sys.platform != "linux":
        pytest.skip("OpenMP runtimes of other systems may not speak GNU's interface")
    assert kernel_threads._find_fork() is not kernel_threads._run_in_python


def test_a_launch_takes_no_more_threads_than_its_work_pays_for(threads):
    threads(4)
    assert count_threads(8, 0) == count_threads(8, 2 * WORTH_A_THREAD - 1) == 1
    assert count_threads(8, 2 * WORTH_A_THREAD) == 2
    assert count_threads(8, 3.5 * WORTH_A_THREAD) == 3
    assert count_threads(8, float("inf")) == 4
    assert count_threads(3, float("inf")) == 3
    assert count_threads(1, float("inf")) == count_threads(0, float("inf")) == 1


def test_several_callers_at_once(runtime):
    rows = [np.full(1000, index, np.float64) for index in range(6)]
    _square_all(2, np.zeros(1), np.zeros((2, 1), np.int64))

    def call(row):
        for _ in range(20):
            seen = np.zeros((2, row.size), np.int64)
            _square_all(2, row, seen)
            assert (seen.sum(0) == 1).all()
            np.sqrt(row, out=row)

    callers = [threading.Thread(target=call, args=(row,)) for row in rows]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for index, row in enumerate(rows):
        assert (row == index).all()


@pytest.mark.parametrize("count", [1, 2])
def test_a_parallel_launch_leaves_torchs_thread_count(count, threads):
    threads(count)
    scores = torch.rand(4, 100_000)
    prune(scores, torch.ones_like(scores, dtype=torch.bool), 10)
    assert torch.get_num_threads() == count


_FORK = """
import multiprocessing
import torch
from sparse_tickets.kernels.prune import prune

scores = torch.rand(4, 100_000)
mask = torch.ones_like(scores, dtype=torch.bool)

def keep(k):
    return int(prune(scores, mask, k).sum())

if __name__ == "__main__":
    torch.set_num_threads(2)
    assert keep(10) == 40
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(keep, [1, 2, 3]) == [4, 8, 12]
    assert keep(10) == 40
"""


@pytest.mark.long
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")
def test_a_forked_child_works_after_a_parallel_launch(tmp_path):
    # In a process of its own: forking the one with pytest's threads in it is another matter.
    script = tmp_path / "fork.py"
    script.write_text(_FORK)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
