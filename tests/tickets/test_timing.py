"""Timing: turns and statistics on fake clocks, refusals, bounds; the `bench` command."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from sparse_tickets.bench.layer import Bench
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


def spread(median, width=0.01):
    return Spread(median, median * (1 - width), median * (1 + width), 9)


def test_bench_command_lines_and_table():
    from sparse_tickets.bench.layer import bench_layer
    from sparse_tickets.bench.tables import bench_table

    seen = []
    with use_backend("reference"):
        found = bench_layer(
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


def test_whole_steps_are_timed_beside_the_dense_policy_and_tabled():
    from sparse_tickets.bench.steps import Problem, StepBench, bench_steps
    from sparse_tickets.bench.tables import steps_table

    seen = []
    problem = Problem((3, 8, 8, 2), "tanh", 5)
    budget = BUDGET_OF_ONE
    found = bench_steps(problem, sparsities=(90.0, 0.0), budget=budget, on_line=seen.append)
    assert tuple(seen) == found.lines
    assert [line.sparsity for line in found.lines] == [0.0, 90.0]
    assert found.what.startswith("3-8-8-2 tanh, batch 5, float32, ")
    line = found.lines[1]
    assert min(each.median for each in (line.dense, line.by_torch, line.by_us)) > 0
    lost, won = (spread(x) for x in (0.5, 2.0))
    line = replace(line, gain_by_torch=lost, gain_by_us=won, by_us=spread(1.234e-3))
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(steps_table(StepBench((line,), 0.5, "a policy")))
    text = " ".join(console.export_text().split())
    for said in (
        "a whole training step, a policy",
        "0.50x ± 1% 1.23 ms 2.00x ± 1%",
        "Other processes used 50% of the cores",
    ):
        assert said in text, said
    assert "…" not in text, "nothing is cut off in 80 columns"


def test_whole_steps_of_a_wrong_policy_are_not_timed(monkeypatch):
    from sparse_tickets.bench import steps

    def wrong(policy, density):
        policy[0].weight.data.mul_(2)
        policy[0].register_forward_hook(lambda layer, inputs, output: output + 1)

    monkeypatch.setattr(steps, "sparsify_", wrong)
    with pytest.raises(Unverified, match="must match the float64 reference"):
        steps.bench_steps(
            steps.Problem((3, 8, 2), "tanh", 5), sparsities=(50.0,), budget=BUDGET_OF_ONE
        )


@pytest.mark.parametrize(
    ("sizes", "activation", "batch", "options", "said"),
    [
        ((3,), "tanh", 4, {}, "sizes must be two or more, each at least 1, got"),
        ((3, 0, 2), "tanh", 4, {}, "sizes must be two or more, each at least 1, got"),
        ((3, 2), "tanh", 0, {}, "batch must be at least 1, got 0"),
        ((3, 2), "selu", 4, {}, "activation must be one of tanh, relu, .* got 'selu'"),
        ((3, 2), "tanh", 4, {"sparsities": ()}, "sparsities must be some in"),
        ((3, 2), "tanh", 4, {"sparsities": (100.0,)}, "sparsities must be some in"),
        ((3, 2), "tanh", 4, {"threads": 0}, "threads must be at least 1, got 0"),
        ((3, 2), "tanh", 4, {"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_whole_steps_name_what_they_cannot_do(sizes, activation, batch, options, said):
    from sparse_tickets.bench.steps import Problem, bench_steps

    with pytest.raises(ValueError, match=said):
        bench_steps(Problem(sizes, activation, batch), **{"sparsities": (0.0,)} | options)


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
    from sparse_tickets.bench.layer import bench_layer

    with pytest.raises(ValueError, match=said):
        bench_layer(**{"width": 8, "batch": 8} | options)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.000 us"), (2e-7, "0.200 us"), (4.23e-6, "4.23 us"), (9.7e-4, "970 us"),
     (1.23e-2, "12.3 ms"), (1.5, "1,500 ms")],
)  # fmt: skip
def test_bench_writes_times_with_three_digits(seconds, text):
    from sparse_tickets.bench.tables import microseconds

    assert microseconds(seconds) == text
