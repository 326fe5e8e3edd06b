"""The suite of whole steps: it refuses what computes something else, and takes the best peer."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import apart, steps
from benchmarks.results import newest_table


@pytest.mark.long
def test_a_run_writes_its_times_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SPARSITIES", (0.0, 0.9))
    out = tmp_path / "steps.json"
    console = Console(quiet=True)
    steps.run_steps(console, 1, 0.001, compiled=False, only="4-64-64-2", out=out)
    data = json.loads(out.read_text())
    assert len(data["records"]) == 2 * len(steps.SPARSITIES)
    names = {"ours, our Adam", "ours, torch's Adam", "dense", "w * mask", steps.TORCH_PARTS}
    assert names <= set(data["records"][0]["seconds"])
    text = out.with_suffix(".md").read_text()
    assert "4-64-64-2 tanh, batch 64 | our Adam |" in text
    assert "4-64-64-2 tanh, batch 64 | w * mask |" in text
    assert "Peers: dense; w * mask" in steps.measured(out)


def test_a_run_in_parts_keeps_what_the_same_commit_measured(tmp_path):
    path, known = tmp_path / "steps.json", [{"label": p.label} for p in steps.PROBLEMS]
    assert steps._others(path, "abc", []) == []
    path.write_text(json.dumps({"run": {"commit": "abc"}, "records": known}))
    assert steps._others(path, "abc", [steps.PROBLEMS[0]]) == known[1:]
    assert steps._others(path, "abd", [steps.PROBLEMS[0]]) == []


def _threads(problem, sparsity):
    if sparsity > 0.5:
        raise RuntimeError(f"cannot do {problem}")
    return lambda: torch.full((2,), float(torch.get_num_threads()))


@pytest.mark.long
def test_a_peer_apart_has_the_threads_asked_for_and_hands_its_errors_back():
    peer = apart.Apart(_threads)
    try:
        for threads in (1, 2):
            seconds, result = peer.turn("problem", 0.5, threads)(3)
            assert seconds > 0
            assert result.tolist() == [threads, threads]
        with pytest.raises(RuntimeError, match="cannot do problem"):
            peer.turn("problem", 0.9, 1)(1)
    finally:
        peer.close()


def test_a_policy_that_computes_something_else_is_refused():
    def turn(value):
        return apart.take(lambda: torch.full((1,), value))

    turns = {("w * mask", 0.5): turn(0.0), ("dense", 0.5): turn(0.0), ("ours", 0.5): turn(1.0)}
    with pytest.raises(RuntimeError, match="ours gives"):
        steps._check("policy", turns)


def test_the_newest_file_is_that_of_the_last_date(tmp_path):
    assert newest_table(tmp_path) is None
    for name in ("cpu-z-2026-11-28", "cpu-a-2026-11-29", "cpu-z-returns"):
        (tmp_path / f"{name}.json").touch()
    assert newest_table(tmp_path).stem == "cpu-a-2026-11-29"


def test_steps_that_a_peer_makes_faster_are_named(tmp_path):
    path = tmp_path / "steps.json"
    records = [
        {"label": "net", "sparsity": s, "seconds": {"dense": [peer], "ours, our Adam": [2.0]}}
        for s, peer in zip(steps.SPARSITIES, (1.0, 2.0, 3.0, 3.0, 3.0, 3.0), strict=True)
    ]
    path.write_text(json.dumps({"records": records}))
    assert (
        steps.lost(path)
        == "Of the 6 kinds of steps above 1 were slower: net at 0%, our Adam (0.50x)."
    )
    path.write_text(json.dumps({"records": records[1:2]}))
    assert steps.lost(path).endswith("none was slower than the fastest peer's.")


def test_a_ratio_takes_the_better_peer_and_number_of_threads():
    records = [
        {"seconds": {"dense": [4.0, 4.0, 9.0], "w * mask": [6.0], "ours": [2.0]}},
        {"seconds": {"dense": [5.0], "w * mask": [3.0], "ours": [1.0]}},
    ]
    assert steps._ratio(records, "ours") == "3.00x"


def test_what_torch_leaves_is_no_peer_and_the_most_to_gain(tmp_path):
    path = tmp_path / "steps.json"
    seconds = {"dense": [6.0], "ours, torch's Adam": [4.0], steps.TORCH_PARTS: [3.0]}
    records = [{"label": "net", "sparsity": s, "seconds": seconds} for s in steps.SPARSITIES]
    assert steps._ratio(records, "ours, torch's Adam") == "1.50x"
    cells = " | ".join(["2.00x"] * len(steps.SPARSITIES))
    assert f"| net | {steps.LEFT} | {cells} |" in steps.table(records)
    path.write_text(json.dumps({"records": records}))
    million = "1,000,000"
    row = f"| net | 6,000,000 | 3,000,000 | 2.00x | {million} | {million} | {million} |"
    assert row in steps.left(path)
    path.write_text(json.dumps({"records": [{**records[0], "seconds": {"dense": [6.0]}}]}))
    assert steps.left(path) == ""


def test_torch_parts_step_parameters_of_the_dense_shapes():
    start = steps._Start(steps.PROBLEMS[0])
    step = start.torch_parts()
    first, second = step(), step()
    assert first == second
    assert first > 0


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="only must be part of one of"):
        steps.run_steps(Console(quiet=True), only="nothing")
