"""Whole jobs: what is written, what a row says, and what is refused."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import jobs
from sparse_tickets import sparsify_


def runs(name, seconds, returns, threads):
    return [
        {"name": name, "seed": seed, "threads": threads, "seconds": s, "return": r, "busy": 0.0}
        for seed, (s, r) in enumerate(zip(seconds, returns, strict=True))
    ]


def test_a_row_takes_each_side_at_its_better_number_of_threads():
    measured = [
        *runs("dense", [6.0, 6.0], [100.0, 200.0], threads=1),
        *runs("dense", [4.0, 5.0], [100.0, 300.0], threads=2),
        *runs("sparse", [3.0, 3.0], [90.0, 110.0], threads=1),
        *runs("sparse", [9.0, 9.0], [90.0, 110.0], threads=2),
    ]
    record = {"label": "a job", "job": {"steps": 2000}, "runs": measured}
    assert jobs.table([record]).splitlines()[-1] == (
        "| a job | 2,000 | 2 | 4.5 | 3.0 | 1.50x | 175 (100 to 300) | 100 (90 to 110) |"
    )
    measured[0]["busy"] = 0.2
    assert "| ~1.50x |" in jobs.table([record])


def test_a_run_keeps_what_the_file_has_of_other_jobs(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    out = tmp_path / "jobs.json"
    monkeypatch.setattr(jobs, "_run", lambda *_: (2.0, 500.0))
    jobs.run_jobs(Console(quiet=True), 2, (1,), "PPO", out=out)
    jobs.run_jobs(Console(quiet=True), 1, (1, 2), "SAC", out=out)
    ppo, sac = json.loads(out.read_text())
    assert ppo["label"].startswith("PPO")
    assert [len(record["runs"]) for record in (ppo, sac)] == [4, 4]
    assert ppo["run"]["versions"]["torch"] == torch.__version__
    assert len(out.with_suffix(".md").read_text().splitlines()) == 4


def test_a_policy_whose_pruned_weights_moved_is_refused():
    policy = sparsify_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), jobs.DENSITY)
    jobs._check("a job", policy)
    policy[0].weight.data[~policy[0].mask] = 1.0
    with pytest.raises(RuntimeError, match=r"a job: .* pruned ones moved"):
        jobs._check("a job", policy)
    with pytest.raises(RuntimeError, match="weights are left"):
        jobs._check("a job", sparsify_(nn.Sequential(nn.Linear(64, 64)), 0.5))


def test_an_unknown_job_is_refused():
    with pytest.raises(ValueError, match="only must be part of one of"):
        jobs.run_jobs(Console(quiet=True), only="nothing")
