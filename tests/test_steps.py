"""The suite of whole steps: it refuses what computes something else, and takes the best peer."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import steps


def test_a_run_writes_its_times_and_a_table(tmp_path):
    out = tmp_path / "steps.json"
    console = Console(quiet=True)
    steps.run_steps(console, 1, 0.001, compiled=False, only="4-64-64-2", out=out)
    data = json.loads(out.read_text())
    assert len(data["records"]) == 2 * len(steps.SPARSITIES)
    assert {"ours, our Adam", "ours, torch's Adam", "dense", "w * mask"} == set(
        data["records"][0]["seconds"]
    )
    assert "4-64-64-2 tanh, batch 64 | our Adam |" in out.with_suffix(".md").read_text()


def test_a_policy_that_computes_something_else_is_refused():
    def zero():
        return torch.zeros(1)

    def one():
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="ours gives"):
        steps._check("policy", {"dense": zero, "w * mask": zero, "ours": one})


def test_a_ratio_takes_the_better_peer_and_number_of_threads():
    records = [
        {"seconds": {"dense": [4.0, 4.0, 9.0], "w * mask": [6.0], "ours": [2.0]}},
        {"seconds": {"dense": [5.0], "w * mask": [3.0], "ours": [1.0]}},
    ]
    assert steps._ratio(records, "ours") == "3.00x"


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="only must be part of one of"):
        steps.run_steps(Console(quiet=True), only="nothing")
