"""Whole jobs: what is written, what a row says, what is run again, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import job_returns, jobs
from sparse_tickets import sparsify_


def timed(threads, dense, sparse, busy=0.0):
    return {"threads": threads, "seconds": {"dense": dense, "sparse": sparse}, "busy": busy}


def test_a_row_takes_each_side_at_its_better_number_of_threads():
    runs = [timed(1, [6.0, 6.0], [3.0, 3.0]), timed(2, [4.0, 5.0], [9.0, 9.0])]
    record = {"label": "a job", "job": {"slice": 2000}, "runs": runs}
    assert jobs.table([record]).splitlines()[-1] == (
        "| a job | 2,250 | 1,500 | 1.50x | 2.00x | 0.50x |"
    )
    runs[0]["busy"] = 0.2
    assert "| ~1.50x |" in jobs.table([record])


def test_a_run_keeps_what_the_file_has_of_other_jobs(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    out = tmp_path / "jobs.json"
    model = SimpleNamespace(learn=lambda *_, **__: None, policy=nn.Sequential())
    monkeypatch.setattr(jobs, "build", lambda *_: model)
    jobs.run_jobs(Console(quiet=True), 2, (1,), "PPO", out)
    jobs.run_jobs(Console(quiet=True), 1, (1, 2), "SAC", out)
    ppo, sac = json.loads(out.read_text())
    assert ppo["label"].startswith("PPO")
    assert len(ppo["runs"][0]["seconds"]["sparse"]) == 2
    assert [run["threads"] for run in sac["runs"]] == [1, 2]
    assert ppo["run"]["versions"]["torch"] == torch.__version__
    assert len(out.with_suffix(".md").read_text().splitlines()) == 4
    text = jobs.measured(out)
    assert text.startswith(jobs.table([ppo, sac]))
    assert text.count(f"torch {torch.__version__}") == 1
    assert f"commit {ppo['run']['commit']};" in text


def test_a_policy_whose_pruned_weights_moved_is_refused():
    policy = sparsify_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), 0.1)
    jobs.check("a job", policy, 0.1)
    policy[0].weight.data[~policy[0].mask] = 1.0
    with pytest.raises(RuntimeError, match=r"a job: .* pruned ones moved"):
        jobs.check("a job", policy, 0.1)
    with pytest.raises(RuntimeError, match="weights are left"):
        jobs.check("a job", sparsify_(nn.Sequential(nn.Linear(64, 64)), 0.5), 0.1)


def test_an_unknown_job_is_refused():
    with pytest.raises(ValueError, match="only must be part of one of"):
        jobs.run_jobs(Console(quiet=True), only="nothing")


def learnt(density, curve, final):
    job = {"steps": 2000}
    return {"label": "a job", "job": job, "seed": 0, "density": density} | {
        "curve": curve, "final": final, "random": 0.0,
    }  # fmt: skip


def test_returns_are_told_as_shares_of_what_the_dense_job_gains():
    records = [learnt(1.0, [50.0, 90.0], [100.0]), learnt(0.1, [80.0, 0.0], [80.0])]
    for record in records:
        record["random"] = -100.0
    dense = job_returns.table(records[:1]).splitlines()[-1]
    assert dense == "| a job | 2,000 | 1 | 100 (100 to 100) | 90 (90 to 90) | - | - | - | - |"
    assert job_returns.table(records).splitlines()[-1] == (
        "| a job | 2,000 | 1 | 100 (100 to 100) | 90 (90 to 90) "
        "| 80 (80 to 80) [90%] | 80 (80 to 80) [95%] | - | - |"
    )


def test_a_job_made_longer_has_a_row_of_its_own():
    longer = learnt(1.0, [0.0], [300.0]) | {"job": {"steps": 5000}}
    rows = job_returns.table([learnt(1.0, [0.0], [100.0]), longer]).splitlines()[-2:]
    assert [row[:30] for row in rows] == [
        "| a job | 2,000 | 1 | 100 (100",
        "| a job | 5,000 | 1 | 300 (300",
    ]


def test_runs_that_are_known_are_not_run_again(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    out, ran = tmp_path / "returns.json", []

    def run(job, seed, density):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((seed, density))
        return {"curve": [0.0, 1.0], "final": [1.0], "random": 0.0}

    monkeypatch.setattr(job_returns, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        job_returns.run_returns(Console(quiet=True), 2, "SAC", out)
    monkeypatch.setattr(job_returns, "_run", lambda *_: ran.append(_) or learnt(1, [0, 1], [1]))
    job_returns.run_returns(Console(quiet=True), 2, "SAC", out)
    assert ran[:4] == [(0, 1.0), (0, 0.1), (0, 0.2), (1, 1.0)]
    assert len(ran) == 6
