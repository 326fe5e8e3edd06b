"""Peers that users install apart, and the numbers that the top README takes from a run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import brief, first_screen, results
from benchmarks.__main__ import main
from benchmarks.cases import FUSED_DENSE
from benchmarks.measure import Measured, Record
from benchmarks.peers import (
    Unavailable,
    jax_ppo,
    sb3,
    sparseprop,
    torch_bsr,
    torch_semi_structured,
)
from benchmarks.ppo_job import PPOJob
from benchmarks.problems import LinearProblem, random_masks
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.envs import env_spec
from sparse_tickets.kernels import Batch, gae, use_backend
from sparse_tickets.kernels.dynamics.reference import CARTPOLE
from sparse_tickets.kernels.ppo import reference
from sparse_tickets.kernels.update import adam_
from sparse_tickets.population import initialise, policy_arena
from sparse_tickets.timing import Spread

ROOT = Path(__file__).resolve().parents[1]

SETTINGS = PPO(copies=3, horizon=16, minibatches=2, epochs=2)


@pytest.fixture
def trainer():
    """The JAX program."""
    pytest.importorskip("jax", reason=jax_ppo.REASON)
    from benchmarks.peers import jax_trainer

    return jax_trainer


def test_jax_cartpole_is_gymnasiums(trainer, generator):
    state = torch.randn(64, 4, generator=generator) * torch.tensor([1.5, 1.0, 0.15, 1.0])
    action = torch.randint(2, (64,), generator=generator)
    after, fallen = trainer.step(state.numpy(), action.numpy())
    wanted, _, terminated = CARTPOLE.step(state.double(), action)
    assert 0 < terminated.sum() < 64
    assert np.array_equal(fallen, terminated)
    np.testing.assert_allclose(after, wanted, rtol=2e-6, atol=2e-6)


def test_jax_advantages_bootstrap_on_truncation_only(trainer, generator):
    value, next_value = torch.randn(2, 1, 20, 3, generator=generator).unbind()
    ended = torch.rand(1, 20, 3, generator=generator)
    terminated, truncated = ended < 0.2, ended > 0.8
    with use_backend("reference"):
        wanted, _ = gae(
            torch.ones_like(value), value, next_value, terminated, truncated, 0.99, 0.95
        )
    got = trainer.advantages(
        *(t[0].numpy() for t in (value, next_value, terminated, terminated | truncated)), PPO()
    )
    np.testing.assert_allclose(got, wanted[0], rtol=1e-5, atol=1e-5)


def test_jax_loss_gradient_and_adam_are_the_references(trainer, generator):
    import jax

    arena = policy_arena(env_spec("CartPole-v1"))
    mask = random_masks(1, arena.prunable, 80.0, generator)
    with use_backend("reference"):
        weight = initialise(arena, torch.arange(1))
    weight[:, : arena.prunable].masked_fill_(~mask, 0)
    samples = SETTINGS.batch
    draws = torch.randn(4, 1, samples, generator=generator)
    batch = Batch(
        torch.randn(1, samples, 4, generator=generator),
        torch.randint(2, (1, samples), generator=generator),
        *(-0.7 + 0.2 * draws[:1]), *draws[1:],
    )  # fmt: skip

    leaf = weight.double().requires_grad_()
    wide = Batch(*(t.double() if t.is_floating_point() else t for t in batch))
    total, _ = reference.loss(leaf, mask, arena, wide, SETTINGS.config())
    (grad,) = torch.autograd.grad(total.sum(), leaf)

    def layers(net, flat):
        return tuple((w[0].mT.numpy(), b[0].numpy()) for w, b in net.layers(flat))

    def params(flat):
        return layers(arena.actor, flat), layers(arena.critic, flat)

    masks = tuple(arena.actor.weight(mask, i)[0].mT.float().numpy() for i in range(3))
    ours = trainer.Samples(*(field[0].numpy() for field in batch))
    value, found = jax.value_and_grad(trainer.loss)(params(weight), masks, ours, SETTINGS)
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    scale = float(grad.abs().max())
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(params(grad)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * scale)

    config = SETTINGS.config()
    kept = {name: getattr(config, name) for name in ("max_norm", "beta1", "beta2", "eps")}
    m, v, rate = torch.zeros_like(weight), torch.zeros_like(weight), torch.tensor([2.5e-4])
    now = trainer.agent(jax.tree.map(jax.numpy.array, params(weight)), 0, 3)
    with use_backend("reference"):
        for count in (1, 2):
            adam_(weight, grad.float(), m, v, torch.full((1,), count - 1), rate, mask, **kept)
            now = trainer.adam(now, params(grad.float()), SETTINGS)
    for got, wanted in zip(
        jax.tree.leaves(now.params), jax.tree.leaves(params(weight)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-8)


def test_jax_agents_learn_pruned_ones_too(trainer):
    """Four agents at half density: episodes last several times longer after 30,000 steps each."""
    run, seconds, _ = jax_ppo.compiled(PPOJob(4, 50.0), 60)
    lengths = run()
    assert seconds > 0
    assert lengths.shape == (4, 60)
    first, last = lengths[:, :5].nanmean(1), lengths[:, -10:].nanmean(1)
    assert (last > 3 * first).all(), f"{first.tolist()} -> {last.tolist()}"


def test_jax_contender_counts_agent_steps(monkeypatch):
    asked = []

    def compiled(job, iterations):
        asked.append(iterations)
        return lambda: None, 1.25, "0.0"

    monkeypatch.setattr(jax_ppo, "compiled", compiled)
    contender = jax_ppo.ppo(PPOJob(2, 90.0, SETTINGS))
    assert contender.units == 2 * SETTINGS.batch * asked[0]
    assert contender.plan == "jax 0.0, compiled in 1.2 s"


def test_sb3_runs_an_iteration_on_one_thread():
    pytest.importorskip("stable_baselines3", reason="install sparse-tickets[peers]")
    before = torch.get_num_threads()
    contender = sb3.ppo(SETTINGS, "CartPole-v1")
    contender.run()
    assert contender.units == SETTINGS.batch
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("sparsity", [0.0, 50.0, 99.0])
@pytest.mark.parametrize("batch", [1, 33, 64])
def test_sparseprop_computes_the_reference(batch, sparsity):
    pytest.importorskip("sparseprop", reason=sparseprop.REASON)
    problem = LinearProblem(1, batch, 32, 24, sparsity)
    assert sparseprop.linear_forward(problem).error() <= 1
    assert sparseprop.linear_backward(problem).error() <= 1
    with pytest.raises(Unavailable, match="one ticket only"):
        sparseprop.linear_forward(LinearProblem(2, batch, 32, 24, sparsity))


def test_sparse_torch_says_what_it_cannot_do(monkeypatch):
    problem = LinearProblem(1, 4, 32, 16, 50.0)
    with pytest.raises(Unavailable, match="no gradient here"):
        torch_bsr.linear_backward(problem)
    with pytest.raises(Unavailable, match="one ticket only"):
        torch_bsr.linear_forward(LinearProblem(2, 4, 32, 16, 50.0))
    with pytest.raises(Unavailable, match="no block of 2 x 2 divides"):
        torch_bsr.linear_forward(LinearProblem(1, 4, 31, 16, 50.0))
    with pytest.raises(Unavailable, match="CUDA only"):
        torch_semi_structured.linear_forward(problem)
    problem.device = SimpleNamespace(type="cuda")
    with pytest.raises(Unavailable, match="more than two of some four"):
        torch_semi_structured.linear_forward(problem)
    problem.mask = LinearProblem(1, 4, 32, 16, 50.0, two_four=True).mask
    with pytest.raises(Unavailable, match="torch refuses this weight"):
        torch_semi_structured.linear_forward(problem)


def test_absent_peers_say_how_to_get_them(monkeypatch):
    for package in ("jax", "stable_baselines3", "sparseprop", "sparseprop.modules"):
        monkeypatch.setitem(sys.modules, package, None)
    job = SimpleNamespace(env_name="CartPole-v1", device="cpu")
    with pytest.raises(Unavailable, match=r"install sparse-tickets\[peers\]"):
        jax_ppo.ppo(job)
    with pytest.raises(Unavailable, match=r"install sparse-tickets\[peers\]"):
        sb3.ppo(SETTINGS, "CartPole-v1")
    with pytest.raises(Unavailable, match="pip install sparseprop"):
        sparseprop.linear_forward(LinearProblem(1, 2, 3, 4, 50.0))
    with pytest.raises(Unavailable, match="CartPole-v1 on the CPU only"):
        jax_ppo.ppo(SimpleNamespace(env_name="Acrobot-v1", device="cpu"))


def spread(median, width=0.01):
    return Spread(median, median * (1 - width), median * (1 + width), 9)


def record(op, shape, sparsity, speedup, unit="call", skipped=None, width=0.01):
    """Ours takes ten microseconds."""
    ratios = {name: spread(value, width) for name, value in speedup.items()}
    ours = Measured(spread(1e-5), spread(2e-5), 0.1, "plan", 3)
    contenders = {"ours": ours, **dict.fromkeys(ratios, ours)}
    return Record(op, shape, sparsity, unit, "ours", contenders, ratios, skipped or {})


@pytest.fixture
def run():
    layer, job = {"P": 1, "B": 2048, "I": 256, "O": 256}, {"P": 60, "envs": 4, "steps": 128}
    layers = [
        record("linear forward", layer, s, {"torch dense": x, "torch CSR": y, "SparseProp": 3.0})
        for s, x, y in ((0.0, 0.9, 2.0), (50.0, 0.8, 2.0), (80.0, 1.5, 2.0), (90.0, 4.25, 9.5))
    ]
    small = [record("linear forward", {**layer, "B": 1}, 90.0, {"torch dense": 0.95}, width=0.1)]
    why = {jax_ppo.NAME: jax_ppo.REASON}
    jobs = [
        record("PPO iteration", job, 0.0, {sb3.NAME: 80.0}, "agent-step", why),
        record("PPO iteration", job, 90.0, {FUSED_DENSE: 1.75}, "agent-step"),
    ]
    return results.SuiteRun(
        "cpu-test-2c", "full", "2026-01-02T03:04:05+00:00", 2, "Test, 2 cores", {"torch": "2"},
        "abc", spread(1e11), 7.0, 0.01, layers + small + jobs, [],
    )  # fmt: skip


PAGE = """\
# Title
<!-- steps:begin -->
old steps
<!-- steps:end -->
<!-- jobs:begin -->
<!-- jobs:end -->
<!-- population:begin -->
what stood there
<!-- population:end -->
between
<!-- losses:begin -->
<!-- losses:end -->
end
"""


def test_the_report_fills_in_both_pages(run, tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text(PAGE)
    results.save(run, folder / "wide.json")
    narrow = replace(run, device="nvidia-test", hardware="Other", records=run.records[:1])
    results.save(narrow, folder / "narrow.json")
    paths = {"--results": folder, "--out": tmp_path / "out", "--readme": page}
    command = ["report", *(str(part) for pair in paths.items() for part in pair)]
    assert main(command) == 0
    origin = (
        f"Not run - {jax_ppo.NAME}: {jax_ppo.REASON}.",
        "Measured on Test, 2 cores, 2 threads; torch 2; commit abc; 2026-01-02. A",
    )
    text = page.read_text()
    for said in (
        "| level 0, dense | 100,000 | - | - | 80.00x |",
        "| actor at 10% density | 100,000 | 1.75x | - | - |",
        "\nbetween\n",
        *origin,
    ):
        assert said in text, said
    assert "what stood there" not in text
    assert "Other" not in text
    assert "linear forward" not in text, "no isolated calls here"
    kernels = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "forward, vs torch dense | 0.80x | 1.50x | 4.25x | - | - |",
        "forward, vs fastest sparse peer | 2.00x | 2.00x | 3.00x | - | - |",
        "In 2 of the 7 configurations",
        "| linear forward, P = 1, B = 2048, I = 256, O = 256 | torch dense 0.80-0.90x at 0-50% |",
        *origin,
    ):
        assert said in kernels, said
    brief = kernels.split("## cpu-test-2c")[0]
    assert "B = 1, I = 256" not in brief, "within noise"
    assert main(command) == 0
    assert page.read_text() == text, "a second report changes nothing"


def test_a_page_without_markers_is_refused_and_left_alone(run, tmp_path):
    page = tmp_path / "README.md"
    for damaged in (PAGE.replace("losses:end", "losses"), PAGE + PAGE):
        page.write_text(damaged)
        with pytest.raises(ValueError, match="must have the markers"):
            first_screen.rewrite(page, {run.device: [run]})
        assert page.read_text() == damaged


def test_no_results_and_no_losses_are_said(run, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    first_screen.rewrite(page, {})
    assert page.read_text().count("Not measured yet") == 4
    wins = replace(run, records=run.records[2:4])
    assert brief.losses(wins).startswith("No peer was faster in any of the 2")
    assert "cores: neither times nor ratios" in brief.origin(replace(run, busy=3.0))


def test_the_top_readme_has_the_markers(run, tmp_path):
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "80.00x" in first_screen.rewrite(page, {run.device: [run]}).read_text()
