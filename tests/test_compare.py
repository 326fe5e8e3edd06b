"""`python -m benchmarks compare`: quiet on the same code, loud on a planted regression."""

import math
import random
from dataclasses import replace

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.cases import FUSED_DENSE, is_ours
from benchmarks.compare import compare
from benchmarks.measure import Measured, Record
from benchmarks.ours import OURS
from sparse_tickets.timing import Spread

OPS = ("linear forward", "linear backward", "policy", "prune", "rollout")
LEVELS = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
PEERS = ("torch dense", "torch w*mask", "torch CSR", "SciPy", "SparseProp")


def spread(median, width=0.03):
    return Spread(median, median * (1 - width), median * (1 + width), 15)


def timed(median, width=0.03):
    return Measured(spread(median, width), spread(median), 0.1, "", 3, cold=spread(median, width))


def make_run(seed, slower=None, op_names=OPS, names=(OURS, *PEERS)):
    """Ours and peers on a machine whose speed changes from one configuration to the next.

    Some code feels that twice as much as other code. ``slower`` maps beginnings of labels to what
    our warm time there is multiplied by.
    """
    draw = random.Random(seed)
    records = []
    for op in op_names:
        for level in LEVELS:
            machine = draw.choice((0.0, 0.0, 0.45))
            contenders = {}
            for name in names:
                felt = machine * draw.uniform(0.5, 1.0) + draw.gauss(0, 0.03)
                contenders[name] = timed(1e-3 * math.exp(felt))
            record = Record(op, {"P": 1}, level, "call", OURS, contenders, {}, {})
            for label, factor in (slower or {}).items():
                if record.label.startswith(label):
                    ours = contenders[OURS]
                    contenders[OURS] = replace(ours, wall=spread(factor * ours.wall.median))
            records.append(record)
    return results.SuiteRun(
        "cpu-test-2c", "quick", "2026-01-02T03:04:05+00:00", 2, "Test, 2 cores", {"torch": "2"},
        "abc", spread(1e11), 7.0, 0.01, records,
    )  # fmt: skip


def flagged(changes, verdict="slower"):
    return [(change.label, change.kind) for change in changes if change.verdict == verdict]


def test_the_same_code_raises_hardly_an_alarm():
    """Once in twenty for ops, and for configurations; the machine changes by a third meanwhile."""
    found = [compare([(make_run(2 * s), make_run(2 * s + 1))]) for s in range(40)]
    assert sum(bool(f.slower) for f in found) <= 4
    assert max(change.machine for f in found for change in f.ops) > 1.2


@pytest.mark.parametrize("op", OPS)
def test_a_planted_slow_down_of_one_op_is_seen_and_nothing_else(op):
    old, new = make_run(1), make_run(2, {op: 1.3})
    found = compare([(old, new)])
    assert flagged(found.ops) == [(f"{op} P=1", "warm")]
    assert not flagged(found.ops, "faster")
    (change,) = (c for c in found.ops if c.verdict == "slower")
    assert (change.count, change.against) == (6, "peers")
    assert change.ours == pytest.approx(1.3, rel=0.15)
    assert 1.05 < change.visible < 1.3
    assert flagged(compare([(new, old)]).ops, "faster") == [(f"{op} P=1", "warm")]


def test_one_level_that_broke_is_named():
    found = compare([(make_run(3), make_run(4, {"prune P=1 90%": 3.0}))])
    assert ("prune P=1 90%", "warm") in flagged(found.configurations)
    assert {label for label, _ in flagged(found.configurations)} == {"prune P=1 90%"}


def test_a_change_within_the_spread_of_a_run_is_none():
    old, new = make_run(3), make_run(4, {"prune P=1 90%": 3.0})
    for record in (*old.records, *new.records):
        ours = record.contenders[OURS]
        record.contenders[OURS] = replace(ours, wall=spread(ours.wall.median, 0.9))
    assert not flagged(compare([(old, new)]).configurations)


def test_several_pairs_see_smaller_changes():
    pairs = [(make_run(2 * s), make_run(2 * s + 1, {"policy": 1.12})) for s in range(10, 16)]
    one, six = compare(pairs[:1]), compare(pairs)
    assert max(c.visible for c in six.ops) < min(c.visible for c in one.ops)
    assert flagged(six.ops) == [("policy P=1", "warm")]
    assert six.ops[0].count == 6 * len(LEVELS)


def test_cold_calls_are_compared_apart():
    old, new = make_run(5), make_run(6)
    for record in new.records:
        if record.op == "rollout":
            ours = record.contenders[OURS]
            record.contenders[OURS] = replace(ours, cold=spread(1.5 * ours.cold.median))
    assert flagged(compare([(old, new)]).ops) == [("rollout P=1", "cold caches")]


def test_without_a_peer_our_own_dense_run_stands_in():
    def run(seed, factor=1.0):
        few = make_run(seed + 50, {"job": factor}, ("job",), (OURS, FUSED_DENSE))
        return replace(make_run(seed), records=make_run(seed).records + few.records)

    assert not compare([(run(7), run(8))]).slower
    found = compare([(run(7), run(8, 2.0))])
    (change,) = (c for c in found.ops if c.verdict == "slower")
    assert (change.label, change.against) == ("job P=1", "our own dense run")


def test_what_cannot_be_judged_is_said():
    lonely = make_run(1, names=(OURS,))
    found = compare([(lonely, make_run(2, names=(OURS,)))])
    assert found.left_out == tuple(sorted(record.label for record in lonely.records))
    assert not found.ops
    one_peer = compare([tuple(make_run(s, names=(OURS, "torch dense")) for s in (1, 2))])
    assert {change.verdict for change in one_peer.ops} == {"unknown"}
    assert {change.visible for change in one_peer.ops} == {math.inf}
    with pytest.raises(ValueError, match="none in common"):
        compare([(make_run(1), make_run(1, op_names=("else",)))])


def test_peers_are_who_runs_none_of_our_kernels():
    ours = (OURS, FUSED_DENSE, "population, fused, sparse", "population, fused, dense")
    assert all(map(is_ours, ours))
    assert not any(map(is_ours, ("torch dense", "population, dense", "loop of dense policies")))


def test_the_command_shows_what_it_can_see_and_fails_on_a_regression(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.save(make_run(1), old)
    regressed = replace(make_run(2, {"policy": 1.5}), threads=4)
    results.save(regressed, new)
    assert main(["compare", str(old), str(old)]) == 0
    assert "0 slower beyond noise" in capsys.readouterr().out
    assert main(["compare", str(old), str(new)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "slower" in said
    assert "Their threads differ" in said
    assert "A single configuration shows a change from +" in said
    assert main(["compare", str(old), str(new), str(old)]) == 1
    assert "must come in pairs, OLD NEW, got 3 files" in capsys.readouterr().err
    assert main(["compare", str(old), str(tmp_path / "absent.json")]) == 1
