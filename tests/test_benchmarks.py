"""The benchmark harness: statistics on fake clocks, refusals, files, comparisons, reports."""

import io
import json
import math
import platform
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparse_tickets.bench import Bench
from sparse_tickets.ceilings import Ceilings, Cost, layer_cost, measure_ceilings
from sparse_tickets.kernels import use_backend
from sparse_tickets.timing import (
    Budget,
    Contender,
    Spread,
    Timing,
    Unverified,
    alternate,
    evictor,
    interleave,
    mismatch,
    pinned_threads,
    tolerance,
    verified_ratio,
)

ROOT = Path(__file__).resolve().parents[1]
# At the end, so that the folder `kernels` shadows no installed package of that name.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    figures,
    first_screen,
    instructions,
    results,
    runner,
    scaling,
    suites,
    tables,
)
from benchmarks.console import bar, show_run  # noqa: E402
from benchmarks.costs import policy_cost  # noqa: E402
from benchmarks.measure import Case, Contest, Measured, Record, Refusal, measure  # noqa: E402
from benchmarks.peers import Unavailable  # noqa: E402
from benchmarks.problems import SPARSITIES, LinearProblem, PolicyProblem  # noqa: E402
from benchmarks.report import markdown, write_report  # noqa: E402


class FakeTime:
    """A clock that only contenders move."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def __call__(self):
        return self.seconds, 2 * self.seconds

    def contender(self, name, cost, error=0.0, units=1.0):
        def run():
            self.seconds += cost() if callable(cost) else cost
            self.log.append(name)

        return Contender(name, run, lambda: error, units=units)


@pytest.fixture
def clock():
    return FakeTime()


BUDGET_OF_ONE = Budget(1, 0.0, 0.0, settle_seconds=0.0)
BUDGET = Budget(6, 0.0, 0.0, limit_seconds=math.inf, settle_seconds=0.0)


def test_spread_interpolates_percentiles():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert spread == Spread(3.0, pytest.approx(1.8), pytest.approx(4.2), 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    assert spread.noise == pytest.approx(0.4)
    with pytest.raises(ValueError, match="values must not be empty"):
        Spread.of([])


def test_rounds_take_turns_and_begin_with_the_next_contender(clock):
    interleave([clock.contender(name, 1.0) for name in "abc"], BUDGET, clock)
    turns = "".join(clock.log[6:])  # after two warm-up calls each
    assert turns == "abcbcacab" * 2, "each round starts with the next"


def test_a_loop_calls_one_after_the_other_until_a_round_is_long_enough(clock):
    budget = replace(BUDGET, rounds=2, sample_seconds=6.0)
    pair = [clock.contender("a", 1.0), clock.contender("b", 3.0)]
    assert alternate(pair, budget, clock) == {"a": (1.0, 1.0), "b": (3.0, 3.0)}
    assert "".join(clock.log) == "ab" * (3 + 2 * 3)


def test_ratios_are_paired_within_rounds(clock):
    """A machine that slows down tenfold in the middle changes times but no ratio."""

    def cost(base):
        return lambda: base * (10.0 if clock.seconds > 20 else 1.0)

    found = verified_ratio(
        clock.contender("ours", cost(1.0)), [clock.contender("peer", cost(3.0))], BUDGET, clock
    )
    assert found.speedup["peer"].median == pytest.approx(3.0)
    assert max(found.timings["ours"].wall) == pytest.approx(10 * min(found.timings["ours"].wall))


def test_times_are_per_unit_and_cpu_time_is_kept_apart(clock):
    timing = interleave([clock.contender("ours", 6.0, units=3.0)], BUDGET, clock)["ours"]
    assert timing == Timing((2.0,) * 6, (4.0,) * 6, 1)


def test_short_calls_are_repeated_to_fill_a_sample(clock):
    budget = replace(BUDGET, sample_seconds=1.0, warmup_seconds=0.5)
    assert interleave([clock.contender("ours", 0.25)], budget, clock)["ours"].calls == 4


def test_slow_contenders_stop_early_but_not_before_three_rounds(clock):
    budget = replace(BUDGET, limit_seconds=1.0)
    assert len(interleave([clock.contender("ours", 5.0)], budget, clock)["ours"].wall) == 3


@pytest.mark.parametrize("error", [1.01, math.inf, math.nan])
@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_no_ratio_without_verification(clock, wrong, error):
    ours, peer = (
        clock.contender(name, 1.0, error if name == wrong else 0.0) for name in ("ours", "peer")
    )
    with pytest.raises(Unverified, match=f"{wrong} must match the float64 reference"):
        verified_ratio(ours, [peer], BUDGET, clock)
    assert not clock.log, "nothing may be timed"


def test_a_peer_may_be_incomparable_but_not_the_subject(clock):
    ours, peer = clock.contender("ours", 1.0), replace(clock.contender("sb3", 2.0), error=None)
    assert verified_ratio(ours, [peer], BUDGET, clock).errors == {"ours": 0.0}
    with pytest.raises(ValueError, match="subject must be comparable"):
        verified_ratio(replace(ours, error=None), [], BUDGET, clock)


def test_cold_calls_are_single_and_each_follows_an_eviction(clock):
    ours = replace(clock.contender("ours", 6.0), units=3.0)
    peer = clock.contender("peer", 12.0)

    def evict():
        clock.log.append("evict")
        clock.seconds += 100.0

    budget = replace(BUDGET, sample_seconds=50.0)
    found = verified_ratio(ours, [peer], budget, clock, evict)
    assert found.cold == {"ours": (2.0,) * 6, "peer": (12.0,) * 6}, "evictions are not timed"
    assert found.cold_speedup["peer"].median == found.speedup["peer"].median == 6.0
    turns = clock.log[clock.log.index("evict") :]
    assert turns[::2] == ["evict"] * 12
    assert "".join(name[0] for name in turns[1::2]) == "oppo" * 3
    assert verified_ratio(ours, [peer], BUDGET, clock).cold_speedup == {}


def test_a_part_costs_what_is_missing_without_it(clock):
    def part(name, whole, rest):
        base = clock.contender(name, whole)
        return replace(base, without=clock.contender("rest", rest).run, units=2.0)

    found = verified_ratio(part("ours", 5.0, 3.0), [part("peer", 9.0, 1.0)], BUDGET, clock)
    assert found.timings["ours"].wall == (1.0,) * 6
    assert found.speedup["peer"].median == 4.0
    with pytest.raises(Unverified, match="peer must take longer with the part"):
        verified_ratio(part("ours", 5.0, 3.0), [part("peer", 1.0, 1.0)], BUDGET, clock)


def test_an_eviction_covers_the_last_cache():
    evict = evictor("cpu")
    evict()
    assert evict.__closure__[0].cell_contents.nbytes >= 64 << 20


def test_a_bound_is_the_slower_of_products_and_copies():
    ceilings = Ceilings(spread(100.0), {10: spread(4.0), 20: spread(8.0), 40: spread(2.0)})
    assert [ceilings.bandwidth(moved) for moved in (1, 10, 25, 39, 1000)] == [8, 8, 8, 8, 2]
    assert ceilings.bound(Cost(1000.0, 8.0)) == 10.0
    assert ceilings.bound(Cost(1000.0, 80.0)) == 40.0
    with pytest.raises(ValueError, match="copies must have a rate"):
        Ceilings(spread(1.0), {}).bound(Cost(1.0, 1.0))


def test_layer_costs_by_hand():
    mask = torch.tensor([[[True, False, False], [True, True, False]]])  # O = 2, I = 3, kept 3
    x, y = 4 * 5 * 3, 4 * 5 * 2
    assert layer_cost("dense+mask", mask, 5, False) == (2 * 6 * 5 + 10, x + y + 4 * 6 + 8)
    assert layer_cost("csr", mask, 5, False) == (2 * 3 * 5 + 10, x + y + 8 * 3 + 8 * 3 + 8)
    forward, dx, dw = x + y + 4 * 6 + 8, y + 4 * 6 + x, y + x + 4 * 6 + 6
    whole = forward + dx + dw + 8 - y  # of dy, which dx, dw and db share, one reading
    assert layer_cost("dense+mask", mask, 5, True) == (3 * 2 * 6 * 5 + 2 * 10, whole)
    assert layer_cost("dense", mask, 5, True).bytes == whole - 6, "no mask is read"
    columns = 8 * 3 + 8 * 4  # values and columns of 3 weights, and 4 beginnings
    rows = 8 * 3 + 8 * 3
    csr = (x + y + rows + 8) + (x + columns) + (x + y + 4 * 6 + 4 * 3 + 8 * 3) + 8
    assert layer_cost("csr", mask, 5, True) == (3 * 2 * 3 * 5 + 2 * 10, csr)
    # Two of six blocks of 16 x 16, in halves: two rows of blocks, three columns.
    blocks = torch.tensor([[True, False, False], [False, False, True]])
    blocks = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
    x, y, lists = 2 * 5 * 48, 2 * 5 * 32, 4 * (2 + 2)
    forward = x + y + 2 * (512 + 32) + lists
    assert layer_cost("blocked-16", blocks, 5, False, 2) == (5120 + 160, forward)
    dx, dw = y + x + 2 * 512 + 4 * (3 + 2), x + y + 2 * 1536 + 4 * (2 + 6)
    whole = forward + dx + dw + 2 * 32 - y
    assert layer_cost("blocked-16", blocks, 5, True, 2) == (3 * 5120 + 2 * 160, whole)


def test_policy_costs_count_the_formats_and_no_first_input_gradient():
    problem = PolicyProblem(3, 5, (4, 8, 2), 50.0)
    first, second = (problem.arena.actor.weight(problem.mask, i) for i in (0, 1))
    cost = policy_cost(problem, "mlp: cpu/csr/dense+mask (why)")
    biases = 2 * 3 * 5 * (8 + 2)
    products = 2 * 5 * (2 * int(first.sum()) + 3 * second.numel())
    assert cost.flops == products + biases + 4 * 3 * 5 * 8
    weights = 3 * (4 * 8 + 8 + 8 * 2 + 2)
    kept = int(problem.mask.sum()) + 3 * (8 + 2)
    assert cost.bytes == 4 * (3 * 5 * (4 + 2 * 2) + weights + kept) + problem.mask.numel()


def test_ceilings_are_measured():
    found = measure_ceilings(BUDGET_OF_ONE, size=32)
    assert found.sgemm.median > 0
    assert all(rate.median > 0 for rate in found.copies.values())


def test_contenders_need_names_of_their_own(clock):
    with pytest.raises(ValueError, match="different names"):
        interleave([clock.contender("a", 1.0)] * 2, BUDGET, clock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mismatch_accepts_rounding_and_nothing_else(dtype, generator):
    x, w = torch.randn(2, 64, 64, generator=generator).to(dtype).unbind()
    exact = x.double() @ w.double()
    rounded = (x @ w if dtype != torch.bfloat16 else (x.float() @ w.float())).to(dtype)
    assert mismatch([rounded], [exact], 64) <= 1
    off = rounded.clone()
    off[3, 5] += 4 * tolerance(dtype, 64) * exact.abs().max().to(dtype)
    assert mismatch([off], [exact], 64) > 1
    assert mismatch([torch.full_like(rounded, math.nan)], [exact], 64) == math.inf
    with pytest.raises(ValueError, match=r"actual\[0\] must have shape"):
        mismatch([rounded[:1]], [exact], 64)


def test_threads_are_pinned_and_given_back():
    before = torch.get_num_threads()
    with pinned_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="count must be at least 1"), pinned_threads(0):
        pass


def case(error=0.0, skip=False):
    def build():
        clock = FakeTime()
        contest = Contest(clock.contender("ours", 1.0, error), [clock.contender("peer", 1.0)])

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
    return results.Run(
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
    run = replace(run, copies={1 << 20: spread(1e10)}, rounds=15, counts={"case": 12.5})
    path = results.save(run, tmp_path / "deep" / "run.json")
    assert results.load(path) == run
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_files_of_the_first_layout_load(run, tmp_path):
    data = json.loads(results.save(run, tmp_path / "run.json").read_text())
    for name in ("copies", "rounds", "complete", "counts", "products"):
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
    assert 0 <= results.Neighbours().share() <= 1
    readings = iter([(100.0, 10.0), (110.0, 12.5), (100.0, 10.0), (110.0, 20.5)])
    monkeypatch.setattr(results.Neighbours, "_read", staticmethod(lambda: next(readings)))
    neighbours = results.Neighbours()
    assert neighbours.share() == 0.25
    assert neighbours.share() == 0.0
    assert neighbours.share() == 1.0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the request is x86-64 code")
def test_requests_to_valgrind_do_nothing_outside_it():
    calls = []
    instructions.Valgrind().count(lambda: calls.append(1), 3)
    assert len(calls) == 3


def test_counts_are_read_in_the_order_they_were_made(tmp_path):
    for index in (10, 2, 1):
        (tmp_path / f"out.{index}").write_text(f"events: Ir\ntotals: {index}00\n")
    assert instructions.totals(tmp_path) == [100, 200, 1000]
    (tmp_path / "out.3").write_text("events: Ir\n")
    with pytest.raises(RuntimeError, match="valgrind must leave totals"):
        instructions.totals(tmp_path)


def instant_suite(monkeypatch, cases):
    """Replace all that takes time: the suite, the ceilings, the pause that watches neighbours."""
    monkeypatch.setattr(runner, "suite", lambda name, device: cases)
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
    options = {"name": "quick", "device": "cpu", "threads": 1, "rounds": 1, "out": path}
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
    # The first screen leaves cold calls to this page.
    assert "cold caches, P" not in first_screen.losses(run)
    run.counts = {"linear 64x64": 1234.0}
    assert "| linear 64x64 | 1,234 |" in markdown({run.device: [run]}, {})


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


def test_the_target_table_covers_every_target():
    labels = [case.label for case in suites.suite("quick")]
    assert len(labels) == len(set(labels))
    for sparsity in (50, 80, 90, 95, 99):
        for said in (
            "linear forward P=1 B=2048",
            "linear forward+backward",
            "policy forward+backward",
        ):
            assert any(said in label and label.endswith(f" {sparsity}%") for label in labels)
    assert any("told apart" in label for label in labels)
    full = [case.label for case in suites.suite("full")]
    assert set(labels) < set(full)
    assert SPARSITIES == (0, 50, 80, 90, 95, 98, 99)
    with pytest.raises(ValueError, match="suite must be one of"):
        suites.suite("none")


def test_the_curves_cover_every_axis_and_can_run_alone():
    labels = [case.label for case in suites.suite("curves")]
    for p in (1, 4, 16, 64, 256, 1024):
        assert f"policy forward+backward P={p} B=128 width=64 90%" in labels
        assert f"PPO iteration P={p} envs=4 steps=128 90%" in labels
    for width in (32, 64, 128, 256, 512, 1024):
        assert f"linear forward P=1 B=256 I={width} O={width} 90%" in labels
    assert any("threads=1" in label for label in labels)
    assert set(labels) < {case.label for case in suites.suite("full")}
    threaded = [case for case in suites.suite("curves") if "threads" in case.shape]
    assert all(case.threads == case.shape["threads"] for case in threaded)


def test_masks_of_blocks_and_of_two_in_four():
    blocks = LinearProblem(2, 3, 32, 16, 50.0, block=16).mask
    tiles = blocks.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).sum((2, 4))
    assert set(tiles.flatten().tolist()) == {0, 256}
    two = LinearProblem(2, 3, 32, 16, 50.0, two_four=True)
    assert (two.mask.unflatten(2, (-1, 4)).sum(3) == 2).all()
    assert not two.weight[~two.mask].any()
    with pytest.raises(ValueError, match="block must divide"):
        LinearProblem(1, 1, 30, 16, 50.0, block=16)
    with pytest.raises(ValueError, match="two_four needs"):
        LinearProblem(1, 1, 32, 16, 90.0, two_four=True)


def test_a_layer_inside_a_network_is_a_difference():
    from benchmarks import ours
    from benchmarks.peers import torch_dense

    deep, shallow = (PolicyProblem(2, 6, (8,) * n, 80.0, "relu") for n in (6, 3))
    with use_backend("reference"):
        contenders = [f(deep, shallow) for f in (ours.layer_inside, torch_dense.layer_inside)]
        for contender in contenders:
            assert contender.error() <= 1
            assert contender.units == 3
            assert contender.without is not None


def test_a_level_is_verified_and_a_wrong_mask_is_caught(monkeypatch):
    from benchmarks import level_job

    def job(**options):
        return level_job.LevelJob(2, 3, backend="reference", iterations=0, **options)

    with use_backend("reference"):
        good = job()
        assert level_job.level_contender(good).error() == 0
        kept = good.run().parameters.mask.sum(1)
        assert kept.tolist() == [good.kept] * 2
        monkeypatch.setattr(good, "kept", good.kept + 1)
        correct = level_job.next_population

        def lazy(*arguments, kept, **options):
            return correct(*arguments, kept=kept - 1, **options)

        monkeypatch.setattr(level_job, "next_population", lazy)
        assert good.error() > 1
    assert level_job.sparsity_of(10) == 89.3
    with pytest.raises(ValueError, match="level must be at least 1"):
        level_job.LevelJob(2, 0)


def test_problems_keep_exactly_as_many_weights_as_they_say():
    linear = LinearProblem(3, 5, 20, 10, 90.0)
    assert linear.mask.sum((1, 2)).tolist() == [20] * 3
    assert not linear.weight[~linear.mask].any()
    assert not linear.mask[0].equal(linear.mask[1])
    policy = PolicyProblem(2, 3, sparsity=99.0)
    assert policy.mask.sum(1).tolist() == [45, 45]
    gradients = [torch.ones_like(leaf) for w, b, _ in policy.layers() for leaf in (w, b)]
    row = policy.gather(gradients)
    assert row[:, : policy.arena.prunable].equal(policy.mask.float())


def test_contenders_compute_the_reference(monkeypatch):
    """Every contender on a tiny problem, and a sabotaged one is refused."""
    from benchmarks import ours
    from benchmarks.peers import (
        loop_dense,
        masked_bmm,
        scipy_csr,
        torch_bsr,
        torch_csr,
        torch_dense,
        torch_func,
    )

    blocks = LinearProblem(1, 6, 32, 16, 50.0, block=16)
    problem, policy = LinearProblem(1, 6, 20, 10, 90.0), PolicyProblem(2, 6, (3, 8, 2))
    contenders = [
        ours.linear_forward(problem, "reference"),
        ours.linear_backward(problem, "reference"),
        ours.policy(policy, "reference"),
        *(peer.linear_forward(problem) for peer in (torch_dense, masked_bmm, torch_csr, scipy_csr)),
        *(peer.linear_backward(problem) for peer in (torch_dense, masked_bmm, torch_csr)),
        *(torch_bsr.linear_forward(p) for p in (problem, blocks)),
        *(peer.policy(policy) for peer in (torch_dense, masked_bmm, loop_dense, torch_func)),
    ]
    for contender in contenders:
        assert contender.error() <= 1, contender.name
    with pytest.raises(Unavailable, match="one ticket only"):
        torch_csr.linear_forward(LinearProblem(2, 6, 20, 10, 90.0))
    several = LinearProblem(2, 6, 20, 10, 90.0)
    monkeypatch.setattr(ours, "linear", lambda x, w, m, b, **_: x @ w.mT + 1.001 * b[:, None])
    with pytest.raises(Unverified):
        verified_ratio(ours.linear_forward(several), [], BUDGET)


def test_plain_torch_is_timed_at_two_levels_only():
    from benchmarks.ours import swept

    levels = (0.0, 50.0, 90.0)
    assert swept(levels, ("reference", "cpu")) == [
        *(("reference", level) for level in levels[:2]),
        *(("cpu", level) for level in levels),
    ]


@pytest.mark.long
def test_ppo_job_is_verified_and_a_wrong_update_is_caught(monkeypatch):
    from benchmarks import ppo_job
    from sparse_tickets.algos.ppo import PPO

    settings = PPO(copies=2, horizon=8, minibatches=2, epochs=2)
    job = ppo_job.PPOJob(2, 50.0, settings, backend="reference")
    contender = ppo_job.ppo_contender(job, "ours")
    assert contender.error() <= 1
    with use_backend("reference"):
        assert job.acting_error() <= 1
    assert job.iteration == 0, "verifying leaves the job at its start"
    contender.run()
    assert job.iteration == 1
    correct = ppo_job.ppo_update_

    def lazy(parameters, *arguments, **options):
        correct(parameters, *arguments, **options)
        if parameters is job.population.parameters:
            parameters.weight.mul_(1.001)

    monkeypatch.setattr(ppo_job, "ppo_update_", lazy)
    with use_backend("reference"):
        assert job.error() > 1


def test_bench_command_lines_and_table():
    from sparse_tickets.bench import bench, bench_table

    seen = []
    with use_backend("reference"):
        found = bench(
            16, 8, sparsities=(90.0, 0.0, 90.0), budget=BUDGET_OF_ONE, on_line=seen.append
        )
    assert [(line.sparsity, line.direction) for line in found.lines] == [
        (0.0, "forward"),
        (0.0, "forward+backward"),
        (90.0, "forward"),
        (90.0, "forward+backward"),
    ]
    assert tuple(seen) == found.lines
    assert found.what.startswith("16 x 16, batch 8, float32, ")
    assert all(line.loop.median > 0 for line in found.lines)
    assert all(line.bound > 0 and line.plan.backend == "reference" for line in found.lines)
    console = Console(record=True, width=80, file=io.StringIO())
    fast, slow = (
        replace(found.lines[0], speedup=spread(x), loop=spread(0.75 * x)) for x in (2.0, 0.5)
    )
    fast = replace(fast, sparsity=90.0, ours=spread(1.234e-3), bound=1.234e-3 / 4)
    ceilings = Ceilings(spread(1.5e11), {1 << 20: spread(2e10)})
    console.print(bench_table(Bench((slow, fast), ceilings, what="a layer")))
    text = " ".join(console.export_text().split())
    for said in (
        "forward, a layer",
        "2.00x ± 1% ██████████ 1.50x 308 us 25%",
        "0.50x ± 1% ░░ 0.38x ",
        "1.23 ms",
        "reference/",
        "150 GFLOP/s",
        "20-20 GB/s",
        "crossover about 45%",
    ):
        assert said in text, said
    assert "…" not in text, "nothing is cut off in 80 columns"
    assert "forward+backward" not in text
    assert "Other processes" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"sparsities": ()}, "sparsities must not be empty"),
        ({"sparsities": (101.0,)}, r"sparsities must be in \[0, 100\], got 101.0"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bench_names_what_it_cannot_do(options, said):
    from sparse_tickets.bench import bench

    with pytest.raises(ValueError, match=said):
        bench(**{"width": 8, "batch": 8} | options)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.000 us"), (2e-7, "0.200 us"), (4.23e-6, "4.23 us"), (9.7e-4, "970 us"),
     (1.23e-2, "12.3 ms"), (1.5, "1,500 ms")],
)  # fmt: skip
def test_bench_writes_times_with_three_digits(seconds, text):
    from sparse_tickets.bench import _microseconds

    assert _microseconds(seconds) == text


def test_stored_results_are_readable():
    for path in results.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["layout"] in (1, 2)
        results.load(path)
