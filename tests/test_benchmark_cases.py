"""What the benchmarks time: suites, problems, and contenders that are held to the reference."""

import math

import pytest
import torch

from benchmarks import suites
from benchmarks.costs import policy_cost
from benchmarks.peers import Unavailable
from benchmarks.problems import SPARSITIES, LinearProblem, PolicyProblem
from sparse_tickets.kernels import use_backend
from sparse_tickets.timing import (
    Budget,
    Unverified,
    verified_ratio,
)

BUDGET = Budget(6, 0.0, 0.0, limit_seconds=math.inf, settle_seconds=0.0)


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
