"""The table of `make gpu`, tuning, and what is compiled ahead."""

import json
import math
import time
from argparse import Namespace

import pytest
from fake_gpu import CPU, LATER, FakeTimer
from rich.console import Console

from benchmarks import report, results
from benchmarks.clone_job import CloneJob, clone_contender
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process, sweep, table, tune, warm
from benchmarks.gpu.report import gpu_tables, summary
from benchmarks.gpu.tune import Subject, candidates, write_configurations
from benchmarks.measure import Case, Contest
from benchmarks.peers import Unavailable
from benchmarks.suites import REAL, TINY, targets
from benchmarks.tables import STAGES
from sparse_tickets.ceilings import Ceilings, Cost
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.launch import Launch
from sparse_tickets.timing import Contender, Spread

pytestmark = pytest.mark.usefixtures("temporary_files")


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
