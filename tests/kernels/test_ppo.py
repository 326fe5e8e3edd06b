"""PPO's fused update against plain torch with autograd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain

from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.mlp import layout
from sparse_tickets.kernels.ppo import Batch, PPOConfig, plan, ppo_update_, reference

LR = 2.5e-4
EPS = torch.finfo(torch.float32).eps


def problem(
    density,
    *,
    continuous=False,
    activation="tanh",
    architecture="mlp",
    tickets=3,
    samples=148,
    hidden=(40, 24),
    critic=(33,),
    prune_critic=False,
):
    generator = torch.Generator().manual_seed(tickets + samples)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    arena = Arena.build(
        any_chain(architecture, 5, hidden, 3),
        any_chain(architecture, 5, critic, 1),
        activation=activation,
        architecture=architecture,
        continuous=continuous,
        prune_critic=prune_critic,
    )
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    weight = 0.2 * normal(tickets, arena.size)
    m, v = 0.01 * normal(tickets, arena.size), 1e-3 * normal(tickets, arena.size) ** 2
    for row in (weight, m, v):
        row[:, : arena.prunable] *= mask
    step = torch.arange(tickets) + 5
    if continuous:
        action = normal(tickets, samples, 3)
        logp = -3.9 + 0.3 * normal(tickets, samples)
    else:
        action = torch.randint(0, 3, (tickets, samples), generator=generator)
        logp = -1.1 + 0.3 * normal(tickets, samples)
    batch = Batch(
        normal(tickets, samples, 5),
        action,
        logp,
        *(normal(tickets, samples) for _ in range(3)),
    )
    return arena, Parameters(weight, mask, m, v, step), batch


def arguments(tickets):
    return torch.arange(tickets) * 1234567 - 5, 3, torch.full((tickets,), LR)


def double(tensors):
    return type(tensors)(*(t.double() if t.is_floating_point() else t.clone() for t in tensors))


def copy(tensors):
    return type(tensors)(*(t.clone() for t in tensors))


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


def compare(arena, parameters, batch, config, density, updates):
    before = copy(parameters)
    expected = double(parameters)
    key, iteration, lr = arguments(len(parameters.step))
    stats = ppo_update_(parameters, arena, batch, key, iteration, lr, config, density=density)
    with use_backend("reference"):
        expected_stats = ppo_update_(
            expected, arena, double(batch), key, iteration, lr.double(), config
        )
    # Gradients are sums of hundreds of products, off by 32 roundings of their norm. Adam moves a
    # weight by at most about lr, whatever the gradient; its relative error is the gradient's,
    # magnified where the gradient nearly cancels.
    error = 32 * EPS * updates
    scale = max(1.0, float(expected.m.abs().max())) if len(key) else 1.0
    close = torch.testing.assert_close
    close(parameters.weight.double(), expected.weight, rtol=0, atol=4 * EPS + LR * 1e3 * error)
    close(parameters.m.double(), expected.m, rtol=0, atol=scale * error)
    close(parameters.v.double(), expected.v, rtol=0, atol=scale * error)
    assert torch.equal(parameters.step, expected.step)
    assert torch.equal(parameters.mask, before.mask)
    for name, one, other in zip(stats._fields, stats, expected_stats, strict=True):
        close(one.double(), other, rtol=64 * EPS * updates, atol=64 * EPS * updates, msg=name)
    for row in (parameters.weight, parameters.m, parameters.v):
        assert (row[:, : arena.prunable][~parameters.mask] == 0).all()


@pytest.mark.parametrize("density", [1.0, 0.6, 0.1, 0.0])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_one_minibatch_equals_float64(continuous, activation, density, poisoned):
    config = PPOConfig(epochs=1, minibatches=1)
    problem_ = problem(density, continuous=continuous, activation=activation)
    compare(*problem_, config, density, updates=1)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_value": False, "normalise_advantage": False, "max_norm": None},
        {"value_coef": 0.7, "entropy_coef": 0.3, "max_norm": 0.05, "clip": 0.1},
        {"beta1": 0.8, "beta2": 0.9, "eps": 1e-8},
    ],
)
def test_every_option(continuous, options):
    config = PPOConfig(epochs=1, minibatches=2, **options)
    compare(*problem(0.5, continuous=continuous), config, 0.5, updates=2)


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("continuous", [False, True])
def test_a_whole_iteration_stays_near_float64(continuous, density):
    compare(*problem(density, continuous=continuous), PPOConfig(), density, updates=16)


@pytest.mark.parametrize("samples", [2, 15, 17, 127, 129, 300])
def test_batches_of_any_size(samples, poisoned):
    config = PPOConfig(epochs=1, minibatches=1)
    compare(*problem(0.3, samples=samples), config, 0.3, updates=1)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 50), max_size=3),
    critic=st.lists(st.integers(1, 50), max_size=2),
    tickets=st.integers(0, 3),
    minibatch=st.integers(2, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    continuous=st.booleans(),
    prune_critic=st.booleans(),
    **KINDS,
)
def test_any_networks_and_minibatch(minibatch, density, **shape):
    config = PPOConfig(epochs=1, minibatches=2)
    compare(*problem(density, samples=2 * minibatch, **shape), config, density, updates=2)


def test_pruned_critic():
    config = PPOConfig(epochs=1, minibatches=2)
    compare(*problem(0.3, prune_critic=True), config, 0.3, updates=2)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_ticket_does_not_see_its_batch_or_the_threads(density):
    arena, parameters, batch = problem(density, tickets=60)
    key, iteration, lr = arguments(60)

    def run(tickets, threads=2):
        mine = Parameters(*(t[tickets].clone() for t in parameters))
        rows = Batch(*(t[tickets] for t in batch))
        config = PPOConfig(epochs=2)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            stats = ppo_update_(
                mine, arena, rows, key[tickets], iteration, lr[tickets], config, density=density
            )
        finally:
            torch.set_num_threads(before)
        return (*mine, *stats)

    together = run(slice(None))
    for threads in (1, 3):
        for one, other in zip(run(slice(None), threads), together, strict=True):
            assert torch.equal(one, other)
    for tickets in (slice(0, 1), slice(59, 60), slice(20, 27)):
        for one, other in zip(run(tickets), together, strict=True):
            assert torch.equal(one, other[tickets])
    assert run(slice(0, 0))[0].shape == (0, arena.size)


def test_loss_is_cleanrls():
    """One ticket, written as in CleanRL's ppo.py with `torch.distributions` and `nn.Linear`."""
    arena, parameters, batch = problem(1.0, tickets=1)
    config = PPOConfig()
    nets = []
    for net in arena.nets:
        layers = []
        for weight, bias in net.layers(parameters.weight):
            linear = torch.nn.Linear(weight.shape[2], weight.shape[1])
            linear.weight.data, linear.bias.data = weight[0].clone(), bias[0].clone()
            layers += [linear, torch.nn.Tanh()]
        nets.append(torch.nn.Sequential(*layers[:-1]))
    actor, critic = nets
    distribution = torch.distributions.Categorical(logits=actor(batch.obs[0]))
    logratio = distribution.log_prob(batch.action[0]) - batch.logp[0]
    ratio = logratio.exp()
    advantages = batch.advantage[0]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - config.clip, 1 + config.clip)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    newvalue = critic(batch.obs[0]).view(-1)
    v_loss_unclipped = (newvalue - batch.target[0]) ** 2
    v_clipped = batch.value[0] + torch.clamp(newvalue - batch.value[0], -config.clip, config.clip)
    v_loss = 0.5 * torch.max(v_loss_unclipped, (v_clipped - batch.target[0]) ** 2).mean()
    loss = (
        pg_loss - config.entropy_coef * distribution.entropy().mean() + v_loss * config.value_coef
    )
    total, measured = reference.loss(parameters.weight, parameters.mask, arena, batch, config)
    torch.testing.assert_close(total[0], loss)
    assert measured[4, 0] == ((ratio - 1).abs() > config.clip).float().mean()


def test_diverged_ticket_stays_alone_and_on_its_mask():
    arena, parameters, batch = problem(0.5)
    batch.target[1, 3] = torch.nan
    key, iteration, lr = arguments(3)
    stats = ppo_update_(parameters, arena, batch, key, iteration, lr, PPOConfig(), density=0.5)
    assert stats.grad_norm[1].isnan()
    assert parameters.weight[1].isnan().any()
    assert parameters.weight[[0, 2]].isfinite().all()
    assert (parameters.weight[:, : arena.prunable][~parameters.mask] == 0).all()


def test_refuses_what_it_cannot_do():
    arena, parameters, batch = problem(0.5)
    key, iteration, lr = arguments(3)

    def update(parameters=parameters, arena=arena, batch=batch, config=PPOConfig(), key=key):  # noqa: B008
        return ppo_update_(parameters, arena, batch, key, iteration, lr, config)

    with pytest.raises(ValueError, match="must have a critic"):
        update(arena=Arena.build((5, 40, 24, 3)))
    with pytest.raises(ValueError, match="must read the same observation, got 5 and 6"):
        update(arena=Arena.build((5, 40, 24, 3), (6, 33, 1)))
    with pytest.raises(ValueError, match="minibatches must divide the samples, got 5 and 148"):
        update(config=PPOConfig(minibatches=5))
    with pytest.raises(ValueError, match="minibatches of two samples"):
        update(config=PPOConfig(minibatches=148))
    with pytest.raises(ValueError, match="key must have shape"):
        update(key=key[:2])
    with pytest.raises(ValueError, match="obs must have shape"):
        update(batch=batch._replace(obs=batch.obs[..., :3]))
    with pytest.raises(TypeError, match="action must be int64"):
        update(batch=batch._replace(action=batch.action.float()))
    with pytest.raises(ValueError, match=r"action must be in \[0, 3\), got 1..3"):
        update(batch=batch._replace(action=batch.action.clamp(min=0) % 2 * 2 + 1))
    with pytest.raises(TypeError, match="weight must be float32"):
        update(parameters=double(parameters))
    with pytest.raises(ValueError, match="m must be contiguous"):
        update(parameters=parameters._replace(m=parameters.m.mT.contiguous().mT))
    for name, value in (("epochs", 0), ("clip", 0.0), ("eps", 0.0), ("beta1", 1.0)):
        with pytest.raises(ValueError, match=name):
            PPOConfig(**{name: value})


def test_plan_is_honest():
    arena, _, _ = problem(1.0)
    assert plan(arena, torch.device("cpu"), density=0.1).format == "csr/csr/csr/csr/csr"
    with use_backend("reference"):
        assert plan(arena, torch.device("cpu")).backend == "reference"
