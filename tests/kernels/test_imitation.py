"""Behavioural cloning's fused updates against plain torch with autograd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain

from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_, plan, reference
from sparse_tickets.kernels.mlp import layout

LR = 1e-3
EPS = torch.finfo(torch.float32).eps


def problem(
    density,
    *,
    continuous=False,
    squashed=False,
    tickets=4,
    hidden=(40, 24),
    critic=(5, 8, 1),
    activation="tanh",
    architecture="mlp",
):
    generator = torch.Generator().manual_seed(tickets)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    arena = Arena.build(
        any_chain(architecture, 5, hidden, 6 if squashed else 3),
        critic,
        continuous=continuous,
        squashed=squashed,
        activation=activation,
        architecture=architecture,
    )
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    weight = 0.2 * normal(tickets, arena.size)
    m, v = 0.01 * normal(tickets, arena.size), 1e-3 * normal(tickets, arena.size) ** 2
    for row in (weight, m, v):
        row[:, : arena.prunable] *= mask
    parameters = Parameters(weight, mask, m, v, torch.arange(tickets))
    obs = normal(2, 300, 5)
    target = normal(2, 300, 3).log_softmax(-1)
    if continuous or squashed:
        target = torch.cat([normal(2, 300, 3), 0.3 * normal(2, 300, 3) - 0.5], -1)
    dataset = torch.arange(tickets) % 2
    key = torch.arange(tickets) * 7654321 - 9
    return arena, parameters, obs, target, dataset, key, torch.full((tickets,), LR)


def double(tensors):
    return type(tensors)(*(t.double() if t.is_floating_point() else t.clone() for t in tensors))


@pytest.fixture
def poisoned(monkeypatch):
    """Scratch starts as NaN and as absurd indices, as the last ticket may have left it."""
    allocate = layout.allocate

    def poison(*arguments):
        floats, integers = allocate(*arguments)
        floats.fill(np.nan)
        integers.fill(2**30)
        return floats, integers

    monkeypatch.setattr(layout, "allocate", poison)


def compare(density, config, **options):
    arena, parameters, obs, target, dataset, key, lr = problem(density, **options)
    before, expected = double(parameters), double(parameters)
    stats = clone_update_(
        parameters, arena, obs, target, dataset, key, 7, lr, config, density=density
    )
    with use_backend("reference"):
        expected_stats = clone_update_(
            expected, arena, obs.double(), target.double(), dataset, key, 7, lr.double(), config
        )
    error = 32 * EPS * config.updates
    close = torch.testing.assert_close
    close(parameters.weight.double(), expected.weight, rtol=0, atol=4 * EPS + LR * 1e3 * error)
    close(parameters.m.double(), expected.m, rtol=0, atol=error)
    close(parameters.v.double(), expected.v, rtol=0, atol=error)
    for found, wanted in zip(stats, expected_stats, strict=True):
        close(found.double(), wanted, rtol=2 * error, atol=2 * error)
    assert torch.equal(parameters.step, expected.step)
    for row in (parameters.weight, parameters.m, parameters.v):
        assert (row[:, : arena.prunable][~parameters.mask] == 0).all()
    if arena.critic is not None:
        for weight, old in ((parameters.weight, before.weight), (parameters.m, before.m)):
            for part, old_part in zip(
                arena.critic.layers(weight), arena.critic.layers(old), strict=True
            ):
                assert all(torch.equal(a.double(), b) for a, b in zip(part, old_part, strict=True))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("continuous", [False, True])
def test_updates_equal_float64(continuous, density, poisoned):
    compare(density, CloneConfig(updates=1, batch=133), continuous=continuous)
    compare(density, CloneConfig(updates=5, batch=32), continuous=continuous)


@pytest.mark.long
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_squashed_students_equal_float64(density, poisoned):
    for critic in (None, (8, 8, 1)):
        options = {"squashed": True, "critic": critic}
        compare(density, CloneConfig(updates=1, batch=133), **options)
        compare(density, CloneConfig(updates=5, batch=32), **options)


def test_a_squashed_students_log_std_has_its_range(poisoned):
    """Beyond it nothing moves the outputs, within it both halves of the gradient do."""
    arena, parameters, *rest = problem(1.0, squashed=True, critic=None, hidden=())
    arena.actor.bias(parameters.weight, 0)[:, 3:] = torch.tensor([-30.0, 0.0, 3.0])
    parameters.weight[:, : arena.prunable] *= 0.1
    before = parameters.weight.clone()
    parameters.m.zero_()
    config = CloneConfig(updates=1, batch=64, max_norm=None)
    clone_update_(parameters, arena, *rest[:4], 0, rest[4], config)
    moved = arena.actor.bias(parameters.weight, 0) != arena.actor.bias(before, 0)
    assert moved.tolist() == [[True, True, True, False, True, False]] * 4


def test_without_a_critic_and_with_relu(poisoned):
    compare(0.3, CloneConfig(updates=2, batch=17, max_norm=None), critic=None, activation="relu")


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 50), max_size=3),
    tickets=st.integers(0, 3),
    batch=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    continuous=st.booleans(),
    **KINDS,
)
def test_any_network_and_batch(batch, density, **shape):
    compare(density, CloneConfig(updates=1, batch=batch), critic=None, **shape)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_ticket_does_not_see_its_batch_and_calls_may_be_cut(density):
    arena, parameters, obs, target, dataset, key, lr = problem(density, tickets=7)

    def run(tickets, calls):
        mine = Parameters(*(t[tickets].clone() for t in parameters))
        for first, updates in calls:
            clone_update_(
                mine,
                arena,
                obs,
                target,
                dataset[tickets],
                key[tickets],
                first,
                lr[tickets],
                CloneConfig(updates, 64),
                density=density,
            )
        return mine

    together = run(slice(None), [(0, 6)])
    for one, other in zip(run(slice(None), [(0, 2), (2, 4)]), together, strict=True):
        assert torch.equal(one, other)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for ticket in (0, 6):
            for one, other in zip(run(slice(ticket, ticket + 1), [(0, 6)]), together, strict=True):
                assert torch.equal(one[0], other[ticket])
    finally:
        torch.set_num_threads(threads)
    assert run(slice(0, 0), [(0, 1)]).weight.shape == (0, arena.size)


def test_loss_is_the_divergence_of_torch():
    for continuous in (False, True):
        arena, parameters, obs, target, dataset, *_ = problem(1.0, continuous=continuous)
        x, y = obs[dataset], target[dataset]
        actual = reference.loss(parameters.weight, parameters.mask, arena, x, y)
        output = reference.mlp(x, parameters.weight, arena.actor, None)
        if continuous:
            log_std = parameters.weight[:, arena.log_std : arena.log_std + 3]
            student = torch.distributions.Normal(output, log_std.exp()[:, None].expand_as(output))
            expert = torch.distributions.Normal(y[..., :3], y[..., 3:].exp())
            expected = torch.distributions.kl_divergence(expert, student).sum(-1).mean(1)
        else:
            expected = torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=y),
                torch.distributions.Categorical(logits=output),
            ).mean(1)
        torch.testing.assert_close(actual, expected)


def test_an_action_the_expert_never_takes():
    arena, parameters, obs, target, dataset, key, lr = problem(1.0)
    target = target.index_fill(2, torch.tensor([1]), -torch.inf).log_softmax(-1)
    expected = double(parameters)
    config = CloneConfig(updates=1, batch=64)
    loss = clone_update_(parameters, arena, obs, target, dataset, key, 0, lr, config)
    with use_backend("reference"):
        expected_loss = clone_update_(
            expected, arena, obs.double(), target.double(), dataset, key, 0, lr.double(), config
        )
    torch.testing.assert_close(loss.loss.double(), expected_loss.loss, rtol=64 * EPS, atol=64 * EPS)


def test_refuses_what_it_cannot_do():
    arena, parameters, obs, target, dataset, key, lr = problem(1.0)
    config = CloneConfig(updates=1, batch=4)
    with pytest.raises(ValueError, match="target must have shape"):
        clone_update_(parameters, arena, obs, target[..., :2], dataset, key, 0, lr, config)
    with pytest.raises(ValueError, match=r"dataset must be in \[0, 2\), got 1..2"):
        clone_update_(parameters, arena, obs, target, dataset + 1, key, 0, lr, config)
    with pytest.raises(ValueError, match="between 1 and"):
        clone_update_(parameters, arena, obs[:, :0], target[:, :0], dataset, key, 0, lr, config)
    with pytest.raises(TypeError, match="obs must be float32"):
        clone_update_(parameters, arena, obs.double(), target, dataset, key, 0, lr, config)
    with pytest.raises(ValueError, match="first_update"):
        clone_update_(parameters, arena, obs, target, dataset, key, -1, lr, config)
    for name in ("updates", "batch"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1"):
            CloneConfig(**{"updates": 1, "batch": 1, name: 0})


def test_plan_is_honest():
    arena = problem(1.0)[0]
    assert plan(arena, torch.device("cpu"), density=0.1).backend == "cpu"
    with use_backend("reference"):
        assert plan(arena, torch.device("cpu")).backend == "reference"
