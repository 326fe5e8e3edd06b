"""DQN's trainer: what the buffer holds, the schedules, and that nothing crosses tickets."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos.buffer import ReplayBuffer
from sparse_tickets.algos.dqn import DQN, Iteration, explore, train
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.envs import Step, env_spec, make_env
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.prune import prune
from sparse_tickets.population import Population, initialise, policy_arena

CARTPOLE = "CartPole-v1"
FEW = Evaluation(points=2, episodes=2, final_episodes=3)
SHORT = DQN(steps=600, copies=2, horizon=16, updates=3, minibatch=8, warmup=100, capacity=200)
GAMMA = 0.5


def population(tickets, density=0.5):
    arena = policy_arena(env_spec(CARTPOLE), (16,), critic=False, activation="relu")
    key = torch.arange(tickets) + 5
    mask = torch.ones(tickets, arena.prunable, dtype=torch.bool)
    weight = initialise(arena, key)
    kept = torch.full((tickets,), int(density * arena.prunable))
    mask = prune(weight[:, : arena.prunable], mask, kept, criterion="magnitude")
    return Population.create(arena, weight, mask, density), key * 7919


@pytest.mark.parametrize("n_step", [1, 3])
def test_the_buffer_holds_discounted_sums_that_end_with_their_episodes(n_step):
    """Against each copy's own story, read step by step."""
    generator = torch.Generator().manual_seed(0)
    tickets, copies, steps = 2, 3, 40
    buffer = ReplayBuffer(
        tickets, copies, 1, 1_000, n_step=n_step, gamma=GAMMA, device=torch.device("cpu")
    )
    shape = (steps, tickets, copies)
    reward = torch.rand(shape, generator=generator, dtype=torch.float64)
    draw = torch.rand(shape, generator=generator)
    terminated, truncated = draw < 0.2, draw > 0.8
    # Step t sees t and leads to t + 0.5, whatever begins after it.
    for t in range(steps):
        obs = torch.full((tickets, copies, 1), float(t))
        action = torch.full((tickets, copies), t)
        buffer.add(obs, action, Step(obs + 1, reward[t], terminated[t], truncated[t], obs + 0.5))
    assert buffer.stored == buffer.added == copies * (steps - n_step + 1)
    found = [field[:, : buffer.stored].unflatten(1, (-1, copies)) for field in buffer.transitions]
    obs, action, total, discount, next_obs = found
    for t in range(steps - n_step + 1):
        assert (obs[:, t] == t).all()
        assert (action[:, t] == t).all()
        for ticket in range(tickets):
            for copy in range(copies):
                here, wanted = (ticket, copy), 0.0
                for ahead in range(n_step):
                    wanted += GAMMA**ahead * float(reward[t + ahead][here])
                    if terminated[t + ahead][here] or truncated[t + ahead][here]:
                        break
                bootstraps = 0.0 if terminated[t + ahead][here] else GAMMA ** (ahead + 1)
                assert total[ticket, t, copy].item() == pytest.approx(wanted, rel=1e-6)
                assert discount[ticket, t, copy].item() == pytest.approx(bootstraps, rel=1e-6)
                assert next_obs[ticket, t, copy].item() == t + ahead + 0.5


def test_the_buffer_forgets_the_oldest_and_has_the_size_it_states():
    buffer = ReplayBuffer(2, 4, 3, 18, n_step=1, gamma=GAMMA, device=torch.device("cpu"))
    for t in range(6):
        obs, zero = torch.full((2, 4, 3), float(t)), torch.zeros(2, 4)
        never = torch.zeros(2, 4, dtype=torch.bool)
        buffer.add(obs, zero.long(), Step(obs, zero, never, never, obs))
    assert (buffer.stored, buffer.added) == (16, 24)
    assert buffer.transitions.obs[0, ::4, 0].tolist() == [4, 5, 2, 3]
    assert sum(field.nbytes for field in buffer.transitions) == 2 * 16 * (8 * 3 + 16)
    with pytest.raises(ValueError, match="capacity must be at least copies = 4, got 3"):
        ReplayBuffer(2, 4, 3, 3, n_step=1, gamma=GAMMA, device=torch.device("cpu"))


def test_epsilon_falls_linearly_after_the_warmup():
    settings = DQN(steps=1_000, copies=2, horizon=5, warmup=100, exploration=0.5, epsilon=0.1)
    epsilon = [settings.epsilon_at(iteration) for iteration in range(settings.iterations)]
    assert epsilon[:10] == [1.0] * 10
    assert epsilon[10] == pytest.approx(1 - 0.9 * 0.2)
    assert epsilon[50:] == pytest.approx([0.1] * 50)
    assert sorted(epsilon, reverse=True) == epsilon


def test_each_ticket_explores_with_its_own_probability():
    tickets, key = population(3)
    obs = torch.randn(3, 4_000, 4, generator=torch.Generator().manual_seed(1))
    greedy = tickets.actor(obs).argmax(-1)
    action = explore(tickets, obs, torch.tensor([0.0, 0.5, 1.0]), key, 3)
    differs = (action != greedy).float().mean(1)
    assert differs[0] == 0
    # Half of the random actions are greedy by chance; the standard deviation is below 0.008.
    assert differs[1] == pytest.approx(0.25, abs=0.03)
    assert differs[2] == pytest.approx(0.5, abs=0.03)
    assert action[2].float().mean() == pytest.approx(0.5, abs=0.03)
    alone = Population.create(tickets.arena, tickets.parameters.weight[1:2], None, 0.5)
    assert torch.equal(explore(alone, obs[1:2], torch.tensor([0.5]), key[1:2], 3)[0], action[1])
    assert not torch.equal(explore(tickets, obs, torch.tensor([0.0, 0.5, 1.0]), key, 4), action)


@pytest.mark.parametrize("settings", [SHORT, replace(SHORT, double=True, n_step=3)])
def test_a_ticket_does_not_see_its_batch(settings):
    together, key = population(3)
    results = train(settings, CARTPOLE, together, key, evaluation=FEW)
    assert not torch.equal(results.final, results.initial)
    alone, _ = population(3)
    alone = Population.create(
        alone.arena, alone.parameters.weight[1:2], alone.parameters.mask[1:2], 0.5
    )
    result = train(settings, CARTPOLE, alone, key[1:2], evaluation=FEW)
    assert torch.equal(result.final[0], results.final[1])
    assert torch.equal(result.curve[0], results.curve[1])
    pruned = ~together.parameters.mask
    for row in (together.parameters.weight, together.parameters.m, together.parameters.v):
        assert (row[:, : together.arena.prunable][pruned] == 0).all()


@pytest.mark.long
def test_the_fused_updates_train_as_plain_torch_does():
    """A few updates: longer, rounding would choose other actions."""
    settings = replace(SHORT, steps=160, warmup=64, updates=2)
    ours, key = population(2)
    theirs, _ = population(2)
    result = train(settings, CARTPOLE, ours, key, evaluation=FEW)
    with use_backend("reference"):
        expected = train(settings, CARTPOLE, theirs, key, evaluation=FEW)
    assert ours.parameters.step.tolist() == [8, 8]
    torch.testing.assert_close(result.final, expected.final, rtol=1e-4, atol=1e-5)


def test_the_target_follows_by_steps_and_updates_wait_for_the_warmup():
    settings = replace(SHORT, target_interval=64)
    tickets, key = population(1)
    iterate = Iteration(settings, make_env(CARTPOLE, 1, settings.copies), tickets, key, 0)
    iterate.learning_rate.fill_(1e-3)
    initial, targets = tickets.parameters.weight.clone(), []
    for _ in range(6):
        before = tickets.parameters.weight.clone()
        iterate()
        targets.append(torch.equal(iterate._target, before))
    # Steps 32, 64, ...: every second iteration; the first updates follow step 128.
    assert tickets.parameters.step.item() == 3 * settings.updates
    assert targets == [True, True, True, True, False, True]
    assert not torch.equal(tickets.parameters.weight, initial)


def test_rewound_tickets_start_later_in_the_schedule():
    tickets, key = population(2)
    result = train(SHORT, CARTPOLE, tickets, key, evaluation=FEW, rewind_iteration=5)
    assert result.rewind is not None
    assert result.rewind.step.tolist() == [6, 6]
    assert result.train_steps == 18 * 32
    late, _ = population(2)
    seen = []
    again = train(
        SHORT, CARTPOLE, late, key, evaluation=FEW, first_iteration=5, on_iteration=seen.append
    )
    assert seen == [64] * 13
    assert again.train_steps == 13 * 32
    # The buffer fills anew: 100 steps take four iterations, the last of which updates.
    assert late.parameters.step.tolist() == [3 * 10] * 2


def test_refuses_what_it_cannot_train():
    tickets, key = population(2)
    with pytest.raises(ValueError, match=r"key must have shape \(2,\), got \(1,\)"):
        train(SHORT, CARTPOLE, tickets, key[:1])
    swing = policy_arena(env_spec("Pendulum-v1"), (4,), critic=False)
    with pytest.raises(ValueError, match="discrete actions, got continuous ones: train by ppo"):
        train(SHORT, "Pendulum-v1", Population.create(swing, initialise(swing, key)), key)
    arena = policy_arena(env_spec(CARTPOLE), (4,))
    with pytest.raises(ValueError, match="build its arena with critic=False"):
        train(SHORT, CARTPOLE, Population.create(arena, initialise(arena, key)), key)
    for name, value, said in (
        ("steps", 10, r"dqn.steps must be at least copies \* horizon = 32, got 10"),
        ("capacity", 1, "dqn.capacity must be at least copies = 2, got 1"),
        ("n_step", 0, "dqn.n_step must be at least 1, got 0"),
        ("epsilon", 1.5, r"dqn.epsilon must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(SHORT, **{name: value})
