"""Cloning in states that students visit, and by replay of the experts' own training."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos import bc, ppo, teaching
from sparse_tickets.algos.algorithm import History, Networks
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.cli import main
from sparse_tickets.dynamic import METHODS, Pruning
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import spec_hash

ENV = "CartPole-v1"
SHORT = PPO(steps=4 * 64, copies=2, horizon=32, epochs=2, minibatches=2, learning_rate=1e-3)
FEW = Evaluation(points=1, episodes=2, final_episodes=4)
EXPERT = policy_arena(env_spec(ENV), (12,))
STUDENT = policy_arena(env_spec(ENV), (12,), critic=False)
KEY = torch.tensor([3, -4, 5])
ASSIGNMENT = torch.tensor([1, 0, 1])


@pytest.fixture(scope="module")
def experts():
    return teaching.train_experts(bc.BC(experts=2), SHORT, ENV, EXPERT, 0.0, evaluation=FEW)


@pytest.fixture(scope="module")
def taught(experts):
    return {
        "student": teaching.networks(experts, EXPERT),
        "replay": teaching.history(experts, SHORT, ENV, EXPERT),
    }


def students(chosen=(0, 1, 2)):
    chosen = list(chosen)
    weight = initialise(STUDENT, torch.tensor([7, 8, 9]))
    return Population.create(STUDENT, weight[chosen]), KEY[chosen], ASSIGNMENT[chosen]


def log_probabilities(weight, obs):
    return mlp(obs, weight, EXPERT.actor).log_softmax(-1)


def test_history_is_each_policy_of_the_training_on_its_own_rollout(experts, taught):
    """Against the training itself, and what its policies say of what they saw."""
    keys = [
        torch.tensor([derive_key(name, ENV, seed) for seed in experts.seeds.tolist()])
        for name in ("init", "expert")
    ]
    population = Population.create(EXPERT, initialise(EXPERT, keys[0]))
    policies = [population.parameters.weight.clone()]

    def remember(_):
        policies.append(population.parameters.weight.clone())

    result = ppo.train(SHORT, ENV, population, keys[1], evaluation=FEW, on_iteration=remember)
    assert torch.equal(result.final, experts.weight)
    seen, target = taught["replay"]
    assert seen.shape == (2, SHORT.iterations * SHORT.batch, 4)
    rounds = zip(policies, seen.split(SHORT.batch, 1), target.split(SHORT.batch, 1), strict=False)
    for policy, obs, said in rounds:
        torch.testing.assert_close(said, log_probabilities(policy, obs), rtol=1e-5, atol=1e-6)
    env = make_env(ENV, 2, SHORT.copies)
    first, _ = rollout(
        Population.create(EXPERT, policies[0]).parameters,
        EXPERT,
        env,
        env.reset(keys[1]),
        keys[1],
        SHORT.horizon,
    )
    assert torch.equal(seen[:, : SHORT.batch], first.obs.flatten(1, 2))


def test_replay_goes_through_the_history_in_order(taught):
    """What comes later in it is not seen before its iteration."""
    history = taught["replay"]
    later = History(history.obs.clone(), history.target)
    later.obs[:, 2 * SHORT.batch :] += 1.0
    trained = []
    for shown in (history, later):
        population, key, assignment = students()
        iterate = bc.Iteration(SHORT, population, key, shown, assignment, 0)
        iterate.learning_rate.fill_(1e-3)
        trained.append([])
        for _ in range(SHORT.iterations):
            iterate()
            trained[-1].append(population.parameters.weight.clone())
    same = [torch.equal(one, other) for one, other in zip(*trained, strict=True)]
    assert same == [True, True, False, False]


def test_students_are_answered_by_their_experts_where_they_go(experts, taught):
    population, key, assignment = students()
    env, alone = (make_env(ENV, 3, SHORT.copies) for _ in range(2))
    iterate = bc.Iteration(SHORT, population, key, taught["student"], assignment, 0, env)
    iterate.learning_rate.fill_(1e-2)
    obs = alone.reset(key)
    for _ in range(2):
        visited, obs = rollout(population.parameters, STUDENT, alone, obs, key, SHORT.horizon)
        iterate()
        seen, answers, rows = iterate._lesson
        assert torch.equal(seen, visited.obs.flatten(1, 2))
        expected = log_probabilities(experts.weight[assignment], seen)
        torch.testing.assert_close(answers, expected, rtol=1e-5, atol=1e-6)
        assert rows.tolist() == [0, 1, 2]
    assert (iterate.dense_gradient().abs().sum(1) > 0).all()


@pytest.mark.parametrize("states", ["student", "replay"])
def test_students_learn_each_by_itself_and_go_on_where_they_were(states, taught):
    shown = taught[states]

    def train(chosen, **schedule):
        population, key, assignment = students(chosen)
        return bc.train(SHORT, ENV, population, key, shown, assignment, evaluation=FEW, **schedule)

    together, alone = train((0, 1, 2)), train((1,))
    assert torch.equal(together.final[1:2], alone.final)
    assert torch.equal(together.curve[1:2], alone.curve)
    assert not torch.equal(together.final, together.initial)
    pruned = train((0, 1, 2), pruning=Pruning(replace(METHODS["rigl"], every=2), 0.3))
    kept = (pruned.final[:, : STUDENT.prunable] != 0).sum(1)
    assert (kept <= round(0.3 * STUDENT.prunable)).all()


def test_networks_keep_what_students_are_to_imitate():
    swing = policy_arena(env_spec("Pendulum-v1"), (6,))
    weight = initialise(swing, torch.tensor([1, 2]), log_std=-0.7)
    experts = teaching.Experts(weight, torch.zeros(2), torch.tensor([1, 2]))
    shown = teaching.networks(experts, swing)
    alone = policy_arena(env_spec("Pendulum-v1"), (6,), critic=False)
    obs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mlp(obs, shown.weight, alone.actor), mlp(obs, weight, swing.actor))
    assert (shown.weight[:, alone.log_std :] == -0.7).all()
    sharp = teaching.networks(teaching.Experts(weight, *experts[1:]), swing, temperature=0.5)
    torch.testing.assert_close(
        mlp(obs, sharp.weight, alone.actor), 2 * mlp(obs, weight, swing.actor)
    )
    assert torch.equal(experts.weight, initialise(swing, torch.tensor([1, 2]), log_std=-0.7))


SPEC = Sweep(
    algos=("bc",),
    conditions=("mask/weights",),
    seeds=2,
    levels=2,
    hidden=(8,),
    ppo=SHORT,
    evaluation=FEW,
)


@pytest.mark.long
@pytest.mark.parametrize("states", ["student", "replay"])
def test_sweeps_of_them_are_verified_and_chunks_change_nothing(states, tmp_path, capsys):
    spec = replace(SPEC, bc=bc.BC(experts=2, expert_gate=0.0, states=states))
    store, small = run(spec, tmp_path / "a"), run(replace(spec, chunk=1), tmp_path / "b")
    assert Sweep.from_dict(store.spec) == spec
    whole, single = (
        [ticket for unit in each.units() for ticket in each.read_tickets(unit)]
        for each in (store, small)
    )
    assert len(whole) == 4
    for one, other in zip(whole, single, strict=True):
        assert torch.equal(one.final, other.final)
    assert main(["verify", str(tmp_path / "a"), "--cells", "1"]) == 0


def test_the_command_line_offers_them_and_other_sweeps_stay_what_they_were(tmp_path, capsys):
    options = ["--algos", "bc", "--seeds", "1", "--levels", "1", "--hidden", "8"]
    options += ["--ppo.steps", "512", "--bc.experts", "1", "--bc.states", "student", "--dry-run"]
    assert main(["sweep", *options, "--out", str(tmp_path / "run")]) == 0
    assert "bc" in capsys.readouterr().out
    plain = SPEC.to_dict()
    assert "states" not in plain["bc"]
    assert Sweep.from_dict(plain) == SPEC
    asked = replace(SPEC, bc=bc.BC(states="student"))
    assert spec_hash(asked.to_dict()) != spec_hash(plain)


def test_refuses_what_it_cannot_teach(taught):
    population, key, assignment = students()
    arguments = (population, key, taught["replay"], assignment)
    with pytest.raises(ValueError, match=r"dataset must have 320 transitions.*got 256"):
        bc.train(replace(SHORT, steps=320), ENV, *arguments)
    networks = taught["student"]
    with pytest.raises(ValueError, match=r"assignment must be in \[0, 2\), got \[1, 2, 0\]"):
        bc.train(SHORT, ENV, population, key, networks, torch.tensor([1, 2, 0]))
    with pytest.raises(ValueError, match=r"dataset\.weight must have shape \(D, 86\)"):
        bc.train(SHORT, ENV, population, key, Networks(networks.weight[:, 1:]), assignment)
    with pytest.raises(ValueError, match="env must be given to learn in one's own states"):
        bc.Iteration(SHORT, population, key, networks, assignment, 0)
    with pytest.raises(ValueError, match=r"bc\.states must be one of expert, student, replay"):
        bc.BC(states="teacher")
    with pytest.raises(ValueError, match=r"bc\.states must be expert with bc\.dataset.*'student'"):
        bc.BC(states="student", dataset=("D4RL/pen/human-v2",))
    for setting in ({"expert": "dqn"}, {"expert_steps": 512}):
        with pytest.raises(ValueError, match=r"bc\.states replay follows a training by PPO"):
            bc.BC(states="replay", **setting)
