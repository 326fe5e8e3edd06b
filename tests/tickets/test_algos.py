"""Training: PPO and cloning learn, ticket by ticket, and are judged as the protocol says."""

from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets.algos import bc, ppo, teaching
from sparse_tickets.algos.evaluation import BEST_INDEX, FINAL_INDEX, Evaluation, Evaluator
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.envs import GymEnv, env_spec, gym_spec, make_env, register_env
from sparse_tickets.envs.registry import _registry
from sparse_tickets.kernels.imitation.reference import loss
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.prune import random_mask

CARTPOLE = "CartPole-v1"
QUICK = PPO(steps=40 * 256, copies=8, horizon=32, learning_rate=3e-3)
SHORT = PPO(steps=4 * 128, copies=4, horizon=32, learning_rate=1e-3)
FEW = Evaluation(points=2, episodes=4, final_episodes=6)


def keys(name, count):
    return torch.tensor([derive_key(name, index) for index in range(count)])


def population(env, count, *, critic=True, hidden=(16, 16), density=1.0):
    arena = policy_arena(env_spec(env), hidden, critic=critic)
    mask = None
    if density < 1:
        mask = random_mask(keys("mask", count), round(density * arena.prunable), arena)
    return Population.create(arena, initialise(arena, keys("init", count)), mask, density)


def rows(dense, chosen):
    """A population of some of another's tickets."""
    parameters = dense.parameters
    return Population.create(
        dense.arena, parameters.weight[chosen], parameters.mask[chosen], dense.density
    )


@pytest.fixture(scope="module")
def experts():
    """Two PPO experts on CartPole, and their data set."""
    arena = policy_arena(env_spec(CARTPOLE), (16, 16))
    trained = teaching.train_experts(
        bc.BC(experts=2), QUICK, CARTPOLE, arena, 100.0, evaluation=Evaluation(1, 1, 20)
    )
    return arena, trained, teaching.demonstrations(trained, CARTPOLE, arena, QUICK.steps)


def test_ppo_learns_cartpole():
    result = ppo.train(QUICK, CARTPOLE, population(CARTPOLE, 3), keys("train", 3))
    assert (result.return_final > 4 * env_spec(CARTPOLE).random_return).all()
    assert (result.return_best >= 0.8 * result.return_final).all()
    assert (result.curve[:, -1] > result.curve[:, 0]).all()


def test_sparse_tickets_learn_too():
    result = ppo.train(QUICK, CARTPOLE, population(CARTPOLE, 3, density=0.3), keys("train", 3))
    assert (result.return_final > 3 * env_spec(CARTPOLE).random_return).all()


@pytest.mark.long
def test_a_students_loss_falls_to_its_experts(experts):
    _, trained, dataset = experts
    students = population(CARTPOLE, 3, critic=False)
    assignment = torch.tensor([0, 1, 1])

    def divergence():
        weight, mask = students.parameters.weight, students.parameters.mask
        obs, target = dataset.obs[assignment], dataset.target[assignment]
        return loss(weight, mask, students.arena, obs, target)

    before = divergence()
    result = bc.train(QUICK, CARTPOLE, students, keys("train", 3), dataset, assignment)
    assert (divergence() < 0.05 * before).all()
    assert (result.return_final > 0.7 * trained.returns[assignment]).all()
    # The other expert is imitated less well: the assignment is what decides.
    swapped = 1 - assignment
    weight, mask = students.parameters.weight, students.parameters.mask
    other = loss(weight, mask, students.arena, dataset.obs[swapped], dataset.target[swapped])
    assert (other > divergence()).all()


def test_demonstrations_are_the_experts_own_distributions(experts):
    arena, trained, dataset = experts
    assert dataset.obs.shape == (2, QUICK.steps, 4)
    assert dataset.target.shape == (2, QUICK.steps, 2)
    expert = Population.create(arena, trained.weight)
    expected = expert.actor(dataset.obs).log_softmax(-1)
    torch.testing.assert_close(dataset.target, expected, rtol=1e-4, atol=1e-4)
    again = teaching.demonstrations(trained, CARTPOLE, arena, QUICK.steps)
    assert torch.equal(again.obs, dataset.obs)


def test_experts_are_the_first_that_pass_the_gate(experts):
    _, trained, _ = experts
    assert (trained.returns >= 100).all()
    seeds = trained.seeds.tolist()
    assert seeds == sorted(seeds)
    assert min(seeds) >= teaching.FIRST_EXPERT_SEED


def test_too_few_experts_say_what_was_reached_and_what_to_do():
    arena = policy_arena(env_spec(CARTPOLE), (8,))
    settings = bc.BC(experts=2, expert_tries=2)
    with pytest.raises(teaching.ExpertError) as error:
        teaching.train_experts(
            settings, SHORT, CARTPOLE, arena, 499.0, evaluation=Evaluation(1, 1, 3)
        )
    message = str(error.value)
    assert "only 0 of 2 PPO experts on CartPole-v1 reached a return of 499" in message
    assert "--bc.expert-steps" in message
    returns = message.partition("(returns: ")[2].partition(")")[0].split(", ")
    values = [float(value) for value in returns]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("algo", ["ppo", "bc"])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_a_tickets_training_depends_on_nothing_beside_it(algo, density, experts):
    def train(tickets, chosen):
        key = keys("train", 7)[chosen]
        if algo == "ppo":
            return ppo.train(SHORT, CARTPOLE, tickets, key, evaluation=FEW)
        _, _, dataset = experts
        assignment = torch.tensor([index % 2 for index in range(7)])[chosen]
        return bc.train(SHORT, CARTPOLE, tickets, key, dataset, assignment, evaluation=FEW)

    everyone = population(CARTPOLE, 7, critic=algo == "ppo", density=density)
    together = train(rows(everyone, list(range(7))), list(range(7)))
    assert not torch.equal(together.final, together.initial)
    for chosen in ([4], [6, 1, 3]):
        apart = train(rows(everyone, chosen), chosen)
        for name in ("final", "best", "curve", "curve_sampled", "return_final", "return_best"):
            assert torch.equal(getattr(apart, name), getattr(together, name)[chosen]), name
        assert torch.equal(apart.return_final_sampled, together.return_final_sampled[chosen])


def test_keys_alone_decide_and_pruned_weights_stay_zero():
    def train(name):
        tickets = population(CARTPOLE, 2, density=0.3)
        return tickets, ppo.train(SHORT, CARTPOLE, tickets, keys(name, 2), evaluation=FEW)

    (tickets, one), (_, two), (_, other) = train("a"), train("a"), train("b")
    assert torch.equal(one.final, two.final)
    assert torch.equal(one.curve_sampled, two.curve_sampled)
    assert not torch.equal(one.final, other.final)
    parameters = tickets.parameters
    for tensor in (parameters.weight, parameters.m, parameters.v, one.best):
        assert not tensor[:, : tickets.arena.prunable][~parameters.mask].any()


def test_a_clone_resumed_from_its_rewind_point_is_the_uninterrupted_one(experts):
    _, _, dataset = experts
    assignment, key = torch.tensor([0, 1]), keys("train", 2)
    tickets = population(CARTPOLE, 2, critic=False)
    arguments = (key, dataset, assignment)
    whole = bc.train(SHORT, CARTPOLE, tickets, *arguments, evaluation=FEW, rewind_iteration=2)
    assert (whole.rewind.step == 2 * SHORT.epochs * SHORT.minibatches).all()
    resumed = Population(tickets.arena, whole.rewind)
    rest = bc.train(SHORT, CARTPOLE, resumed, *arguments, evaluation=FEW, first_iteration=2)
    assert torch.equal(rest.final, whole.final)
    assert rest.train_steps == 2 * SHORT.batch
    assert whole.train_steps == 4 * SHORT.batch


def test_ppo_snapshots_the_rewind_point_and_goes_on():
    tickets, key = population(CARTPOLE, 2), keys("train", 2)
    plain = ppo.train(SHORT, CARTPOLE, rows(tickets, [0, 1]), key, evaluation=FEW)
    result = ppo.train(SHORT, CARTPOLE, tickets, key, evaluation=FEW, rewind_iteration=1)
    assert torch.equal(plain.final, result.final)
    assert plain.rewind is None
    assert (result.rewind.step == SHORT.epochs * SHORT.minibatches).all()
    assert not torch.equal(result.rewind.weight, result.initial)
    assert not torch.equal(result.rewind.weight, result.final)
    rest = ppo.train(
        SHORT, CARTPOLE, Population(tickets.arena, result.rewind), key, evaluation=FEW,
        first_iteration=1,
    )  # fmt: skip
    assert rest.train_steps == 3 * SHORT.batch


def test_results_have_the_protocols_shapes_and_count_their_steps():
    seen = []
    tickets = population(CARTPOLE, 3)
    evaluation = Evaluation(points=3, episodes=4, final_episodes=5)
    result = ppo.train(
        SHORT, CARTPOLE, tickets, keys("train", 3), evaluation=evaluation, on_iteration=seen.append
    )
    assert result.curve.shape == result.curve_sampled.shape == (3, 3)
    assert result.return_final.shape == result.return_best.shape == (3,)
    assert seen == [3 * SHORT.batch] * 4
    assert result.train_steps == SHORT.steps
    assert 0 < result.train_s < result.wall_s
    assert torch.equal(result.final, tickets.parameters.weight)


class GivenReturns:
    """An `Evaluator` whose returns are given, in order, instead of measured."""

    def __init__(self, monkeypatch, returns, points, first, iterations):
        self.asked = []
        tickets = population(CARTPOLE, 1)
        evaluation = Evaluation(points, 2, 3)
        evaluator = Evaluator(evaluation, CARTPOLE, tickets, keys("e", 1), first, iterations)
        answers = iter(returns)

        def measure(parameters, env, rows, index, *, greedy):
            self.asked.append((index, env.copies, greedy, float(parameters.weight[0, 0])))
            return torch.tensor([next(answers) if greedy and index < points else 0.0])

        monkeypatch.setattr(evaluator, "_returns", measure)
        self.due = []
        for iteration in range(first, iterations):
            tickets.parameters.weight.fill_(iteration)
            before = len(self.asked)
            evaluator.before(iteration)
            evaluator.after(iteration)
            self.due += [iteration] if len(self.asked) > before else []
        self.result = evaluator.result(0)


def test_evaluations_are_equally_spaced_and_the_last_follows_the_last_update(monkeypatch):
    assert GivenReturns(monkeypatch, range(5), 5, 0, 20).due == [3, 7, 11, 15, 19]
    assert GivenReturns(monkeypatch, range(4), 4, 10, 20).due == [12, 14, 17, 19]
    # Fewer iterations than points: one evaluation each.
    assert GivenReturns(monkeypatch, range(20), 20, 2, 5).due == [2, 3, 4]


def test_the_best_checkpoint_is_chosen_on_the_curve_and_rescored_on_other_episodes(monkeypatch):
    curve = GivenReturns(monkeypatch, [1.0, 9.0, 9.0, 4.0], 4, 0, 4)
    # Of equals the first; the final weights whatever the curve says.
    assert (curve.result.best == 1).all()
    assert (curve.result.final == 3).all()
    assert curve.result.curve.tolist() == [[1, 9, 9, 4]]
    assert curve.asked[:2] == [(0, 2, True, 0.0), (0, 2, False, 0.0)]
    assert curve.asked[-3:] == [
        (FINAL_INDEX, 3, True, 3.0),
        (FINAL_INDEX, 3, False, 3.0),
        (BEST_INDEX, 3, True, 1.0),
    ]


def test_final_returns_are_those_of_fresh_episodes_of_the_final_weights():
    tickets, key = population(CARTPOLE, 2), keys("train", 2)
    result = ppo.train(SHORT, CARTPOLE, tickets, key, evaluation=FEW)
    env = make_env(CARTPOLE, 2, FEW.final_episodes)
    for index, weight, expected in (
        (FINAL_INDEX, result.final, result.return_final),
        (BEST_INDEX, result.best, result.return_best),
    ):
        parameters = tickets.with_weight(weight)
        again = evaluate(parameters, tickets.arena, env, key, index=index, greedy=True)
        assert torch.equal(again.double().mean(1), expected)


@pytest.mark.parametrize("algo", ["ppo", "bc"])
def test_continuous_actions(algo):
    arena = policy_arena(env_spec("Pendulum-v1"), (16, 16))
    settings = replace(SHORT, gamma=0.9)
    key = keys("train", 2)
    tickets = population("Pendulum-v1", 2, critic=algo == "ppo", density=0.5)
    if algo == "ppo":
        result = ppo.train(settings, "Pendulum-v1", tickets, key, evaluation=FEW)
    else:
        expert = teaching.Experts(initialise(arena, key, log_std=-1.0), torch.zeros(2), key)
        dataset = teaching.demonstrations(expert, "Pendulum-v1", arena, 512)
        assert dataset.target.shape == (2, 512, 2)
        assert (dataset.target[..., 1] == -1).all()
        result = bc.train(
            settings, "Pendulum-v1", tickets, key, dataset, torch.tensor([0, 1]), evaluation=FEW
        )
        # KL(expert || student) narrows the student from 0 towards its expert's log_std of -1.
        begin = tickets.arena.log_std
        assert (result.final[:, begin] < -0.01).all()
    assert result.final.isfinite().all()
    assert not torch.equal(result.final, result.initial)
    assert ((result.return_final <= 0) & (result.return_final > -2000)).all()
    assert not result.final[:, : tickets.arena.prunable][~tickets.parameters.mask].any()


class Target(gymnasium.Env):
    """Stay near zero for twenty steps; observed is where one is."""

    observation_space = gymnasium.spaces.Box(-20, 20, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1), 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.place, self.time = self.place + (0.5 if action else -0.5), self.time + 1
        reward = float(abs(self.place) < 1)
        return np.array([self.place], np.float32), reward, False, self.time == 20, {}


@pytest.fixture
def target_env():
    register_env("Target", partial(GymEnv, Target), gym_spec(Target, "Target"))
    yield "Target"
    del _registry["Target"]


@pytest.mark.long
def test_ppo_learns_an_environment_of_gymnasium(target_env):
    settings = PPO(steps=24 * 128, copies=4, horizon=32, learning_rate=1e-2)
    tickets = population(target_env, 2, hidden=(8,))
    evaluation = Evaluation(points=2, episodes=3, final_episodes=5)
    result = ppo.train(settings, target_env, tickets, keys("train", 2), evaluation=evaluation)
    assert (result.return_final >= 17).all()
    assert (result.curve[:, 0] <= 20).all()


def test_bad_arguments_are_named(experts):
    tickets = population(CARTPOLE, 2)
    with pytest.raises(ValueError, match=r"key must have shape \(2,\), got \(3,\)"):
        ppo.train(SHORT, CARTPOLE, tickets, keys("train", 3), evaluation=FEW)
    students = population(CARTPOLE, 2, critic=False)
    _, _, dataset = experts
    with pytest.raises(ValueError, match=r"key must have shape \(2,\)"):
        bc.train(SHORT, CARTPOLE, students, keys("t", 1), dataset, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="dataset must be in"):
        bc.train(SHORT, CARTPOLE, students, keys("t", 2), dataset, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="env must be one of"):
        ppo.train(SHORT, "CartPool", tickets, keys("train", 2), evaluation=FEW)
