"""SAC's trainer: what it stores, when it explores and learns, and that nothing crosses tickets."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparse_tickets.algos import sac
from sparse_tickets.algos.buffer import ReplayBuffer
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.sac import SAC, Iteration, act, explore, train
from sparse_tickets.dynamic import METHODS, Pruning
from sparse_tickets.envs import Step, env_spec, make_env
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.random import Stream, integers, normal
from sparse_tickets.kernels.rollout import demonstrate, rollout
from sparse_tickets.kernels.sac.reference import loss
from sparse_tickets.kernels.squashed import within_bounds
from sparse_tickets.kernels.training.reference import gradient
from sparse_tickets.linear import count_kept
from sparse_tickets.population import Population, initialise, policy_arena

PENDULUM = "Pendulum-v1"
FEW = Evaluation(points=2, episodes=2, final_episodes=3)
SHORT = SAC(steps=240, copies=2, horizon=8, updates=3, minibatch=13, warmup=40, capacity=100)


def population(tickets, density=0.5, **layout):
    arena = policy_arena(env_spec(PENDULUM), (16,), activation="relu", squashed=True, **layout)
    key = torch.arange(tickets) + 5
    mask = torch.ones(tickets, arena.prunable, dtype=torch.bool)
    weight = initialise(arena, key)
    kept = torch.full((tickets,), int(density * arena.prunable))
    mask = prune(weight[:, : arena.prunable], mask, kept, criterion="magnitude")
    return Population.create(arena, weight, mask, density), key * 7919


def test_the_buffer_holds_numbers_in_the_size_it_states():
    device = torch.device("cpu")
    buffer = ReplayBuffer(2, 4, 3, 18, n_step=1, gamma=0.9, device=device, numbers=5)
    action, zero = torch.rand(2, 4, 5), torch.zeros(2, 4)
    obs, never = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool)
    buffer.add(obs, action, Step(obs, zero, never, never, obs))
    assert torch.equal(buffer.transitions.action[:, :4], action)
    assert sum(field.nbytes for field in buffer.transitions) == 2 * 16 * (8 * 3 + 4 * 5 + 8)


def test_actions_are_each_tickets_own_and_stay_in_bounds():
    tickets, key = population(3)
    obs = 5 * torch.randn(3, 400, 3, generator=torch.Generator().manual_seed(1))
    action, random = act(tickets, obs, key, 3), explore(key, 400, 1, 3)
    assert action.shape == random.shape == (3, 400, 1)
    assert max(action.abs().max(), random.abs().max()) <= 1
    # Of 1,200 numbers in [-1, 1): a mean of 0, a variance of 1/3.
    assert random.mean().item() == pytest.approx(0, abs=0.06)
    assert random.square().mean().item() == pytest.approx(1 / 3, abs=0.03)
    alone = Population.create(tickets.arena, tickets.parameters.weight[1:2], None, 0.5)
    assert torch.equal(act(alone, obs[1:2], key[1:2], 3)[0], action[1])
    assert not torch.equal(act(tickets, obs, key, 4), action)
    bounds = within_bounds(torch.tensor([-1.0, 0.0, 1.0])[:, None], (-2.0,), (6.0,))
    assert bounds.flatten().tolist() == [-2.0, 2.0, 6.0]


@pytest.mark.parametrize("layout", [{}, {"prune_critic": True}])
def test_a_ticket_does_not_see_its_batch(layout):
    together, key = population(3, **layout)
    results = train(SHORT, PENDULUM, together, key, evaluation=FEW)
    assert not torch.equal(results.final, results.initial)
    assert together.parameters.step.tolist() == [3 * 13] * 3
    alone, _ = population(3, **layout)
    alone = Population.create(
        alone.arena, alone.parameters.weight[1:2], alone.parameters.mask[1:2], 0.5
    )
    result = train(SHORT, PENDULUM, alone, key[1:2], evaluation=FEW)
    for name in ("final", "curve", "curve_sampled", "return_final"):
        assert torch.equal(getattr(result, name)[0], getattr(results, name)[1]), name
    pruned = ~together.parameters.mask
    for row in (together.parameters.weight, together.parameters.m, together.parameters.v):
        assert (row[:, : together.arena.prunable][pruned] == 0).all()


@pytest.mark.long
def test_the_kernels_train_and_judge_as_plain_torch_does():
    """A few updates: longer, rounding would choose other actions."""
    settings = replace(SHORT, steps=64, warmup=32, updates=2)
    ours, key = population(2)
    theirs, _ = population(2)
    result = train(settings, PENDULUM, ours, key, evaluation=FEW)
    with use_backend("reference"):
        expected = train(settings, PENDULUM, theirs, key, evaluation=FEW)
    assert ours.parameters.step.tolist() == [6, 6]
    torch.testing.assert_close(result.final, expected.final, rtol=1e-4, atol=1e-5)
    for name in ("curve", "curve_sampled", "return_final_sampled"):
        one, other = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0.1)


def test_rollouts_squash_and_demonstrations_are_gaussians_before_that():
    tickets, key = population(2)
    parameters, arena = tickets.parameters, tickets.arena

    def play(op):
        env = make_env(PENDULUM, 2, 3)
        return op(parameters, arena, env, env.reset(key), key, 6, stream=Stream.ACTION)

    seen, _ = play(rollout)
    assert seen.action.abs().max() <= 2
    assert (seen.value == 0).all()
    obs, target, _ = play(demonstrate)
    mean, log_std = tickets.actor(obs.flatten(1, 2)).chunk(2, -1)
    expected = torch.cat([mean, log_std.clamp(-20, 2)], -1).view_as(target)
    torch.testing.assert_close(target, expected)
    # The density is that of actions in [-1, 1].
    assert torch.equal(obs, seen.obs)
    squashed = (seen.action / 2).double().flatten(1, 2)
    law = torch.distributions.Normal(mean.double(), log_std.double().exp())
    logp = law.log_prob(squashed.atanh()) - (1 - squashed**2).log()
    found = seen.logp.double().flatten(1, 2)[..., None]
    torch.testing.assert_close(found, logp, rtol=1e-3, atol=1e-3)
    with use_backend("reference"):
        plain, _ = play(rollout)
    torch.testing.assert_close(seen.action, plain.action, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.logp, plain.logp, rtol=1e-3, atol=1e-3)


def test_updates_wait_for_the_warmup_and_targets_follow_slowly():
    tickets, key = population(1)
    iterate = Iteration(SHORT, make_env(PENDULUM, 1, SHORT.copies), tickets, key, 0)
    iterate.learning_rate.fill_(1e-2)
    initial = tickets.parameters.weight.clone()
    iterate()
    iterate()
    assert torch.equal(tickets.parameters.weight, initial)
    iterate()
    assert tickets.parameters.step.item() == SHORT.updates
    moved = (tickets.parameters.weight - initial).norm()
    assert 0 < (iterate._target - initial).norm() < 0.02 * moved
    assert tickets.parameters.weight[0, tickets.arena.temperature] != 0


@pytest.mark.long
def test_pruning_while_training_keeps_exact_counts_and_masks_the_targets():
    method = replace(METHODS["rigl"], every=6)
    settings = replace(SHORT, n_step=2)

    def run(tickets, key, look=None):
        pruning = Pruning(method, 0.2)
        some = Population.create(tickets.arena, tickets.parameters.weight)
        result = train(
            settings,
            PENDULUM,
            some,
            key,
            evaluation=FEW,
            pruning=pruning,
            on_iteration=None if look is None else lambda _: look(some),
        )
        return some, result

    def look(some):
        kept = some.parameters.mask.sum(1)
        assert (kept == count_kept(some.density, some.arena.prunable)).all()
        masks.append(some.parameters.mask.clone())

    masks = []
    tickets, key = population(3, prune_critic=True)
    together, results = run(tickets, key, look)
    assert together.density == pytest.approx(0.2)
    # Gradient steps begin with the third iteration.
    assert settings.waiting == 2
    assert any(not torch.equal(one, other) for one, other in pairwise(masks))
    pruned = ~together.parameters.mask
    for row in (together.parameters.weight, together.parameters.m, together.parameters.v):
        assert (row[:, : together.arena.prunable][pruned] == 0).all()
    one = Population.create(tickets.arena, tickets.parameters.weight[1:2])
    alone, result = run(one, key[1:2])
    assert torch.equal(alone.parameters.mask[0], together.parameters.mask[1])
    assert torch.equal(result.final[0], results.final[1])
    never = replace(SHORT, warmup=100, steps=100)
    with pytest.raises(ValueError, match=r"after 96 steps: sac\.steps must be more, got 100"):
        train(never, PENDULUM, one, key[1:2], evaluation=FEW, pruning=Pruning(method, 0.2))


def test_the_gradient_by_pruned_weights_is_that_of_the_last_updates_transitions(monkeypatch):
    seen, update = [], sac.sac_update_

    def look(parameters, arena, target, *rest, **options):
        seen.append((target[:, : arena.prunable][~parameters.mask] == 0).all())
        return update(parameters, arena, target, *rest, **options)

    monkeypatch.setattr(sac, "sac_update_", look)
    tickets, key = population(2, prune_critic=True)
    iterate = Iteration(SHORT, make_env(PENDULUM, 2, SHORT.copies), tickets, key, 0)
    iterate._target.add_(1.0)
    iterate.follow_masks_()
    iterate.learning_rate.fill_(1e-3)
    for _ in range(4):
        iterate()
    assert len(seen) == 2
    assert all(seen)
    found, pruned = iterate.dense_gradient(), ~tickets.parameters.mask
    assert found[pruned].any()
    # On the mask it is the mean of what each update's own batch gives.
    weight, mask, arena = tickets.parameters.weight, tickets.parameters.mask, tickets.arena
    buffer, total = iterate.buffer, torch.zeros_like(found)
    for number in range(9, 12):
        index = integers(key, 13, buffer.stored, stream=Stream.MINIBATCH, step=number)
        batch = type(buffer.transitions)(
            *(field[torch.arange(2)[:, None], index] for field in buffer.transitions)
        )
        noise = normal(key, 26, stream=Stream.UPDATE_ACTION, step=number).view(2, 2, 13, 1)
        arguments = (arena, batch, noise, iterate._target, SHORT.config(1))
        total += gradient(weight, mask, loss, arguments)[0][:, : arena.prunable] / 3
    torch.testing.assert_close(found[~pruned], total[~pruned], rtol=1e-4, atol=1e-5)


def test_rewound_tickets_start_later_in_the_schedule():
    tickets, key = population(2)
    result = train(SHORT, PENDULUM, tickets, key, evaluation=FEW, rewind_iteration=5)
    assert result.rewind.step.tolist() == [9, 9]
    late, _ = population(2)
    again = train(SHORT, PENDULUM, late, key, evaluation=FEW, first_iteration=5)
    assert again.train_steps == 10 * 16
    # The buffer fills anew: 40 steps take three iterations, the last of which updates.
    assert late.parameters.step.tolist() == [3 * 8] * 2


def test_refuses_what_it_cannot_train():
    tickets, key = population(2)
    with pytest.raises(ValueError, match=r"key must have shape \(2,\), got \(1,\)"):
        train(SHORT, PENDULUM, tickets, key[:1])
    plain = policy_arena(env_spec(PENDULUM), (4,))
    with pytest.raises(ValueError, match="build its arena by policy_arena"):
        train(SHORT, PENDULUM, Population.create(plain, initialise(plain, key)), key)
    with pytest.raises(ValueError, match="as sac trains, needs continuous actions, CartPole-v1 ha"):
        policy_arena(env_spec("CartPole-v1"), squashed=True)
    endless = replace(env_spec(PENDULUM), action_high=(float("inf"),))
    with pytest.raises(ValueError, match="needs actions with bounds, Pendulum-v1 has"):
        policy_arena(endless, squashed=True)
    for name, value, said in (
        ("steps", 10, r"sac.steps must be at least copies \* horizon = 16, got 10"),
        ("capacity", 1, "sac.capacity must be at least copies = 2, got 1"),
        ("tau", 0, "sac.tau must be above 0, got 0"),
        ("tau", 2.0, "sac.tau must be at most 1, got 2"),
        ("gamma", 1.5, r"sac.gamma must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(SHORT, **{name: value})
