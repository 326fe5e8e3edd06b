"""The Ray engine on a cluster of two nodes: the local table, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest

from sparse_tickets import run_sweep
from sparse_tickets.sweep.engines import run_study
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.store import Store, StoreError
from sparse_tickets.sweep.unit import Unit

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    # Of Ray's own processes and sockets.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DRIVER = """
import sys
import faults
from sparse_tickets import run_sweep
run_sweep(faults.SPEC, sys.argv[1], engine="ray", address=sys.argv[2])
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("ray") / "local"
    run(faults.SPEC, out)
    return faults.contents(out)


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    tests = str(Path(faults.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def finished_units(out):
    return len(Store(out).units()) if (out / "spec.json").exists() else 0


def test_two_nodes_give_the_local_table(cluster, expected, tmp_path):
    steps = []
    run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=lambda _, done: steps.append(done))
    assert faults.contents(tmp_path) == expected
    assert sum(steps) == total_steps(faults.SPEC)
    assert not list((tmp_path / "units").glob("*.lock*"))
    # Nothing is left to do, for either engine.
    run(faults.SPEC, tmp_path)
    assert faults.contents(tmp_path) == expected


def test_a_node_that_goes_and_workers_that_are_killed(cluster, expected, tmp_path):
    done = []

    def harm(description, steps):
        if "units on Ray" not in description or len(done) == 2:
            return
        if not done and finished_units(tmp_path) >= 1:
            cluster.remove_node(cluster.second, allow_graceful=False)
            done.append("node")
        elif done:
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    named = process.read_bytes()
                except OSError:
                    continue
                if named.startswith(b"ray::_train"):
                    os.kill(int(process.parent.name), signal.SIGKILL)
                    done.append("worker")
                    return

    run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=harm)
    assert done == ["node", "worker"]
    assert faults.contents(tmp_path) == expected


def test_a_driver_that_is_killed_and_started_again(cluster, expected, tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), cluster.address])
    deadline = time.monotonic() + 300
    while finished_units(tmp_path) < 2:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert finished_units(tmp_path) < len(list(faults.SPEC.units("ppo"))) * 2
    run_sweep(faults.SPEC, tmp_path, engine="ray")
    assert faults.contents(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_says_how_to_resume(number, cluster, tmp_path):
    spec = ["--algos", "ppo", "--seeds", "2", "--levels", "40", "--hidden", "4", "--chunk", "1"]
    small = ["--ppo.steps", "128", "--ppo.horizon", "16", "--evaluation.points", "1"]
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "sparse_tickets.cli", "sweep", *spec, *small),
            *("--out", str(tmp_path), "--engine", "ray", "--address", cluster.address),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while finished_units(tmp_path) < 1:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(number)
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number, text
    assert "run the same command again to resume" in " ".join(text.split())
    assert "Traceback" not in text
    assert {entry.suffix for entry in (tmp_path / "units").iterdir()} == {""}
    store = Store(tmp_path)
    assert all(store.has(unit) for unit in store.units())


def test_a_study_with_a_part_of_a_gpu_for_each_unit(cluster, expected, tmp_path):
    """Two sweeps at once; and where a machine says that it has a GPU, and torch that it has not."""
    found = run_study({"one": faults.SPEC, "two": faults.SPEC}, tmp_path, engine="ray")
    for name in found:
        assert faults.contents(tmp_path / name) == expected
    cluster.add_node(num_cpus=2, num_gpus=1)
    with pytest.raises(ValueError, match="device must be one torch has here, got 'cuda'"):
        run_sweep(faults.SPEC, tmp_path / "gpu", engine="ray", gpus_per_chunk=0.25)
    assert not list((tmp_path / "gpu" / "units").iterdir())


def test_a_unit_that_another_process_works_on_is_left_to_it(cluster, expected, tmp_path):
    store = Store.open(tmp_path, faults.SPEC.to_dict())
    claim = store.claim(Unit("ppo", 0, 0))
    assert claim.__enter__()
    seen = []

    def wait(description, steps):
        seen.append(finished_units(tmp_path))
        if seen[-1] == 1 + len([1 for level, *_ in faults.SPEC.units("bc") if level]):
            claim.__exit__(None, None, None)

    run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=wait)
    assert faults.contents(tmp_path) == expected


def test_what_goes_wrong_in_a_task_is_what_went_wrong(cluster, tmp_path):
    from dataclasses import replace

    from sparse_tickets.algos.teaching import ExpertError

    spec = replace(faults.SPEC, bc=replace(faults.SPEC.bc, expert_gate=1e9), algos=("bc",))
    with pytest.raises(ExpertError):
        run_sweep(spec, tmp_path, engine="ray")
    with pytest.raises(StoreError, match="holds another run"):
        run_sweep(faults.SPEC, tmp_path, engine="ray")
