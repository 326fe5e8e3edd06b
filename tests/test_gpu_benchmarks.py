"""`benchmarks.gpu` without a GPU: verified times, tuning, parts that fail or hang, and reports."""

import io
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, gpu_clock, gpu_sweep, gpu_table, gpu_tune, report, results
from benchmarks.clone_job import CloneJob, clone_contender
from benchmarks.gpu_clock import HostTimer, compare, ratio
from benchmarks.gpu_problems import LayerProblem, distance, random_masks_on
from benchmarks.gpu_report import gpu_tables, summary
from benchmarks.gpu_table import TINY, Rates, Row
from benchmarks.gpu_tune import Subject, candidates, tune, write_configurations
from benchmarks.measure import Contest
from benchmarks.peers import Unavailable
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.dispatch import has_triton
from sparse_tickets.timing import Contender, Unverified

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LATER = math.inf


class FakeTimer:
    """A clock that runs on by what contenders say they take; graphs are twice as fast."""

    def __init__(self, refuses=()):
        self.now, self.refuses, self.cold_calls = 0.0, refuses, 0

    def contender(self, name, seconds, error=0.0, **options):
        def run():
            self.now += seconds

        run.contender = name
        return Contender(name, run, None if error is None else lambda: error, **options)

    def seconds(self, run, count):
        began = self.now
        for _ in range(count):
            run()
        return (self.now - began) / count

    def cold_seconds(self, run):
        self.cold_calls += 1
        return 3 * self.seconds(run, 1)

    def capture(self, run):
        if run.contender in self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay():
            began = self.now
            run()
            self.now = began + (self.now - began) / 2

        return replay


def test_contenders_are_timed_with_launches_replayed_and_cold():
    timer = FakeTimer(refuses=("peer",))
    ours = timer.contender("ours", 1e-3, error=0.5, units=2)
    peer = timer.contender("peer", 4e-3)
    found, left_out = compare(ours, [peer], timer, rounds=3, deadline=LATER)
    assert left_out == {}
    assert found["ours"].wall == pytest.approx([0.5e-3] * 3)
    assert found["ours"].replay == pytest.approx([0.25e-3] * 3)
    assert found["ours"].cold == pytest.approx([0.75e-3] * 3)
    assert (found["ours"].error, found["ours"].calls) == (0.5, 5)
    assert found["peer"].replay == []
    assert found["peer"].cold == pytest.approx([12e-3] * 3)
    assert found["peer"].note == (
        "not captured in a graph: operation not permitted when stream is capturing"
    )
    measured = found["peer"].measured("a plan")
    assert measured.replay is None
    assert measured.plan.startswith("a plan; not captured")


@pytest.mark.parametrize("error", [1.5, math.nan, math.inf])
def test_a_wrong_result_is_refused_before_anything_is_timed(error):
    timer = FakeTimer()
    ours, peer = timer.contender("ours", 1.0, error=error), timer.contender("peer", 1.0)
    with pytest.raises(Unverified, match="ours must match"):
        compare(ours, [peer], timer, rounds=3, deadline=LATER)
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
    found, left_out = compare(timer.contender("ours", 1.0), peers, timer, rounds=1, deadline=LATER)
    assert list(found) == ["ours", "good"]
    assert left_out["failing"] == "RuntimeError: no compiler"
    assert "its error is 9 times what is allowed" in left_out["wrong"]


def test_names_must_differ():
    timer = FakeTimer()
    one, other = timer.contender("one", 1.0), timer.contender("one", 1.0)
    with pytest.raises(ValueError, match="different names"):
        compare(one, [other], timer, rounds=1, deadline=LATER)


def test_after_the_deadline_three_rounds_are_enough():
    timer = FakeTimer()
    found, _ = compare(timer.contender("ours", 1e-3), [], timer, rounds=9, deadline=0.0)
    assert len(found["ours"].wall) == 3


def test_ratios_are_paired_within_rounds():
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median == 2.0
    assert ratio([], [1.0]) is None


def test_the_host_timer_takes_time():
    timer = HostTimer()
    assert timer.seconds(lambda: time.sleep(0.002), 2) >= 0.002
    assert timer.cold_seconds(lambda: time.sleep(0.002)) >= 0.002
    assert isinstance(gpu_clock.make_timer(CPU), HostTimer)


def test_masks_drawn_on_the_device_keep_equally_many_and_differ():
    mask = random_masks_on(CPU, 3, 100, 80.0)
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


def test_a_step_is_told_from_a_wrong_one():
    problem = LayerProblem(2, 16, 32, 32, 50.0, device=CPU)
    right = problem.step
    assert problem.step_error(right) == 0
    off_mask = right.weight.clone()
    off_mask[~problem.mask] = 1e-9
    for wrong in (
        right._replace(weight=problem.weight.double()),
        right._replace(weight=off_mask),
        right._replace(m=right.m * 1.05),
        right._replace(dx=right.dx * math.nan),
    ):
        assert not problem.step_error(wrong) <= 1


def contest(timer, *, error=0.0, peer=2e-3):
    found = Contest(timer.contender("sparse_tickets", 1e-3, error), cost=Cost(1e6, 1e3))
    found.peers += [
        timer.contender("sparse_tickets, dense+mask", 1.5e-3),
        timer.contender("torch dense", peer),
        timer.contender("torch w*mask", 2 * peer),
    ]
    found.skipped["absent"] = "not installed"
    return found


def row(name, build):
    return Row("step", name, {"P": 2}, 90.0, "tf32", build)


@pytest.fixture
def filled(monkeypatch):
    """A run whose table has a row, one that fails, one that is wrong, and no time for the last."""
    timer, deadline = FakeTimer(), time.monotonic() + 1000

    def breaks():
        raise Unavailable("kernels.packed is not there")

    def takes_all_the_time():
        monkeypatch.setattr(gpu_table.time, "monotonic", lambda: deadline + 1)
        return contest(timer, peer=0.5e-3)

    made = [
        row("good", lambda: contest(timer)),
        row("broken", breaks),
        row("wrong", lambda: contest(timer, error=7.0)),
        row("last", takes_all_the_time),
        row("late", lambda: contest(timer)),
    ]
    monkeypatch.setattr(gpu_table, "rows", lambda sizes, device: iter(made))
    monkeypatch.setattr(gpu_table, "make_timer", lambda device: timer)
    monkeypatch.setattr(
        gpu_table, "measure_rates", lambda *_: Rates({"tf32": 1e10, "ieee": 1e9}, 1e9)
    )
    run = results.provenance("gpu", "cpu", None)
    saves = []
    gpu_table.fill(
        run, TINY, CPU, deadline, lambda: saves.append(len(run.records)), lambda line: None
    )
    monkeypatch.undo()
    assert len(saves) >= 5
    return run


def test_the_table_keeps_what_it_has(filled):
    assert [record.op for record in filled.records] == ["good, tf32", "last, tf32"]
    assert [refusal.label for refusal in filled.refused] == ["wrong P=2 tf32 90%"]
    part = filled.parts["table"]
    assert part["failed"] == {"broken P=2 tf32 90%": "Unavailable: kernels.packed is not there"}
    assert part["left_out"] == ["late P=2 tf32 90%"]


def test_a_row_names_its_strongest_rival_and_its_bound(filled):
    good, last = filled.parts["table"]["rows"]
    assert good["replay"]["best_peer"] == "torch dense"
    assert good["replay"]["ratio"] == pytest.approx(2.0)
    assert good["replay"]["over_our_dense"] == pytest.approx(1.5)
    assert last["launches"]["ratio"] == pytest.approx(0.5)
    assert good["bound_s"] == pytest.approx(1e-4)


def test_the_run_survives_the_disk_and_is_reported(filled, tmp_path):
    filled.parts["tests"] = {"passed": 3, "skipped": 1, "failures": {"a::b": "boom"}, "seconds": 2}
    filled.parts["sweep"] = SWEEP
    filled.parts["tune"] = {
        "asked": [["linear", "n=4", "1.0"]], "tried": [{}, {}],
        "configurations": {"linear": {"n=4": {"1.0": {"warps": 8}}}},
    }  # fmt: skip
    path = results.save(filled, tmp_path / "run.json")
    loaded = results.load(path)
    page = report.markdown({"nvidia-test": [loaded]}, {})
    for words in (
        "Targets on a GPU", "2.00x (torch dense)", "0.50x (torch dense)", "1.50x",
        "Failed - broken P=2 tf32 90%", "the time was up - late P=2 tf32 90%", "absent",
        "mask/weights", "1 of 20 levels", "a::b", "warps 8", "good, tf32",
    ):  # fmt: skip
        assert words in page, words
    lines = "\n".join(summary(loaded))
    assert "table: 2 rows, 1 failed, 1 left out" in lines
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


@dataclass(frozen=True)
class Launch:
    rows: int
    warps: int
    stages: int


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
    found = list(candidates(tuning.Question("op", "x", 1.0, Launch(16, 4, 1))))
    assert found == [
        {"rows": 32, "warps": 4, "stages": 1},
        {"rows": 16, "warps": 2, "stages": 1},
        {"rows": 16, "warps": 8, "stages": 1},
        {"rows": 16, "warps": 4, "stages": 2},
    ]


def test_candidates_are_what_the_op_can_be_launched_with():
    default, other = Launch(16, 4, 1), Launch(32, 8, 2)
    question = tuning.Question("op", "x", 1.0, default, (default, other))
    assert list(candidates(question)) == [{"rows": 32, "warps": 8, "stages": 2}]


@pytest.fixture
def tuned(monkeypatch):
    """Of an op that is fastest with many warps, wrong with 2, and does not fit at 32 rows."""
    timer = FakeTimer()
    default = Launch(16, 4, 1)

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
    monkeypatch.setattr(gpu_tune, "subjects", lambda sizes, device: iter(made))
    monkeypatch.setattr(gpu_tune, "make_timer", lambda device: timer)
    found, saves = {}, []
    tune(TINY, CPU, LATER, found, lambda: saves.append(1), lambda line: None)
    assert saves
    return found


def test_tuning_keeps_the_fastest_candidate_that_is_right(tuned):
    assert tuned["configurations"] == {"fake": {"n=128": {"1.0": {
        "rows": 16, "warps": 8, "stages": 1}}}}  # fmt: skip
    assert tuned["asked"] == [["fake", "n=128", "1.0"]]
    tried = {json.dumps(entry["candidate"]): entry for entry in tuned["tried"]}
    assert "out of resource" in tried['{"rows": 32, "warps": 4, "stages": 1}']["failed"]
    assert "match the reference" in tried['{"rows": 16, "warps": 2, "stages": 1}']["failed"]
    assert tried['{"rows": 16, "warps": 8, "stages": 1}']["gain"] == pytest.approx(2.0)
    assert tuned["failed"] == {"broken": "ImportError: no such kernel"}


def test_tuned_configurations_are_what_ops_read(tuned, tmp_path):
    path = tmp_path / "deep" / "gpu.json"
    old = {"configurations": {"other": {"x": {"1.0": {"warps": 1}}}, "fake": {"n=128": {
        "1.0": {"warps": 1}, "0.1": {"warps": 2}}}}, "asked": []}  # fmt: skip
    write_configurations(path, old, {"device": "Test"})
    write_configurations(path, tuned, {"device": "Test"})
    read = tuning.read(path)
    assert read["other"] == {"x": {"1.0": {"warps": 1}}}
    assert read["fake"]["n=128"] == {"0.1": {"warps": 2}, "1.0": {
        "rows": 16, "warps": 8, "stages": 1}}  # fmt: skip
    # Where the built-in launch is best now, the earlier answer goes.
    write_configurations(path, {"configurations": {}, "asked": tuned["asked"]}, {})
    assert list(tuning.read(path)["fake"]["n=128"]) == ["0.1"]


def test_the_files_name_is_the_one_ops_look_for(monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert tuning.configuration_file(name).stem == results.device_slug("cuda")


def scripted(tmp_path, monkeypatch, code):
    """The process of every part runs this code, which knows ``part`` and ``state``."""

    def command(part, seconds, scratch):
        state = scratch / f"{part}.json"
        head = f"import json, sys, time\npart, state = {part!r}, {str(state)!r}\n"
        head += "def keep(**found): open(state, 'w').write(json.dumps(found))\n"
        return [sys.executable, "-c", head + code]

    monkeypatch.setattr(gpu, "_command", command)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    options = Namespace(
        rehearse=True, minutes=0.2, only=gpu.PARTS, out=tmp_path, commit="abc", part=None
    )
    status = gpu._run_all(options, Console(file=io.StringIO(), width=120))
    (path,) = tmp_path.glob("*.json")
    return status, results.load(path)


def test_every_part_runs_and_is_kept(tmp_path, monkeypatch):
    status, run = scripted(tmp_path, monkeypatch, "keep(part=part)")
    assert status == 0
    assert run.complete
    assert run.device.startswith("rehearsal-")
    assert run.suite == "rehearsal"
    assert run.commit == "abc"
    assert [run.parts[name]["part"] for name in gpu.PARTS] == list(gpu.PARTS)


def test_a_part_that_fails_or_hangs_keeps_what_it_had_and_harms_no_other(tmp_path, monkeypatch):
    code = """
keep(before=1)
if part == "tune": sys.exit("no such kernel")
if part == "table": time.sleep(60)
if part == "sweep": open(state, "w").write("{")
"""
    monkeypatch.setattr(gpu, "_END_S", 4.0)
    monkeypatch.setattr(gpu, "_SHARES", {"tests": 1.0, "tune": 1.0, "table": 1.0, "sweep": 1.0})
    status, run = scripted(tmp_path, monkeypatch, code)
    assert status == 1
    assert not run.complete
    assert run.parts["tests"]["before"] == 1
    assert "stopped" not in run.parts["tests"]
    assert run.parts["tune"]["before"] == 1
    assert run.parts["tune"]["stopped"] == "ended with status 1: no such kernel"
    assert run.parts["table"] | {"seconds": 0} == {
        "before": 1, "seconds": 0, "stopped": "stopped: it did not end in time"}  # fmt: skip
    assert "before" not in run.parts["sweep"]


def test_tests_are_counted_from_pytests_report(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="a" name="good"/>
        <testcase classname="a" name="skipped"><skipped message="no GPU"/></testcase>
        <testcase classname="a" name="bad"><failure message="assert 1 == 2&#10;more">x</failure>
        </testcase>
        <testcase classname="b" name="worse"><error message="ImportError"/></testcase>
        </testsuite></testsuites>"""
    )
    assert gpu._outcome(path) == {
        "passed": 1, "skipped": 1,
        "failures": {"a::bad": "assert 1 == 2", "b::worse": "ImportError"},
    }  # fmt: skip
    assert "no report" in gpu._outcome(tmp_path / "none.xml")["stopped"]


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--rehearse" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="out must not be"):
        gpu.main(["--rehearse", "--out", str(results.RESULTS)])


def test_the_sweep_stops_at_its_deadline_and_goes_on_later(tmp_path):
    found, saves = {}, []

    def run(deadline):
        gpu_sweep.sweep(
            gpu_sweep.TINY, tmp_path / "sweep", "cpu", deadline, found,
            lambda: saves.append(dict(found)), "reference",
        )  # fmt: skip

    run(0.0)
    assert not found["complete"]
    assert found["levels_finished"] == 0
    assert "time was up" in found["stopped"]
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
    code = "import benchmarks.gpu, benchmarks.gpu_table, benchmarks.gpu_tune, sys; "
    code += "from benchmarks.gpu import main; sys.exit(main(sys.argv[1:]))"
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
    assert len(run.records) == len(list(gpu_table.rows(TINY, CPU)))
    assert run.parts["sweep"]["complete"]
    assert list((tmp_path / "configs").glob("rehearsal-*.json"))
    assert not list(results.RESULTS.glob("*rehearsal*"))
