"""`benchmarks.gpu` without a GPU: verified times, tuning, parts that fail or hang, and reports."""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import clock, report, results
from benchmarks.clock import CudaTimer, HostTimer, compare
from benchmarks.clone_job import CloneJob, clone_contender
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process, sweep, table, tests, tune, warm
from benchmarks.gpu.report import gpu_tables, summary
from benchmarks.gpu.tune import Subject, candidates, write_configurations
from benchmarks.measure import Case, Contest, measure
from benchmarks.peers import Unavailable
from benchmarks.problems import distance, random_masks
from benchmarks.suites import REAL, TINY, targets
from benchmarks.tables import STAGES
from sparse_tickets.ceilings import Ceilings, Cost
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.dispatch import has_triton
from sparse_tickets.kernels.launch import Launch
from sparse_tickets.timing import Budget, Contender, Spread, Unverified

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LATER = math.inf


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """What a run leaves in the temporary folder, of other processes too, goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def budget(rounds, limit=LATER):
    """A sample is one call: `FakeTimer` knows what it takes."""
    return Budget(rounds, 0.0, 0.0, limit, settle_seconds=0.0)


class FakeTimer:
    """A clock that runs on by what contenders say they take; graphs are twice as fast."""

    def __init__(self, refuses=(), spoiled_by=()):
        self.now = 0.0
        self.refuses, self.spoiled_by, self.spoiled = refuses, spoiled_by, False

    def contender(self, name, seconds, error=0.0, **options):
        def run():
            self.now += seconds

        run.contender = name
        return Contender(name, run, None if error is None else lambda: error, **options)

    def clock(self):
        return self.now, self.now

    def cold(self, run):
        began = self.now
        run()
        return 3 * (self.now - began)

    def capture(self, run):
        self.spoiled |= run.contender in self.spoiled_by
        if run.contender in (*self.refuses, *self.spoiled_by):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay():
            began = self.now
            run()
            self.now = began + (self.now - began) / 2

        return replay


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


def contest(timer, *, error=0.0, peer=2e-3, subject="sparse_tickets"):
    found = Contest(timer.contender(subject, 1e-3, error), cost=Cost(1e6, 1e3))
    found.peers += [
        timer.contender("sparse_tickets, dense+mask", 1.5e-3),
        timer.contender("torch dense", peer),
        timer.contender("torch w*mask", 2 * peer),
    ]
    found.skipped["absent"] = "not installed"
    return found


def one_case(name, build, **options):
    options = {"cold": True, "precision": "tf32", "asked": 1.5} | options
    return Case(f"{name}, tf32", {"P": 2}, 90.0, build, **options)


def fill(monkeypatch, run, made, timer, deadline=None):
    """The table of these cases, and what it was at whenever it was saved."""
    monkeypatch.setattr(table, "make_timer", lambda device: timer)
    ceilings = Ceilings(None, {1 << 20: Spread(1e9, 1e9, 1e9, 1)})
    monkeypatch.setattr(table, "measure_ceilings", lambda *_: ceilings)
    products = {"tf32": Spread(1e10, 1e10, 1e10, 1), "ieee": Spread(1e9, 1e9, 1e9, 1)}
    monkeypatch.setattr(table, "measure_products", lambda *_: products)
    at = []
    again = table.fill(
        run, made, CPU, deadline or time.monotonic() + 1000,
        lambda: at.append(run.parts["table"]["at"]), lambda line: None, rounds=3,
    )  # fmt: skip
    return again, at


@pytest.fixture
def filled(monkeypatch):
    """A run whose table has a case, one that fails, one that is wrong, and no time for the last."""
    timer, deadline = FakeTimer(), time.monotonic() + 1000

    def breaks():
        raise Unavailable("its kernels are not there")

    def takes_all_the_time():
        monkeypatch.setattr(table.time, "monotonic", lambda: deadline + 1)
        return contest(timer, peer=0.5e-3)

    made = [
        one_case("good", lambda: contest(timer)),
        one_case("broken", breaks),
        one_case("wrong", lambda: contest(timer, error=7.0)),
        one_case("last", takes_all_the_time),
        one_case("late", lambda: contest(timer)),
    ]
    run = results.provenance("gpu", "cpu", None)
    _, saves = fill(monkeypatch, run, made, timer, deadline)
    monkeypatch.undo()
    assert len(saves) >= 5
    return run


def test_the_table_keeps_what_it_has(filled):
    assert [record.op for record in filled.records] == ["good, tf32", "last, tf32"]
    assert [refusal.label for refusal in filled.refused] == ["wrong, tf32 P=2 90%"]
    part = filled.parts["table"]
    assert part["failed"] == {"broken, tf32 P=2 90%": "Unavailable: its kernels are not there"}
    assert part["left_out"] == ["late, tf32 P=2 90%"]


def cells(run):
    """The table of targets by configuration and column."""
    found = gpu_tables(run)[0]
    return {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_a_row_names_its_strongest_rival_and_its_bound(filled):
    good, last = cells(filled).values()
    assert good["time"] == "500 us"
    assert good["vs best peer"] == "2.00x (torch dense)"
    assert good["vs our dense"] == "1.50x"
    assert (good["asked"], last["with launches"]) == ("1.5x", "0.50x")
    # 1e6 operations at 1e10 a second.
    assert good["of bound"] == "20%"


def test_the_table_goes_on_in_another_process_behind_what_spoiled_one(monkeypatch):
    timer = FakeTimer(spoiled_by=("spoils",))
    made = [
        one_case("first", lambda: contest(timer)),
        one_case("second", lambda: contest(timer, subject="spoils")),
        one_case("third", lambda: contest(timer)),
        one_case("fourth", lambda: contest(timer)),
    ]
    run = results.provenance("gpu", "cpu", None)
    again, at = fill(monkeypatch, run, made, timer)
    assert again
    first, second, *_ = (each.label for each in made)
    assert at == [first, "", second, ""]
    part = run.parts["table"]
    assert [record.label for record in run.records] == [first, second]
    # The next process dies at the third case; the one behind it is measured all the same.
    part["at"], timer.spoiled = made[2].label, False
    again, _ = fill(monkeypatch, run, made, timer)
    assert not again
    assert part["failed"] == {made[2].label: process.DIED}
    assert [record.op for record in run.records] == ["first, tf32", "second, tf32", "fourth, tf32"]


def test_a_peer_that_cannot_be_captured_is_compared_by_its_direct_calls(monkeypatch):
    timer = FakeTimer(refuses=("torch dense",))
    run = results.provenance("gpu", "cpu", None)
    fill(monkeypatch, run, [one_case("good", lambda: contest(timer))], timer)
    assert run.records[0].replay_speedup["torch dense"].median == pytest.approx(4.0)
    assert "not captured" in run.records[0].contenders["torch dense"].plan


def test_our_own_stages_are_no_peers(monkeypatch):
    """Of a whole job, whose stages have names of their own."""
    timer = FakeTimer()
    found = Contest(timer.contender("population, fused, sparse", 1e-3))
    found.peers += [
        timer.contender("population, dense", 4e-3),
        timer.contender("population, fused, dense", 1.5e-3),
    ]
    run = results.provenance("gpu", "cpu", None)
    fill(monkeypatch, run, [Case(STAGES, {"P": 2}, 90.0, lambda: found)], timer)
    (row,) = cells(run).values()
    assert row["vs best peer"] == "4.00x (population, dense)"
    assert row["vs our dense"] == "1.50x"


def test_every_target_that_was_asked_for_has_a_row():
    cases = targets("cpu", REAL)
    assert len({case.label for case in cases}) == len(cases)
    asked = {}
    for case in cases:
        asked.setdefault(case.asked, []).append(case.label)
    policy = "policy forward+backward P=60"
    for target, parts in {
        0.97: ("linear forward+backward, tf32", "99%"), 1.8: ("blocked", "block=32 90%"),
        3.0: (policy, "width=64 90%"), 2.0: (policy, "width=128 90%"), 5.0: ("prune", "60%"),
        None: (STAGES, "90%"),
    }.items():  # fmt: skip
        assert any(all(part in label for part in parts) for label in asked[target]), parts
    real = sweep.REAL
    assert (real.seeds, len(real.conditions), real.levels) == (15, 4, 20)
    assert (real.env, real.algos, real.ppo.steps) == ("CartPole-v1", ("ppo",), 500_000)
    trained = {name: getattr(sweep.COMPILING, name) for name in ("seeds", "levels", "chunk")}
    assert trained == {name: getattr(real, name) for name in trained}


def test_the_run_survives_the_disk_and_is_reported(filled, tmp_path):
    filled.parts["tests"] = {"passed": 3, "skipped": 1, "failures": {"a::b": "boom"}, "seconds": 2}
    filled.parts["sweep"] = SWEEP
    filled.parts["tune"] = {
        "asked": [["linear", "n=4"]], "tried": [{}, {}],
        "configurations": {"linear": {"n=4": {"warps": 8}}},
    }  # fmt: skip
    path = results.save(filled, tmp_path / "run.json")
    loaded = results.load(path)
    page = report.markdown({"nvidia-test": [loaded]}, {})
    for words in (
        "Targets on a GPU", "2.00x (torch dense)", "0.50x (torch dense)", "1.50x",
        "Failed - broken, tf32 P=2 90%", "the time was up - late, tf32 P=2 90%", "absent",
        "mask/weights", "1 of 20 levels", "a::b", "warps 8", "good, tf32",
    ):  # fmt: skip
        assert words in page, words
    lines = "\n".join(summary(loaded))
    assert "table: 2 cases, 1 failed, 1 left out, 1 of 2 targets met" in lines
    assert "tests: 3 passed, 1 failed, 1 skipped" in lines
    assert "tune: 1 launches, 2 candidates, 1 better" in lines
    assert "refused, results being wrong: wrong" in lines


SWEEP = {
    "asked": {"env": "CartPole-v1", "algos": ["ppo"], "seeds": 15, "levels": 20, "steps": 500_000,
              "conditions": ["mask/weights"], "trainings": 300},
    "complete": False, "levels_finished": 1, "agent_steps": 10, "agent_steps_per_second": 2.0,
    "projected_seconds": 120.0, "seconds": 5.0,
    "levels": [{"level": 0, "density": 1.0, "trainings": 15, "agent_steps": 10, "seconds": 5.0,
                "train_seconds": 4.0, "agent_steps_per_second": 2.5,
                "return_final": {"mask/weights": {"median": 500.0, "mean": 499.0}}}],
}  # fmt: skip


def test_parts_that_did_not_run_have_no_tables():
    run = results.provenance("gpu", "cpu", None)
    assert gpu_tables(run) == []
    run.parts = {name: {"seconds": 1.0, "stopped": "ended with status 1: no"} for name in gpu.PARTS}
    assert gpu_tables(run) == []
    assert len(summary(run)) == 4
    assert all("ended with status 1: no" in line for line in summary(run))


def launch(rows, warps, stages):
    return Launch(rows=rows, warps=warps, stages=stages)


def test_cloning_is_verified():
    job = CloneJob(3, 90.0, batch=40, updates=2, device=CPU)
    contender = clone_contender(job)
    assert contender.error() <= 1
    learn = job.update
    job.update = lambda: (learn(), job.population.parameters.weight.mul_(1 + 1e-4))
    assert contender.error() > 1
    job.update = lambda: job.population.parameters.weight.fill_(math.nan)
    assert contender.error() == math.inf


def test_candidates_change_one_number_within_its_limits():
    found = list(candidates(tuning.Question("op", "x", launch(16, 4, 1))))
    assert found == [
        {"rows": 32, "warps": 4, "stages": 1},
        {"rows": 16, "warps": 2, "stages": 1},
        {"rows": 16, "warps": 8, "stages": 1},
        {"rows": 16, "warps": 4, "stages": 2},
    ]


def test_candidates_are_what_the_op_can_be_launched_with():
    default, other = launch(16, 4, 1), launch(32, 8, 2)
    question = tuning.Question("op", "x", default, (default, other))
    assert list(candidates(question)) == [{"rows": 32, "warps": 8, "stages": 2}]


@pytest.fixture
def tuned(monkeypatch):
    """Of an op that is fastest with many warps, wrong with 2, and does not fit at 32 rows."""
    timer = FakeTimer()
    default = launch(16, 4, 1)

    def build():
        asked = [default]

        def run():
            asked[0] = tuning.prefer(default, "fake", CPU, n=100)
            if asked[0].rows == 32:
                raise RuntimeError("out of resource: shared memory")
            timer.now += 8e-3 / asked[0].warps

        run.contender = "fake"

        def error():
            run()
            return 5.0 if asked[0].warps == 2 else 0.0

        return Contender("fake", run, error)

    def broken():
        raise ImportError("no such kernel")

    made = [Subject("fake", build), Subject("again", build), Subject("broken", broken)]
    monkeypatch.setattr(tune, "subjects", lambda sizes, device: iter(made))
    monkeypatch.setattr(tune, "make_timer", lambda device: timer)
    found, saves = {}, []
    tune.tune(TINY, CPU, LATER, found, lambda: saves.append(1), lambda line: None)
    assert saves
    return found


def test_tuning_keeps_the_fastest_candidate_that_is_right(tuned):
    assert tuned["configurations"] == {"fake": {"n=128": {"rows": 16, "warps": 8, "stages": 1}}}
    assert tuned["asked"] == [["fake", "n=128"]]
    tried = {json.dumps(entry["candidate"]): entry for entry in tuned["tried"]}
    assert "out of resource" in tried['{"rows": 32, "warps": 4, "stages": 1}']["failed"]
    assert "match the reference" in tried['{"rows": 16, "warps": 2, "stages": 1}']["failed"]
    assert tried['{"rows": 16, "warps": 8, "stages": 1}']["gain"] == pytest.approx(2.0)
    assert tuned["failed"] == {"broken": "ImportError: no such kernel"}


def test_tuning_goes_on_behind_a_candidate_that_spoiled_its_process(monkeypatch):
    timer, default, checked = FakeTimer(), launch(16, 4, 1), []

    def build():
        def run():
            run.launch = tuning.prefer(default, "fake", CPU, n=100)
            timer.now += 8e-3 / run.launch.warps

        def error():
            run()
            checked.append(run.launch)
            # As an illegal access would.
            timer.spoiled |= run.launch.rows == 32
            return 0.0

        run.contender = "fake"
        return Contender("fake", run, error)

    monkeypatch.setattr(tune, "subjects", lambda *_: iter([Subject("fake", build)]))
    monkeypatch.setattr(tune, "make_timer", lambda device: timer)
    found = {}

    def go_on():
        timer.spoiled = False
        return tune.tune(TINY, CPU, LATER, found, lambda: json.dumps(found), lambda line: None)

    assert go_on()
    assert found["done"] == []
    # The next process dies at the next candidate.
    warps = {"rows": 16, "warps": 2, "stages": 1}
    fatal = {"op": "fake", "shapes": "n=128", "candidate": warps}
    found["at"] = {"subject": "fake", "candidate": fatal}
    assert not go_on()
    assert found["done"] == ["fake"]
    assert checked.count(launch(32, 4, 1)) == 1
    assert launch(16, 2, 1) not in checked
    assert fatal | {"failed": process.DIED} in found["tried"]
    assert found["configurations"]["fake"]["n=128"]["warps"] == 8


def test_a_subject_that_ends_its_process_is_left_out(monkeypatch):
    timer = FakeTimer()
    made = [Subject("fatal", None), Subject("good", lambda: timer.contender("good", 1e-3))]
    monkeypatch.setattr(tune, "subjects", lambda *_: iter(made))
    monkeypatch.setattr(tune, "make_timer", lambda device: timer)
    found = {"at": {"subject": "fatal", "candidate": None}}
    assert not tune.tune(TINY, CPU, LATER, found, lambda: None, lambda line: None)
    assert found["failed"] == {"fatal": process.DIED}
    assert found["done"] == ["fatal", "good"]


def test_what_will_be_measured_is_launched_ahead_once_and_shared_out(monkeypatch, tmp_path, capsys):
    launched = []

    def contender(name):
        return Contender(name, lambda: launched.append(name), None)

    def build(name):
        def make():
            found = Contest(contender(name))
            found.peers.append(Contender("failing", lambda: 1 / 0, None))
            found.peers.append(contender(f"peer of {name}"))
            return found

        return make

    def asks():
        def run():
            chosen = tuning.prefer(launch(16, 4, 1), "fake", CPU, n=100)
            launched.append((chosen.rows, chosen.warps, chosen.stages))

        return Contender("subject", run, None)

    # The second differs from the first in sparsity alone.
    made = [
        Case(name, {"P": 2}, sparsity, build(name))
        for name, sparsity in (("a", 50.0), ("a", 90.0), ("b", 90.0))
    ]
    monkeypatch.setattr(warm, "targets", lambda *_: made)
    monkeypatch.setattr(warm, "subjects", lambda *_: iter([Subject("s", asks)]))
    monkeypatch.setattr(warm, "sweep", lambda *_: launched.append("sweep"))
    for share in (0, 1):
        warm.warm(TINY, sweep.COMPILING, CPU, tmp_path, LATER, share, 2)
        launched.append("-")
    assert launched == [
        "sweep", "b", "peer of b", "-",
        "a", "peer of a", (16, 4, 1), (32, 4, 1), (16, 2, 1), (16, 8, 1), (16, 4, 2), "-",
    ]  # fmt: skip
    assert "failing: ZeroDivisionError" in capsys.readouterr().out


def test_tuned_configurations_are_what_ops_read(tuned, tmp_path):
    path = tmp_path / "deep" / "gpu.json"
    before = {"n=128": {"warps": 1}, "n=256": {"warps": 2}}
    old = {"configurations": {"other": {"x": {"warps": 1}}, "fake": before}, "asked": []}
    write_configurations(path, old, {"device": "Test"})
    write_configurations(path, tuned, {"device": "Test"})
    read = tuning.read(path)
    assert read["other"] == {"x": {"warps": 1}}
    best = {"rows": 16, "warps": 8, "stages": 1}
    assert read["fake"] == {"n=128": best, "n=256": {"warps": 2}}
    # Where the built-in launch is best now, the earlier answer goes.
    write_configurations(path, {"configurations": {}, "asked": tuned["asked"]}, {})
    assert list(tuning.read(path)["fake"]) == ["n=256"]


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


def test_tuned_launches_are_where_kernels_read_them_and_where_results_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "kernels")
    run = results.provenance("gpu", "cpu", None)
    found = {"asked": [], "configurations": {"linear": {"n=4": {"warps": 8}}}}
    for rehearse, places in ((True, ["out"]), (False, ["kernels", "out"])):
        gpu._write_configurations(
            run, found, Namespace(rehearse=rehearse), tmp_path / "out" / "x", Console(quiet=True)
        )
        written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.json")}
        assert sorted(written) == places


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
