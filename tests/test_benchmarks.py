"""The benchmark harness: refusals, files, a run that goes on, tables, pictures, reports."""

import io
import json
import math
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from rich.console import Console

from benchmarks import (
    brief,
    figures,
    results,
    runner,
    scaling,
    tables,
)
from benchmarks.console import bar, show_run
from benchmarks.measure import Case, Contest, Measured, Record, Refusal, measure
from benchmarks.peers import Unavailable
from benchmarks.report import markdown, write_report
from sparse_tickets.ceilings import Ceilings, Cost, Neighbours
from sparse_tickets.timing import (
    Budget,
    Contender,
    Spread,
)

BUDGET = Budget(6, 0.0, 0.0, limit_seconds=math.inf, settle_seconds=0.0)


def case(error=0.0, skip=False):
    def build():
        ours, peer = (Contender(name, list, lambda: error) for name in ("ours", "peer"))
        contest = Contest(ours, [replace(peer, error=lambda: 0.0)])

        def unavailable():
            raise Unavailable("not installed")

        if skip:
            contest.invite("absent", unavailable)
        return contest

    return Case("op", {"P": 1}, 90.0, build)


def test_a_wrong_result_becomes_a_refusal_not_a_record():
    refusal = measure(case(error=2.0), BUDGET)
    assert isinstance(refusal, Refusal)
    assert refusal.label == "op P=1 90%"
    assert "2 times what is allowed" in refusal.reason


def test_an_absent_peer_is_named_with_its_reason():
    record = measure(case(skip=True), BUDGET)
    assert record.skipped == {"absent": "not installed"}
    assert list(record.speedup) == ["peer"]


def spread(median, width=0.01):
    return Spread(median, median * (1 - width), median * (1 + width), 9)


def record(sparsity, speedup, op="linear forward", unit="call", width=0.01):
    """Ours takes a millisecond, torch dense ``speedup`` times that."""
    contenders = {
        "sparse_tickets": Measured(spread(1e-3), spread(2e-3), 0.1, "linear: cpu/csr (why)", 3),
        "torch dense": Measured(spread(1e-3 * speedup), spread(2e-3), 0.1, "", 3),
    }
    return Record(
        op,
        {"P": 1, "B": 2048},
        sparsity,
        unit,
        "sparse_tickets",
        contenders,
        {"torch dense": spread(speedup, width)},
        {"torch CSR": "one ticket only"},
    )


@pytest.fixture
def run():
    curve = [record(s, x) for s, x in ((0.0, 0.9), (50.0, 0.5), (90.0, 2.0), (99.0, 20.0))]
    jobs = [
        record(90.0, 3.0, "PPO iteration", "agent-step"),
        record(90.0, 3.0, "whole job, gains told apart", "agent-step"),
    ]
    refused = [Refusal("linear forward P=2 80%", "off by 3")]
    return results.SuiteRun(
        "cpu-test-2c", "quick", "2026-01-02T03:04:05+00:00", 2, "Test, 2 cores", {"torch": "2"},
        "abc", spread(1e11), 7.0, 0.01, curve + jobs, refused,
    )  # fmt: skip


def test_results_survive_the_disk(run, tmp_path):
    cold = {"torch dense": spread(2.0)}
    contenders = {
        name: replace(item, cold=spread(1e-2), replay=spread(1e-4))
        for name, item in run.records[0].contenders.items()
    }
    run.records.append(
        replace(
            run.records[0],
            sparsity=12.0,
            contenders=contenders,
            cold_speedup=cold,
            replay_speedup=cold,
            cost=Cost(1e6, 2e3),
        )
    )
    run = replace(run, copies={1 << 20: spread(1e10)}, rounds=15)
    path = results.save(run, tmp_path / "deep" / "run.json")
    assert results.load(path) == run
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_files_of_the_first_layout_load(run, tmp_path):
    data = json.loads(results.save(run, tmp_path / "run.json").read_text())
    for name in ("copies", "rounds", "complete", "products"):
        del data[name]
    for item in data["records"]:
        for name in ("cold_speedup", "replay_speedup", "cost", "precision", "asked"):
            del item[name]
        for measured in item["contenders"].values():
            del measured["cold"], measured["replay"]
    (tmp_path / "old.json").write_text(json.dumps(data | {"layout": 1}))
    old = results.load(tmp_path / "old.json")
    assert old == run
    assert old.bound(replace(old.records[0], cost=Cost(1.0, 1.0))) is None
    assert old.complete


@pytest.mark.parametrize(
    "damage", ["", "{}", "[1]", '{"layout": 99}', '{"layout": 1, "records": 3}']
)
def test_damaged_results_are_named(damage, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"run\.json is not a benchmark result"):
        results.load(path)


def test_the_newest_run_of_each_device_counts_and_smoke_runs_do_not(run, tmp_path):
    later = replace(run, date="2026-02-01T00:00:00+00:00")
    smoke = replace(run, date="2026-03-01T00:00:00+00:00", suite="smoke")
    other = replace(run, device="nvidia-test")
    for index, item in enumerate((later, run, smoke, other)):
        results.save(item, tmp_path / f"{index}.json")
    part = replace(run, date="2026-04-01T00:00:00+00:00", suite="quick-part")
    results.save(part, tmp_path / "part.json")
    assert results.newest(tmp_path) == {"cpu-test-2c": [later], "nvidia-test": [other]}
    stopped = replace(later, date="2026-05-01T00:00:00+00:00", complete=False)
    results.save(stopped, tmp_path / "stopped.json")
    assert results.newest(tmp_path)["cpu-test-2c"] == [later], "a completed run goes first"


def test_every_table_comes_from_one_run(run):
    """From the run with most of its levels, of two the latest; nothing is shown twice."""
    later = replace(run, date="2026-02-01T00:00:00+00:00", suite="curves", refused=[])
    later.records = [record(90.0, 5.0), record(90.0, 5.0, "PPO iteration", "agent-step")]
    longer, shorter = results.share_out([run, later])
    assert [r.label for r in shorter.records] == ["PPO iteration P=1 B=2048 90%"]
    assert [r.op for r in longer.records] == ["linear forward"] * 4 + [run.records[-1].op]
    assert results.share_out([run, replace(later, records=run.records[:1])]) == [run]


def test_a_run_knows_where_it_came_from():
    here = results.provenance("quick", "cpu", Ceilings(spread(1e11), {1 << 20: spread(1e10)}))
    assert here.device.startswith("cpu-")
    assert here.device == here.device.lower()
    assert here.versions["torch"] == metadata.version("torch")
    assert here.threads == torch.get_num_threads()


def test_neighbours_use_what_is_neither_idle_nor_ours(monkeypatch):
    assert 0 <= Neighbours().share() <= 1
    readings = iter([(100.0, 10.0), (110.0, 12.5), (100.0, 10.0), (110.0, 20.5)])
    monkeypatch.setattr(Neighbours, "_read", staticmethod(lambda: next(readings)))
    neighbours = Neighbours()
    assert neighbours.share() == 0.25
    assert neighbours.share() == 0.0
    assert neighbours.share() == 1.0


def instant_suite(monkeypatch, cases):
    """Replace all that takes time: the suite, the ceilings, the pause that watches neighbours."""
    monkeypatch.setattr(runner, "cases_of", lambda name, device: cases)
    ceilings = Ceilings(spread(1e11), {1 << 20: spread(1e10)})
    monkeypatch.setattr(runner, "measure_ceilings", lambda budget, device: ceilings)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)


def test_a_stopped_run_keeps_what_it_has_and_goes_on(monkeypatch, tmp_path):
    built = []

    def instant(index):
        def build():
            if index == 2 and stopping:
                raise KeyboardInterrupt
            built.append(index)
            return Contest(Contender("ours", lambda: sum(range(2000)), lambda: 0.0))

        return Case("op", {"P": index}, 90.0, build)

    instant_suite(monkeypatch, [instant(index) for index in range(4)])
    path, stopping = tmp_path / "run.json", True
    console = Console(record=True, width=200, file=io.StringIO())
    options = {"suite": "quick", "device": "cpu", "threads": 1, "rounds": 1, "out": path}
    with pytest.raises(KeyboardInterrupt):
        runner.run_suite(console, **options)
    kept = results.load(path)
    assert [r.label for r in kept.records] == ["op P=0 90%", "op P=1 90%"]
    assert not kept.complete
    stopping = False
    assert runner.run_suite(console, **options) == 0
    done = results.load(path)
    assert built == [0, 1, 2, 3], "nothing is measured twice"
    assert len(done.records) == 4
    assert done.complete
    assert done.records[:2] == kept.records
    text = console.export_text()
    assert "going on after 2 configurations" in text
    assert " left" in text
    results.save(replace(done, complete=False, commit="another"), path)
    assert runner.run_suite(console, **options) == 0
    assert "commit changed since: starting again" in console.export_text()
    assert built == [0, 1, 2, 3] * 2
    assert runner.run_suite(console, only="P=3", **options) == 0
    assert results.load(path).suite == "quick-part"


def test_time_left_is_what_the_rest_takes_at_this_pace():
    remaining = runner.Remaining(10)
    assert str(remaining) == ""
    remaining.update(4, 100.0)
    assert str(remaining) == "2:30 left"


def test_curves_run_over_one_size_while_the_rest_is_held():
    def layer(sparsity=90.0, seconds=1.0, **shape):
        found = record(sparsity, 1.0)
        ours = replace(found.contenders["sparse_tickets"], wall=spread(seconds))
        shape = {"P": 1, "B": 64, "I": 32, "O": 32} | shape
        return replace(found, shape=shape, contenders={"sparse_tickets": ours})

    records = [layer(B=batch, seconds=batch / 64) for batch in (1, 4, 16, 256)]
    records += [layer(), layer(50.0), layer(0.0, 10.0), layer(99.0), layer(80.0)]
    records += [layer(threads=1, seconds=8.0), layer(threads=2, seconds=5.0)]
    records += [layer(I=width, O=width, seconds=width**2 / 1024) for width in (64, 128, 256)]
    width, batch, density, threads = scaling.curves(records)
    assert [curve.axis for curve in (width, batch, density, threads)] == [
        "width", "B", "density", "threads",
    ]  # fmt: skip
    assert [size for size, _ in batch.points] == [1, 4, 16, 64, 256]
    assert batch.fixed == "1 ticket, width 32, 10% kept"
    assert batch.ideal(64) == pytest.approx(1.0)
    assert width.ideal(32) == pytest.approx(1.0)
    assert [size for size, _ in density.points] == [1, 10, 20, 50, 100]
    assert density.ideal(10) == pytest.approx(1.0)
    assert threads.ideal(2) == pytest.approx(4.0)


def test_scaling_is_drawn_where_a_run_has_two_axes(run, tmp_path):
    shapes = [{"P": p, "B": 128} for p in (1, 4, 16, 64)] + [{"P": 1, "B": b} for b in (1, 4, 16)]
    run.records = [replace(record(90.0, 2.0), shape=shape) for shape in shapes]
    pictures = [path.name for path in figures.draw([run], tmp_path)]
    assert pictures == ["cpu-test-2c-scaling.png"]


def test_sizes_measured_at_one_sparsity_share_a_table(run):
    sizes = [replace(record(90.0, 2.0), shape={"P": p, "B": 4}) for p in (1, 4)]
    text = markdown({run.device: [replace(run, records=[*run.records, *sizes])]}, {})
    joined = text.split("### linear forward, by size")[1].split("###")[0]
    assert "| P = 1, B = 4, 90% | 1.00 ms | 2.00x" in joined
    assert "| P = 4, B = 4, 90% | 1.00 ms | 2.00x" in joined
    assert "Crossover" not in joined


def test_tables_show_the_bound_and_cold_calls_apart(run):
    contenders = {
        name: replace(item, cold=spread(5e-3)) for name, item in run.records[2].contenders.items()
    }
    run.records[2] = replace(
        run.records[2],
        contenders=contenders,
        cold_speedup={"torch dense": spread(0.7)},
        cost=Cost(2.5e7, 1.0),
    )
    run.copies = {1 << 20: spread(1e10)}
    text = markdown({run.device: [run]}, {})
    assert "| 90% | 1.00 ms | 250 us | 25% | 2.00x (1.98-2.02) | cpu/csr |" in text
    assert "### linear forward, cold caches: P = 1, B = 2048" in text
    assert "| 90% | 5.00 ms | 0.70x (0.69-0.71) |" in text
    assert "cold caches, P" not in brief.losses(run)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (((50, 2.0), (90, 4.0)), "faster at every level measured, from 50%"),
        (((50, 0.2), (90, 0.9)), "not reached up to 90%"),
        (((50, 0.5), (90, 2.0)), "about 70%"),
        (((50, 2.0), (80, 0.5), (90, 2.0)), "about 85%"),
        (((50, 1.005), (90, 2.0)), "within noise at 50%, faster from 90%"),
    ],
)
def test_crossover_is_interpolated_and_counts_the_last_loss(points, said):
    records = [record(float(sparsity), speedup) for sparsity, speedup in points]
    assert tables.crossover(records, "torch dense") == said
    assert tables.crossover(records, "absent") == "not measured"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 s"),
        (0.0123, "12.3 ms"),
        (1e-3, "1.00 ms"),
        (456e-6, "456 us"),
        (7e-8, "70.0 ns"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    assert tables.duration(seconds) == text


def test_report_shows_losses_crossovers_refusals_and_figures(run, tmp_path):
    page = write_report(tmp_path, {run.device: [run]})
    text = page.read_text()
    for said in (
        "0.50x (0.49-0.51)",
        "20.00x",
        "cpu/csr",
        "Crossover with torch dense: about 70%",
        "Not run - torch CSR: one ticket only.",
        "| linear forward P=2 80% | off by 3 |",
        "233 kFLOP",
        "Not yet measured",
    ):
        assert said in text, said
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == ["cpu-test-2c-speedup.png", "cpu-test-2c-whole-job.png"]
    assert all(f"figures/{name}" in text for name in pictures)
    assert "No results yet" in markdown({}, {})


def test_a_busy_machine_is_said_to_be_busy(run):
    assert "other processes used 300% of the cores: neither" in markdown(
        {"x": [replace(run, busy=3.0)]}, {}
    )


def test_console_shows_tables_with_bars(run):
    console = Console(record=True, width=100, file=io.StringIO())
    show_run(console, run)
    text = console.export_text()
    assert "█" in text
    assert "20.00x" in text
    assert bar(1.0, 1.0, 4) == "████"
    assert bar(0.0, 1.0, 4) == bar(1.0, 0.0, 4) == ""


def test_stored_results_are_readable():
    for path in results.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["layout"] in (1, 2)
        results.load(path)
