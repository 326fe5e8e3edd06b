"""DQN in sweeps: every condition, in chunks or whole, verified, with a budget of its own."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.cli import main
from sparse_tickets.conditions import CONDITIONS
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.sweep.data import read_data
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results, spec_hash

pytestmark = pytest.mark.usefixtures("undrawn")

SPEC = Sweep(
    algos=("dqn",),
    conditions=tuple(CONDITIONS),
    seeds=2,
    levels=3,
    hidden=(8,),
    activation="relu",
    rewind_step=64,
    dqn=DQN(steps=256, copies=2, horizon=16, updates=2, minibatch=8, warmup=32, capacity=128),
    evaluation=Evaluation(points=2, episodes=2, final_episodes=2),
)


def tickets(store):
    return {
        (t.condition, t.controls, t.seed, t.level): t
        for unit in store.units()
        for t in store.read_tickets(unit)
    }


@pytest.mark.long
def test_every_condition_trains_and_chunks_change_nothing(tmp_path):
    steps = []
    store = run(SPEC, tmp_path / "a", on_progress=lambda _, done: steps.append(done))
    assert sum(steps) == total_steps(SPEC)
    frame = load_results(tmp_path / "a")
    assert set(frame["algo"]) == {"dqn"}
    assert set(frame["condition"]) == {"dense", *CONDITIONS}
    assert not frame["diverged"].any()
    assert {level: set(part["train_steps"]) for (level,), part in frame.group_by("level")} == {
        0: {256},
        1: {192},
        2: {192},
    }
    whole = tickets(store)
    for (_, _, _, level), ticket in whole.items():
        assert int(ticket.mask.sum()) == SPEC.kept("dqn", level)
        assert (ticket.final[: len(ticket.mask)][~ticket.mask] == 0).all()
        assert not torch.equal(ticket.final, ticket.rewind)
    small = run(replace(SPEC, chunk=3), tmp_path / "b")
    for place, ticket in tickets(small).items():
        assert torch.equal(ticket.final, whole[place].final), place
        assert torch.equal(ticket.mask, whole[place].mask), place


@pytest.mark.long
def test_the_command_line_trains_estimates_and_verifies(tmp_path, capsys):
    options = ["--algos", "dqn", "--seeds", "1", "--levels", "2", "--hidden", "8"]
    options += ["--dqn.steps", "128", "--dqn.copies", "2", "--dqn.horizon", "16"]
    options += ["--dqn.updates", "2", "--dqn.warmup", "32", "--dqn.no-double"]
    options += ["--dqn.loss", "squared"]
    options += ["--evaluation.points", "1", "--evaluation.episodes", "2"]
    arguments = ["sweep", *options, "--evaluation.final-episodes", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--dry-run"]) == 0
    assert "dqn" in capsys.readouterr().out
    assert main(arguments) == 0
    assert Store(tmp_path).spec["dqn"]["double"] is False
    assert Store(tmp_path).spec["dqn"]["loss"] == "squared"
    assert main(["verify", str(tmp_path), "--cells", "2"]) == 0


def test_other_sweeps_are_what_they_were():
    plain = Sweep(algos=("ppo",)).to_dict()
    assert "dqn" not in plain
    assert spec_hash(Sweep(algos=("ppo",), dqn=DQN(gamma=0.5)).to_dict()) == spec_hash(plain)
    assert Sweep.from_dict(plain) == Sweep(algos=("ppo",))
    assert Sweep.from_dict(SPEC.to_dict()) == SPEC
    # As they were stored before there was a choice of losses.
    assert "loss" not in SPEC.to_dict()["dqn"]
    squared = replace(SPEC, dqn=replace(SPEC.dqn, loss="squared"))
    assert spec_hash(squared.to_dict()) != spec_hash(SPEC.to_dict())
    assert Sweep.from_dict(squared.to_dict()) == squared
    with pytest.raises(ValueError, match=r"dqn\.loss must be one of huber, squared, got 'mse'"):
        DQN(loss="mse")
    damaged = SPEC.to_dict()
    del damaged["dqn"]
    with pytest.raises(ValueError, match=r"Sweep lacks \['dqn'\]"):
        Sweep.from_dict(damaged)


def test_cloning_dqn_experts_imitates_the_softmax_of_their_values(tmp_path):
    experts = BC(experts=1, expert="dqn", temperature=0.25, expert_gate=0.0, expert_steps=128)
    budget = PPO(steps=256, copies=2, horizon=64)
    spec = replace(SPEC, algos=("bc", "dqn"), levels=1, rewind_step=0, bc=experts, ppo=budget)
    store = run(spec, tmp_path)
    assert Sweep.from_dict(store.spec) == spec
    data = read_data(store, "demonstrations")
    network, obs = spec.expert_arena.actor, data["obs"]
    assert spec.expert_arena.critic is None
    values = mlp(obs, read_data(store, "experts")["weight"], network)
    torch.testing.assert_close(data["target"], (values / 0.25).log_softmax(-1))
    initial = [ticket.initial for unit in store.units() for ticket in store.read_tickets(unit)[:1]]
    assert torch.equal(*initial)


def test_the_expert_is_one_that_there_is():
    with pytest.raises(ValueError, match=r"bc\.expert must be ppo, dqn or sac, got 'td3'"):
        BC(expert="td3")
    with pytest.raises(ValueError, match=r"bc.temperature must be 1 for PPO experts.*got 0.5"):
        BC(temperature=0.5)
    with pytest.raises(ValueError, match=r"bc\.temperature must be above 0"):
        BC(expert="dqn", temperature=0.0)
    assert not {"expert", "temperature"} & Sweep().to_dict()["bc"].keys()


def test_budgets_are_each_algorithms_own():
    both = replace(SPEC, algos=("ppo", "dqn"), ppo=PPO(steps=640, copies=2, horizon=32))
    assert both.train_steps("ppo", 0) == 640
    assert both.train_steps("dqn", 0) == 256
    assert both.budget("bc") is both.ppo
    assert (both.rewind_iteration("ppo"), both.rewind_iteration("dqn")) == (1, 2)
    with pytest.raises(ValueError, match=r"multiple of copies \* horizon = 32, got 40"):
        replace(SPEC, rewind_step=40)


def test_continuous_actions_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="dqn needs discrete actions, got continuous ones"):
        run(replace(SPEC, env="Pendulum-v1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
