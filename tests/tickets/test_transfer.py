"""Masks of one run trained by another's algorithm, task or inputs."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets import Sweep, run_sweep, transfer
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.analysis.transfer import input_mask, stored_tickets
from sparse_tickets.connectivity import connectivity, live_inputs
from sparse_tickets.envs import ClassicEnv, env_spec, register_env
from sparse_tickets.files import StoreError
from sparse_tickets.kernels import use_backend
from sparse_tickets.population import policy_arena
from sparse_tickets.sweep.store import Store

pytestmark = pytest.mark.usefixtures("plain_torch")
TASK = "CartPole of another scale"
SPEC = Sweep(
    conditions=("mask/weights", "permuted/permuted"),
    seeds=3,
    levels=3,
    rate=0.8,
    rewind_step=256,
    hidden=(8,),
    ppo=PPO(steps=1024, horizon=32, learning_rate=0.02),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=Evaluation(2, 2, 4),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with use_backend("auto"):
        run_sweep(SPEC, folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another task of the same shape, where nothing but dense networks is trained."""
    spec = replace(env_spec("CartPole-v1"), name=TASK, scale=(2.0,) * 4)
    register_env(TASK, lambda *a, **k: ClassicEnv("CartPole-v1", *a, **k), spec, overwrite=True)
    folder = tmp_path_factory.mktemp("other")
    with use_backend("auto"):
        run_sweep(replace(SPEC, env=TASK, levels=1, algos=("ppo",), rewind_step=0), folder)
    return folder


@pytest.mark.parametrize(("algo", "found_by"), [("ppo", "bc"), ("bc", "ppo"), ("ppo", "ppo")])
def test_an_algorithm_trains_its_own_starts_under_anothers_masks(run, algo, found_by):
    with use_backend("auto"):
        rows, tickets = transfer(run, algo, 2, found_by=found_by, shift=-1)
    store = Store(run)
    dense, masks = stored_tickets(store, algo, 0), stored_tickets(store, found_by, 2)
    assert rows["seed"].to_list() == [0, 1, 2]
    assert rows["masks_seed"].to_list() == [2, 0, 1]
    assert set(rows["masks_algo"]) == {found_by}
    assert set(rows["algo"]) == {algo}
    assert set(rows["train_steps"]) == {768}  # it goes on from where the run rewinds to
    for seed, ticket in enumerate(tickets):
        mask = masks[(seed - 1) % 3].mask
        assert torch.equal(ticket.mask, mask)
        for which in ("initial", "rewind"):
            expected = dense[seed].row(which).clone()
            expected[: len(mask)][~mask] = 0
            assert torch.equal(ticket.row(which), expected)
        assert not torch.equal(ticket.final, ticket.rewind)
    assert rows["density"].to_list() == [ticket.density for ticket in tickets]


def test_moments_and_steps_go_on_from_the_rewind_point(run, monkeypatch):
    from sparse_tickets.analysis import transfer as module
    from sparse_tickets.sweep.unit import Unit

    seen = {}
    train = module.train_population

    def spy(spec, algo, population, *rest):
        seen.update(m=population.parameters.m.clone(), step=population.parameters.step.clone())
        return train(spec, algo, population, *rest)

    monkeypatch.setattr(module, "train_population", spy)
    with use_backend("auto"):
        tickets = transfer(run, "ppo", 1, found_by="bc").tickets
    stored = Store(run).read_rewind(Unit("ppo", 0, 0))
    assert torch.equal(seen["step"], stored["step"])
    assert stored["step"].all()
    for seed, ticket in enumerate(tickets):
        prunable = len(ticket.mask)
        assert torch.equal(seen["m"][seed, prunable:], stored["m"][seed, prunable:])
        kept = stored["m"][seed, :prunable] * ticket.mask
        assert torch.equal(seen["m"][seed, :prunable], kept)
        assert kept.any()


def test_a_mask_of_another_task(run, other):
    with use_backend("auto"):
        rows, tickets = transfer(other, "ppo", 1, masks=run, found_by="bc")
    assert set(rows["env"]) == {TASK}
    assert set(rows["masks_env"]) == {"CartPole-v1"}
    for ticket, mask in zip(tickets, stored_tickets(Store(run), "bc", 1), strict=True):
        assert torch.equal(ticket.mask, mask.mask)
        assert ticket.env == TASK
        assert ticket.scale == (2.0,) * 4
    again = transfer(other, "ppo", 1, masks=run, found_by="bc").rows
    assert again.drop("wall_s").equals(rows.drop("wall_s"))


def test_dense_on_the_inputs_that_survive(run):
    chosen = {"condition": "permuted/permuted", "keep": "inputs"}
    with use_backend("auto"):
        rows, tickets = transfer(run, "ppo", 2, **chosen)
    masks = stored_tickets(Store(run), "ppo", 2, "permuted/permuted")
    assert set(rows["keep"]) == {"inputs"}
    for ticket, found in zip(tickets, masks, strict=True):
        lives = live_inputs(found.mask[None], found.arena)[0]
        first = ticket.arena.actor.weight(ticket.mask[None], 0)[0]
        assert torch.equal(first, lives.expand_as(first))
        assert ticket.mask[first.numel() :].all()
        assert ticket.mask.sum() > found.mask.sum()


def test_the_command_writes_every_level_once(run, tmp_path, capsys, monkeypatch):
    from sparse_tickets.analysis import transfer as module
    from sparse_tickets.cli import main
    from sparse_tickets.ticket import load_tickets

    out = tmp_path / "out"
    command = ["transfer", str(run), "--out", str(out), "--found-by", "bc", "--levels"]
    with use_backend("auto"):
        assert main([*command, "1", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "CartPole-v1: ppo under the masks of bc on CartPole-v1, means of 3 seeds" in said
    assert "20.8%" in said  # 10 of 48 weights
    assert "4.2%" in said  # 2 of 48 weights
    for level in (1, 2):
        tickets = load_tickets(out / f"level-{level:02d}.safetensors")
        found = stored_tickets(Store(run), "bc", level)
        for ticket, source in zip(tickets, found, strict=True):
            assert torch.equal(ticket.mask, source.mask)
            assert ticket.algo == "ppo"
    monkeypatch.setattr(module, "transfer", None)  # nothing is trained again
    assert main([*command, "2"]) == 0
    assert main([*command, "2", "--keep", "inputs"]) == 1
    assert "holds masks transferred otherwise" in capsys.readouterr().err


def test_what_was_refused_leaves_the_folder_to_the_command_mended(run, tmp_path, capsys):
    from sparse_tickets.cli import main

    out = tmp_path / "out"
    command = ["transfer", str(run), "--out", str(out), "--levels", "2"]
    assert main([*command, "--algo", "sac"]) == 2
    assert main([*command, "--condition", "random/re-init"]) == 1
    capsys.readouterr()
    assert not out.exists()
    with use_backend("auto"):
        assert main(command) == 0, capsys.readouterr().err


def test_live_inputs_are_those_that_are_not_dead():
    generator = torch.Generator().manual_seed(0)
    for arena in (
        policy_arena(env_spec("Acrobot-v1"), (6, 5)),
        policy_arena(env_spec("Acrobot-v1"), (6, 5), architecture="residual"),
    ):
        mask = torch.rand(20, arena.prunable, generator=generator) < 0.08
        lives = live_inputs(mask, arena)
        assert torch.equal((~lives).sum(1), connectivity(mask, arena).dead_inputs)
        assert lives.any()
        assert not lives.all()
        dense = input_mask(lives, arena)
        assert torch.equal(live_inputs(dense, arena), lives)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algo": "dqn"}, "algo must be one of ppo, bc, got 'dqn'"),
        ({"found_by": "sac"}, "found_by must be one of ppo, bc, got 'sac'"),
        ({"keep": "units"}, "keep must be one of mask, inputs, got 'units'"),
        ({"level": 0}, r"level must be in \[1, 3\), as the masks' run, got 0"),
        ({"level": 3}, r"level must be in \[1, 3\), as the masks' run, got 3"),
    ],
)
def test_what_is_not_there_is_refused(run, changes, said):
    with pytest.raises(ValueError, match=said):
        transfer(run, **({"algo": "ppo", "level": 1} | changes))


def test_masks_of_other_layers_are_refused(run, other, tmp_path):
    with pytest.raises(StoreError, match=r"0 masks of ppo, random/re-init \(own\), at level 1"):
        transfer(run, "ppo", 1, condition="random/re-init")
    small = replace(SPEC, levels=1, algos=("ppo",), rewind_step=0)
    with use_backend("auto"):
        run_sweep(replace(small, hidden=(4,)), tmp_path / "narrow")
        run_sweep(replace(small, prune_critic=True), tmp_path / "critic")
        run_sweep(replace(small, during="set"), tmp_path / "during")
    with pytest.raises(ValueError, match=r"masks must be of layers \(4, 4, 2\), mlp.*\(4, 8, 2\)"):
        transfer(tmp_path / "narrow", "ppo", 1, masks=run)
    with pytest.raises(ValueError, match="masks must be of actors alone"):
        transfer(tmp_path / "critic", "ppo", 1, masks=run)
    with pytest.raises(ValueError, match="got one with during='set'"):
        transfer(tmp_path / "during", "ppo", 1, masks=run)
