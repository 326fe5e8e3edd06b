"""Sweeps of SAC: every condition, resumed and cut into chunks; critics that are pruned or not."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.sac import SAC
from sparse_tickets.cli import main
from sparse_tickets.conditions import CONDITIONS
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.sweep.data import read_data
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results, spec_hash
from sparse_tickets.ticket import Ticket

pytestmark = pytest.mark.usefixtures("undrawn")

SPEC = Sweep(
    env="Pendulum-v1",
    algos=("sac",),
    conditions=tuple(CONDITIONS),
    seeds=2,
    levels=3,
    hidden=(8,),
    activation="relu",
    rewind_step=32,
    sac=SAC(steps=96, copies=2, horizon=8, updates=2, minibatch=16, warmup=16, capacity=64),
    evaluation=Evaluation(points=1, episodes=2, final_episodes=2),
)


def tickets(store):
    return {
        (t.condition, t.controls, t.seed, t.level): t
        for unit in store.units()
        for t in store.read_tickets(unit)
    }


@pytest.mark.parametrize("pruned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_condition_trains_and_chunks_change_nothing(pruned, tmp_path):
    spec = replace(SPEC, prune_critic=pruned)
    steps = []
    store = run(spec, tmp_path / "a", on_progress=lambda _, done: steps.append(done))
    assert sum(steps) == total_steps(spec)
    frame = load_results(tmp_path / "a")
    assert set(frame["condition"]) == {"dense", *CONDITIONS}
    assert not frame["diverged"].any()
    whole = tickets(store)
    for (_, _, _, level), ticket in whole.items():
        arena = ticket.arena
        assert arena == spec.arena("sac")
        assert int(ticket.mask.sum()) == spec.kept("sac", level)
        assert not torch.equal(ticket.final, ticket.rewind)
        pruned_weights = ~ticket.mask[arena.critic.weights[0] :]
        assert bool(pruned_weights.any()) == (pruned and level > 0)
    small = run(replace(spec, chunk=3), tmp_path / "b")
    for place, ticket in tickets(small).items():
        assert torch.equal(ticket.final, whole[place].final), place
        assert torch.equal(ticket.mask, whole[place].mask), place
    assert load_results(tmp_path / "b")["return_final"].equals(frame["return_final"])


@pytest.mark.slow
def test_the_command_line_trains_estimates_and_verifies(tmp_path, capsys):
    options = ["--env", "Pendulum-v1", "--algos", "sac", "--seeds", "1", "--levels", "2"]
    options += ["--hidden", "8", "--sac.steps", "96", "--sac.copies", "2", "--sac.horizon", "16"]
    options += ["--sac.updates", "2", "--sac.warmup", "32", "--sac.target-entropy", "-0.5"]
    options += ["--evaluation.points", "1", "--evaluation.episodes", "2"]
    out = tmp_path / "run"
    arguments = ["sweep", *options, "--evaluation.final-episodes", "2", "--out", str(out)]
    assert main([*arguments, "--dry-run"]) == 0
    assert "sac" in capsys.readouterr().out
    assert main(arguments) == 0
    assert Store(out).spec["sac"]["target_entropy"] == -0.5
    assert main(["verify", str(out), "--cells", "2"]) == 0
    stored = tickets(Store(out))
    ticket = stored["mask/weights", "own", 0, 1]
    ticket.save(tmp_path / "ticket")
    again = Ticket.load(tmp_path / "ticket")
    assert again.squashed
    assert torch.equal(again.final, ticket.final)
    head = again.to_sequential()(torch.zeros(5, 3))
    assert head.shape == (5, 2)  # a mean and a log standard deviation


def test_other_sweeps_are_what_they_were():
    plain = Sweep(algos=("ppo",)).to_dict()
    assert "sac" not in plain
    assert spec_hash(Sweep(algos=("ppo",), sac=SAC(gamma=0.5)).to_dict()) == spec_hash(plain)
    assert Sweep.from_dict(SPEC.to_dict()) == SPEC


@pytest.mark.long
def test_students_of_sac_are_squashed_and_imitate_the_gaussians(tmp_path):
    experts = BC(experts=1, expert="sac", expert_gate=-2_000.0, expert_steps=64)
    budget = PPO(steps=256, copies=2, horizon=64)
    spec = replace(SPEC, algos=("bc", "sac"), levels=2, rewind_step=0, bc=experts, ppo=budget)
    spec = replace(spec, conditions=("mask/weights",))
    store = run(spec, tmp_path)
    assert Sweep.from_dict(store.spec) == spec
    data = read_data(store, "demonstrations")
    head = mlp(data["obs"], read_data(store, "experts")["weight"], spec.expert_arena.actor)
    torch.testing.assert_close(data["target"], head)
    student, own = spec.arena("bc"), spec.arena("sac")
    assert (student.squashed, student.critic, student.actor.sizes) == (True, None, own.actor.sizes)
    found = {unit.algo: store.read_tickets(unit)[0] for unit in store.units() if unit.level == 0}
    assert torch.equal(
        found["bc"].initial[: student.prunable], found["sac"].initial[: own.prunable]
    )
    assert not torch.equal(found["bc"].final, found["bc"].initial)
    assert set(load_results(tmp_path)["algo"]) == {"bc", "sac"}


def test_refusals_come_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="as sac trains, needs continuous actions, CartPole-v1"):
        run(replace(SPEC, env="CartPole-v1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"bc\.expert must be ppo with bc\.dataset"):
        BC(expert="sac", dataset=("pendulum/expert-v0",))
    with pytest.raises(ValueError, match=r"bc\.temperature must be 1 for SAC experts"):
        BC(expert="sac", temperature=0.5)
