"""DQN's fused updates against plain torch with autograd in float64, and torch's own modules."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain

from sparse_tickets.kernels import transitions
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dqn import DQNConfig, dqn_update_, plan
from sparse_tickets.kernels.dqn.reference import LOSSES
from sparse_tickets.kernels.mlp import layout
from sparse_tickets.kernels.random import Stream, integers
from sparse_tickets.kernels.transitions import Transitions

LR = 1e-3
EPS = torch.finfo(torch.float32).eps
LOSSES_AND_DOUBLE = pytest.mark.parametrize(
    ("double_dqn", "loss"), [(False, "huber"), (True, "huber"), (False, "squared")]
)
CAPACITY, STORED = 300, 257


def problem(
    density, *, tickets=4, hidden=(40, 24), activation="relu", architecture="mlp", actions=3
):
    generator = torch.Generator().manual_seed(tickets)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sizes = any_chain(architecture, 5, hidden, actions)
    arena = Arena.build(sizes, activation=activation, architecture=architecture)
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    weight, target = 0.2 * normal(tickets, arena.size), 0.2 * normal(tickets, arena.size)
    m, v = 0.01 * normal(tickets, arena.size), 1e-3 * normal(tickets, arena.size) ** 2 + 1e-6
    for row in (weight, target, m, v):
        row[:, : arena.prunable] *= mask
    parameters = Parameters(weight, mask, m, v, torch.arange(tickets))
    shape = (tickets, CAPACITY)
    ended = torch.rand(shape, generator=generator) < 0.1
    # Errors on both sides of Huber's threshold.
    replay = Transitions(
        normal(*shape, 5),
        torch.randint(0, actions, shape, generator=generator),
        2 * normal(*shape),
        torch.where(ended, 0.0, 0.9),
        # What a terminated episode ended with is nobody's business.
        normal(*shape, 5).where(~ended[..., None], torch.nan),
    )
    # Nor is what was never stored.
    for field in replay:
        field[:, STORED:] = torch.nan if field.is_floating_point() else 10**9
    key = torch.arange(tickets) * 7654321 - 9
    return arena, parameters, target, replay, key, torch.full((tickets,), LR)


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


def compare(density, config, backend="cpu", **options):
    arena, parameters, target, replay, key, lr = problem(density, **options)
    expected = double(parameters)
    with use_backend(backend):
        stats = dqn_update_(
            parameters, arena, target, replay, STORED, key, 5, lr, config, density=density
        )
    with use_backend("reference"):
        expected_stats = dqn_update_(
            expected, arena, target.double(), double(replay), STORED, key, 5, lr.double(), config
        )
    steps = config.updates
    error = 64 * EPS * steps
    torch.testing.assert_close(parameters.m.double(), expected.m, rtol=error, atol=error)
    torch.testing.assert_close(parameters.v.double(), expected.v, rtol=2 * error, atol=error)
    # A step moves a weight by the learning rate times a ratio of moments of at most some 30.
    torch.testing.assert_close(
        parameters.weight.double(), expected.weight, rtol=EPS, atol=1e3 * LR * error
    )
    for one, other in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4 * error, atol=4 * error)
    assert torch.equal(parameters.step, expected.step)
    for row in (parameters.weight, parameters.m, parameters.v):
        assert (row[:, : arena.prunable][~parameters.mask] == 0).all()


@LOSSES_AND_DOUBLE
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
def test_updates_equal_float64(density, double_dqn, loss, poisoned):
    compare(density, DQNConfig(updates=1, batch=133, double=double_dqn, loss=loss))
    compare(density, DQNConfig(updates=5, batch=32, double=double_dqn, loss=loss))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 50), max_size=3),
    tickets=st.integers(0, 3),
    batch=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    double_dqn=st.booleans(),
    actions=st.integers(1, 9),
    loss=st.sampled_from(list(LOSSES)),
    **KINDS,
)
def test_any_network_and_batch(batch, density, double_dqn, loss, **shape):
    config = DQNConfig(updates=1, batch=batch, double=double_dqn, loss=loss, max_norm=None)
    compare(density, config, **shape)


@pytest.mark.parametrize("double_dqn", [False, True])
def test_a_ticket_does_not_see_its_batch_and_calls_may_be_cut(double_dqn, monkeypatch):
    arena, parameters, target, replay, key, lr = problem(0.3, tickets=7)

    def run(tickets, calls):
        mine = Parameters(*(t[tickets].clone() for t in parameters))
        data = target[tickets], Transitions(*(field[tickets] for field in replay)), STORED
        for first, updates in calls:
            config = DQNConfig(updates, 64, double=double_dqn)
            dqn_update_(mine, arena, *data, key[tickets], first, lr[tickets], config, density=0.3)
        return mine

    together = run(slice(None), [(0, 6)])
    for one, other in zip(run(slice(None), [(0, 2), (2, 4)]), together, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(transitions, "MOST_SAMPLES", 128)
    for ticket in (0, 6):
        for one, other in zip(run(slice(ticket, ticket + 1), [(0, 6)]), together, strict=True):
            assert torch.equal(one[0], other[ticket])
    assert run(slice(0, 0), [(0, 1)]).weight.shape == (0, arena.size)


@LOSSES_AND_DOUBLE
def test_one_update_is_what_torch_alone_makes_of_it(double_dqn, loss):
    """A ticket as modules of torch, with its loss, its clipping and its Adam."""
    arena, parameters, target, replay, key, lr = problem(1.0, tickets=1, hidden=(16,))

    def module(rows):
        net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        layers = (part for layer in arena.actor.layers(rows) for part in layer)
        for parameter, part in zip(net.parameters(), layers, strict=True):
            parameter.data.copy_(part[0])
        return net

    parameters = parameters._replace(
        m=torch.zeros_like(parameters.m),
        v=torch.zeros_like(parameters.v),
        step=torch.zeros_like(parameters.step),
    )
    online, slow = module(parameters.weight), module(target)
    optimiser = torch.optim.Adam(online.parameters(), LR, eps=1e-8)
    stepped = copy.deepcopy(parameters)
    config = DQNConfig(updates=2, batch=50, double=double_dqn, loss=loss, max_norm=0.5)
    of_torch = {
        "huber": torch.nn.functional.smooth_l1_loss,
        "squared": torch.nn.functional.mse_loss,
    }
    dqn_update_(stepped, arena, target, replay, STORED, key, 3, lr, config)
    for step in (3, 4):
        index = integers(key, 50, STORED, stream=Stream.MINIBATCH, step=step)[0]
        obs, action, reward, discount, next_obs = (field[0, index] for field in replay)
        with torch.no_grad():
            choice = (online if double_dqn else slow)(next_obs).argmax(1, keepdim=True)
            following = slow(next_obs).gather(1, choice).squeeze(1)
            wanted = torch.where(discount == 0, reward, reward + discount * following)
        value = online(obs).gather(1, action[:, None]).squeeze(1)
        optimiser.zero_grad()
        of_torch[loss](value, wanted).backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 0.5)
        optimiser.step()
    layers = [part for layer in arena.actor.layers(stepped.weight) for part in layer]
    for parameter, part in zip(online.parameters(), layers, strict=True):
        torch.testing.assert_close(parameter.data, part[0], rtol=1e-4, atol=1e-5)


def test_a_diverged_ticket_is_nan_and_spares_the_others():
    arena, parameters, target, replay, key, lr = problem(0.5)
    alone = copy.deepcopy(parameters)
    config = DQNConfig(updates=2, batch=16)
    dqn_update_(alone, arena, target, replay, STORED, key, 0, lr, config, density=0.5)
    parameters.weight[1, arena.prunable :] = torch.nan
    dqn_update_(parameters, arena, target, replay, STORED, key, 0, lr, config, density=0.5)
    assert parameters.weight[1].isnan().any()
    others = [0, 2, 3]
    assert torch.equal(parameters.weight[others], alone.weight[others])


def test_refuses_what_it_cannot_do():
    arena, parameters, target, replay, key, lr = problem(1.0)
    config = DQNConfig(updates=1, batch=4)

    def call(arena=arena, target=target, replay=replay, stored=STORED, first_update=0):
        dqn_update_(parameters, arena, target, replay, stored, key, first_update, lr, config)

    with pytest.raises(
        ValueError, match=r"stored must be in \[1, 300\], the length of reward, got 301"
    ):
        call(stored=CAPACITY + 1)
    with pytest.raises(ValueError, match=r"stored must be in \[1, 300\]"):
        call(stored=0)
    with pytest.raises(ValueError, match="next_obs must have shape"):
        call(replay=replay._replace(next_obs=replay.next_obs[..., :4]))
    with pytest.raises(TypeError, match="action must be int64"):
        call(replay=replay._replace(action=replay.action.float()))
    with pytest.raises(ValueError, match=r"action must be in \[0, 3\), got "):
        call(replay=replay._replace(action=replay.action + 1))
    with pytest.raises(TypeError, match="obs must be float32"):
        call(replay=replay._replace(obs=replay.obs.double()))
    with pytest.raises(ValueError, match="target must not share memory with weight"):
        call(target=parameters.weight)
    with pytest.raises(ValueError, match="first_update"):
        call(first_update=-1)
    critic = Arena.build((5, 40, 24, 3), (5, 4, 1))
    with pytest.raises(ValueError, match="arena must be a Q-network alone, got one with a critic"):
        call(arena=critic)
    with pytest.raises(ValueError, match="got one with continuous actions"):
        call(arena=Arena.build((5, 40, 24, 3), continuous=True))
    for name in ("updates", "batch"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1"):
            DQNConfig(**{"updates": 1, "batch": 1, name: 0})
    with pytest.raises(ValueError, match="loss must be one of huber, squared, got 'mse'"):
        DQNConfig(1, 1, loss="mse")


def test_plan_is_honest():
    arena = problem(1.0)[0]
    assert plan(arena, torch.device("cpu"), density=0.1).backend == "cpu"
    with use_backend("reference"):
        assert plan(arena, torch.device("cpu")).backend == "reference"
