"""`benchmarks.gpu` without a GPU: verified times, tuning, parts that fail or hang, and reports."""

import io
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import CPU, LATER, FakeTimer
from rich.console import Console

from benchmarks import clock, results
from benchmarks.clock import CudaTimer, HostTimer, compare
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process, sweep, tests
from benchmarks.gpu.report import gpu_tables, summary
from benchmarks.measure import Case, Contest, measure
from benchmarks.problems import distance, random_masks
from benchmarks.suites import targets
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.dispatch import has_triton
from sparse_tickets.timing import Budget, Contender, Unverified

pytestmark = pytest.mark.usefixtures("temporary_files")

ROOT = Path(__file__).parents[1]


def budget(rounds, limit=LATER):
    """A sample is one call: `FakeTimer` knows what it takes."""
    return Budget(rounds, 0.0, 0.0, limit, settle_seconds=0.0)


def test_contenders_are_timed_with_launches_replayed_and_cold():
    timer = FakeTimer(refuses=("peer",))
    ours = timer.contender("ours", 1e-3, error=0.5, units=2, plan="a plan")
    peer = timer.contender("peer", 4e-3, plan="another")
    case = Case("op", {}, 90.0, lambda: Contest(ours, [peer]), cold=True)
    record = measure(case, budget(3), "cpu", timer)
    found = record.contenders
    assert found["ours"].wall.median == pytest.approx(0.5e-3)
    assert found["ours"].replay.median == pytest.approx(0.25e-3)
    assert found["ours"].cold.median == pytest.approx(0.75e-3)
    assert found["ours"].wall.count == found["ours"].replay.count == 3
    assert (found["ours"].error, found["ours"].plan) == (0.5, "a plan")
    assert found["peer"].replay is None
    assert found["peer"].cold.median == pytest.approx(12e-3)
    assert found["peer"].plan == (
        "another; not captured in a graph: operation not permitted when stream is capturing"
    )
    # Each kind against the same kind; what cannot be captured by its direct calls.
    assert record.speedup["peer"].median == pytest.approx(8.0)
    assert record.replay_speedup["peer"].median == pytest.approx(16.0)
    assert record.cold_speedup["peer"].median == pytest.approx(16.0)


def test_what_costs_a_difference_is_not_captured():
    timer = FakeTimer()
    ours = timer.contender("ours", 5e-3, without=timer.contender("", 3e-3).run)
    found = compare(ours, [], budget(3), timer, cold=False)
    assert found.timings["ours"].wall == pytest.approx((2e-3,) * 3)
    assert (found.replay, found.cold) == ({}, {})


@pytest.mark.parametrize("error", [1.5, math.nan, math.inf])
def test_a_wrong_result_is_refused_before_anything_is_timed(error):
    timer = FakeTimer()
    ours, peer = timer.contender("ours", 1.0, error=error), timer.contender("peer", 1.0)
    with pytest.raises(Unverified, match="ours must match"):
        compare(ours, [peer], budget(3), timer)
    assert timer.now == 0


def test_a_peer_that_is_wrong_or_fails_is_left_out_by_name():
    timer = FakeTimer()

    def fails():
        raise RuntimeError("no compiler\nat all")

    peers = [
        timer.contender("wrong", 1.0, error=9.0),
        Contender("failing", fails, None),
        timer.contender("good", 1.0),
    ]
    found = compare(timer.contender("ours", 1.0), peers, budget(1), timer)
    assert list(found.timings) == ["ours", "good"]
    assert found.left_out["failing"] == "RuntimeError: no compiler"
    assert "its error is 9 times what is allowed" in found.left_out["wrong"]


def test_names_must_differ():
    timer = FakeTimer()
    one, other = timer.contender("one", 1.0), timer.contender("one", 1.0)
    with pytest.raises(ValueError, match="different names"):
        compare(one, [other], budget(1), timer)


def test_after_the_limit_three_rounds_are_enough():
    timer = FakeTimer()
    found = compare(timer.contender("ours", 1e-3), [], budget(9, limit=0.0), timer)
    assert [len(each["ours"]) for each in (found.replay, found.cold)] == [3, 3]
    assert len(found.timings["ours"].wall) == 3


def test_the_host_timer_takes_time():
    timer = HostTimer()
    assert timer.cold(lambda: time.sleep(0.002)) >= 0.002
    assert isinstance(clock.make_timer(CPU), HostTimer)


def test_cold_calls_are_tritons(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked = []

    def do_bench(run, **options):
        asked.append((run(), options["return_mode"]))
        return 3.0

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert CudaTimer.__new__(CudaTimer).cold(lambda: "ran") == 3e-3
    assert asked == [("ran", "median")]


class FakeCuda:
    """What `CudaTimer.capture` calls, in a list; a call may find out whether it may wait."""

    def __init__(self):
        self.calls, self.mode = [], "default"

    def synchronize(self):
        self.calls.append("synchronize")

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextmanager
    def graph(self, graph, stream):
        self.calls.append("capture")
        yield


def test_a_call_that_waits_is_refused_before_it_is_captured(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(clock.torch, "cuda", cuda)
    timer = CudaTimer.__new__(CudaTimer)
    timer._stream, timer.spoiled = None, False

    def waits():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timer.capture(waits)
    assert cuda.mode == "default"
    assert not timer.spoiled
    assert "capture" not in cuda.calls

    replay = timer.capture(lambda: "found")
    assert replay() == "found"
    assert cuda.calls[-1] == "replay"

    def breaks():
        if "capture" in cuda.calls:
            raise RuntimeError("operation not permitted when stream is capturing")

    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        timer.capture(breaks)
    assert timer.spoiled


def test_masks_drawn_on_the_device_keep_equally_many_and_differ():
    mask = random_masks(3, 100, 80.0, torch.Generator(CPU).manual_seed(0))
    assert mask.sum(1).tolist() == [20, 20, 20]
    assert not torch.equal(mask[0], mask[1])


def test_tf32_may_lose_what_its_factors_lose_and_no_more():
    want = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert distance([(want * (1 + 2**-10)).float()], [want], 4, "tf32") < 1
    assert distance([(want * (1 + 2**-10)).float()], [want], 4, "ieee") > 1
    assert distance([(want * 1.02).float()], [want], 4, "tf32") > 1
    assert distance([want * math.nan], [want], 4, "tf32") == math.inf
    with pytest.raises(ValueError, match="shape"):
        distance([want[:1]], [want], 4, "tf32")


def test_parts_that_did_not_run_have_no_tables():
    run = results.provenance("gpu", "cpu", None)
    assert gpu_tables(run) == []
    run.parts = {name: {"seconds": 1.0, "stopped": "ended with status 1: no"} for name in gpu.PARTS}
    assert gpu_tables(run) == []
    assert len(summary(run)) == 4
    assert all("ended with status 1: no" in line for line in summary(run))


def test_the_files_name_is_the_one_ops_look_for(monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert tuning.configuration_file(name).stem == results.device_slug("cuda")


def scripted(tmp_path, monkeypatch, code):
    """The process of every part runs this code, which knows ``part`` and what it ``found``."""

    def command(part, scratch, rehearse):
        state = scratch / f"{part}.json"
        head = f"""
import json, os, pathlib, sys, time
part, state = {part!r}, pathlib.Path({str(state)!r})
found = json.loads(state.read_text()) if state.exists() else {{}}
def keep(**more): found.update(more); state.write_text(json.dumps(found))
"""
        return [sys.executable, "-c", head + code]

    monkeypatch.setattr(gpu, "_command", command)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    monkeypatch.setattr(process, "_LEAST_S", 0.5)
    options = Namespace(
        rehearse=True, minutes=0.3, only=gpu.PARTS, out=tmp_path, commit="abc", part=None
    )
    told = io.StringIO()
    status = gpu._run_all(options, Console(file=told, width=120))
    (path,) = tmp_path.glob("*.json")
    (log,) = tmp_path.glob("*.log")
    return status, results.load(path), told.getvalue(), log.read_text()


def test_every_part_runs_and_is_kept(tmp_path, monkeypatch):
    code = "keep(part=part); print('>> half way'); print('only for the log')"
    status, run, told, log = scripted(tmp_path, monkeypatch, code)
    assert status == 0
    assert run.complete
    assert run.device.startswith("rehearsal-")
    assert run.suite == "rehearsal"
    assert run.commit == "abc"
    assert [run.parts[name]["part"] for name in gpu.PARTS] == list(gpu.PARTS)
    assert told.count("  half way") == 4
    assert "only for the log" not in told
    assert log.count("only for the log") == 4


def test_a_part_that_fails_or_hangs_keeps_what_it_had_and_harms_no_other(tmp_path, monkeypatch):
    code = """
keep(before=1)
if part == "tune": sys.exit("no such kernel")
if part == "table": time.sleep(60)
if part == "sweep": state.write_text("{")
"""
    monkeypatch.setattr(gpu, "_END_S", 10.0)
    monkeypatch.setattr(gpu, "_SHARES", {"tests": 1.0, "tune": 1.0, "table": 1.0, "sweep": 1.0})
    status, run, _, _ = scripted(tmp_path, monkeypatch, code)
    assert status == 1
    assert not run.complete
    assert run.parts["tests"]["before"] == 1
    assert "stopped" not in run.parts["tests"]
    assert run.parts["tune"]["before"] == 1
    assert run.parts["tune"]["stopped"] == "ended with status 1: no such kernel"
    assert run.parts["table"] | {"seconds": 0} == {
        "before": 1, "seconds": 0, "stopped": "stopped: it did not end in time"}  # fmt: skip
    assert "before" not in run.parts["sweep"]


def test_work_goes_on_behind_what_ended_its_process(tmp_path, monkeypatch):
    """By a signal, by asking for a new process, and not where nothing says what it was at."""
    code = """
keep(attempts=found.get("attempts", 0) + 1)
if part == "tune" and found["attempts"] == 1:
    keep(at="the first candidate")
    os.kill(os.getpid(), 11)
if part == "table":
    keep(again=found["attempts"] < 3)
if part == "sweep":
    os.kill(os.getpid(), 11)
keep(at="")
"""
    status, run, told, _ = scripted(tmp_path, monkeypatch, code)
    attempts = {name: part["attempts"] for name, part in run.parts.items()}
    assert attempts == {"tests": 1, "tune": 2, "table": 3, "sweep": 1}
    assert run.parts["tune"]["accidents"] == ["ended with status -11: it said nothing"]
    assert len(run.parts["table"]["accidents"]) == 2
    assert "going on in a new process" in told
    assert run.parts["sweep"]["stopped"].startswith("ended with status -11")
    assert status == 1


def test_what_there_was_no_time_for_is_not_wrong_but_not_complete(tmp_path, monkeypatch):
    code = "keep(**({'unfinished': 3} if part == 'tests' else {}))"
    status, run, _, _ = scripted(tmp_path, monkeypatch, code)
    assert status == 0
    assert not run.complete


@pytest.mark.long
def test_a_process_that_hangs_is_ended_with_a_traceback(tmp_path):
    code = """
import time
from benchmarks.gpu.process import watched
def the_kernel_that_never_ends(): time.sleep(60)
with watched(0.3): the_kernel_that_never_ends()
"""
    log, told = tmp_path / "log", []
    began = time.monotonic()
    stopped = process.attempt([sys.executable, "-c", code], {}, log, 50.0, told.append)
    assert time.monotonic() - began < 40
    assert stopped.startswith("ended with status 1")
    assert "the_kernel_that_never_ends" in log.read_text()


TOY = """
import os, time
import pytest
from hypothesis import given, settings, strategies as st

@pytest.mark.parametrize("n", range(4))
def test_together(n): os.environ.setdefault("seen", "0")
def test_dies(): os.kill(os.getpid(), 11)
def test_behind_it(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no")
@pytest.fixture
def broken():
    yield
    raise RuntimeError("at the end")
def test_breaks_down(broken): pass
@given(st.lists(st.integers(0, 3)))
@settings(max_examples=3)
def test_drawn(values): pass
"""


@pytest.mark.long
def test_tests_are_shared_out_and_go_on_behind_one_that_ends_its_process(tmp_path):
    toy = tmp_path / "test_toy.py"
    toy.write_text(TOY)
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    folder = tmp_path / "outcomes"
    folder.mkdir()
    selection = [str(tmp_path), f"--rootdir={tmp_path}", "-c", os.devnull]
    found = tests.run_tests(selection, 2, folder, time.monotonic() + 300)
    failures = {name.partition("::")[2]: why for name, why in found["failures"].items()}
    assert "crashed while running" in failures.pop("test_dies")
    assert failures == {
        "": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        "test_fails": "assert 1 == 2",
        "test_breaks_down": "RuntimeError: at the end",
    }
    assert {name: found[name] for name in ("passed", "skipped", "unfinished")} == {
        "passed": 6, "skipped": 1, "unfinished": 0}  # fmt: skip


def test_tests_that_had_no_time_are_counted(tmp_path):
    outcomes, log = tmp_path / "tests.jsonl", tmp_path / "tests.log"
    outcomes.write_text(
        """{"collected": 4}
{"collected": 4}
{"test": "a", "outcome": "passed"}
{"test": "b", "outcome": "failed", "message": "why"}
{"test": "b", "outcome": "failed", "message": "crashed"}
{"test": "c", "outc"""
    )
    counts = {"passed": 1, "skipped": 0, "unfinished": 2, "failures": {"b": "why"}}
    assert tests.summed_up(outcomes, log) == counts
    nothing = tests.summed_up(tmp_path / "none.jsonl", log)["failures"]
    assert nothing == {"all": f"did not start, see {log}"}


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--rehearse" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="out must not be"):
        gpu.main(["--rehearse", "--out", str(results.RESULTS)])


@pytest.mark.long
def test_the_sweep_stops_at_its_deadline_and_goes_on_later(tmp_path):
    found, saves = {}, []

    def run(deadline):
        sweep.sweep(
            sweep.TINY, tmp_path / "sweep", "cpu", deadline, found,
            lambda: saves.append(dict(found)), "reference",
        )  # fmt: skip

    run(0.0)
    assert not found["complete"]
    assert found["levels_finished"] == 0
    assert "time was up" in found["unfinished"]
    found.clear()
    run(LATER)
    assert found["complete"]
    assert (found["levels_finished"], found["asked"]["levels"]) == (2, 2)
    dense, sparse = found["levels"]
    assert (dense["trainings"], sparse["trainings"]) == (1, 2)
    assert set(sparse["return_final"]) == {"mask/weights", "random/re-init"}
    assert found["projected_seconds"] == pytest.approx(dense["seconds"] + sparse["seconds"])
    assert found["agent_steps_per_second"] > 0
    assert saves


@pytest.mark.long
def test_nothing_is_imported_that_a_gpu_machine_may_lack(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        lacking = ("matplotlib", "polars", "scipy", "jax", "stable_baselines3", "threadpoolctl",
                   "hypothesis", "pandas")
        if name.split(".")[0] in lacking:
            raise ImportError(f"this machine lacks {name}")

sys.meta_path.insert(0, Refuse())
"""
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    code = "import benchmarks.gpu.table, benchmarks.gpu.tune, benchmarks.suites, sys; "
    code += "from benchmarks.gpu.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--rehearse", "--only", "sweep", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    assert results.load(path).parts["sweep"]["complete"]
    assert "sweep: 2 of 2 levels" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="needs Triton's interpreter")
def test_a_whole_rehearsal(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    run = results.load(path)
    assert run.complete
    assert not run.refused
    assert run.parts["tests"]["passed"] > 0
    assert run.parts["tune"]["asked"]
    assert len(run.records) == len(targets("cpu"))
    assert run.parts["sweep"]["complete"]
    assert list((tmp_path / "configs").glob("rehearsal-*.json"))
    assert not list(results.RESULTS.glob("*rehearsal*"))
