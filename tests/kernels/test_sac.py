"""SAC's updates against plain torch with autograd in float64, and torch's own modules."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain

from sparse_tickets.kernels import squashed, transitions
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.random import Stream, integers, normal
from sparse_tickets.kernels.sac import SACConfig, plan, sac_update_
from sparse_tickets.kernels.transitions import Transitions

LR = 1e-3
EPS = torch.finfo(torch.float32).eps
CAPACITY, STORED, FEATURES = 90, 77, 5


def problem(
    density,
    *,
    tickets=3,
    hidden=(24, 16),
    activation="relu",
    architecture="mlp",
    actions=2,
    pruned=False,
):
    generator = torch.Generator().manual_seed(tickets)

    def normals(*shape):
        return torch.randn(*shape, generator=generator)

    arena = Arena.build(
        any_chain(architecture, FEATURES, hidden, 2 * actions),
        any_chain(architecture, FEATURES + actions, hidden, 1),
        activation=activation,
        architecture=architecture,
        squashed=True,
        prune_critic=pruned,
    )
    mask = torch.rand(tickets, arena.prunable, generator=generator) < density
    weight, target = 0.2 * normals(tickets, arena.size), 0.2 * normals(tickets, arena.size)
    m, v = 0.01 * normals(tickets, arena.size), 1e-3 * normals(tickets, arena.size) ** 2 + 1e-6
    for row in (weight, target, m, v):
        row[:, : arena.prunable] *= mask
    parameters = Parameters(weight, mask, m, v, torch.arange(tickets))
    shape = (tickets, CAPACITY)
    ended = torch.rand(shape, generator=generator) < 0.1
    replay = Transitions(
        normals(*shape, FEATURES),
        normals(*shape, actions).tanh(),
        2 * normals(*shape),
        torch.where(ended, 0.0, 0.9),
        # What a terminated episode ended with is nobody's business.
        normals(*shape, FEATURES).where(~ended[..., None], torch.nan),
    )
    for field in replay:  # nor is what was never stored
        field[:, STORED:] = torch.nan
    key = torch.arange(tickets) * 7654321 - 9
    return arena, parameters, target, replay, key, torch.full((tickets,), LR)


def double(tensors):
    return type(tensors)(*(t.double() if t.is_floating_point() else t.clone() for t in tensors))


def configured(updates, batch, **options):
    return SACConfig(updates, batch, target_entropy=-1.5, tau=0.1, **options)


def compare(density, config, backend="cpu", **options):
    arena, parameters, target, replay, key, lr = problem(density, **options)
    expected, slow = double(parameters), target.double()
    with use_backend(backend):
        stats = sac_update_(
            parameters, arena, target, replay, STORED, key, 5, lr, config, density=density
        )
    with use_backend("reference"):
        expected_stats = sac_update_(
            expected, arena, slow, double(replay), STORED, key, 5, lr.double(), config
        )
    error = 256 * EPS * config.updates
    torch.testing.assert_close(parameters.m.double(), expected.m, rtol=error, atol=error)
    torch.testing.assert_close(parameters.v.double(), expected.v, rtol=2 * error, atol=error)
    # A step moves a weight by the learning rate times a ratio of moments of at most some 30.
    near = {"rtol": EPS, "atol": 1e3 * LR * error}
    torch.testing.assert_close(parameters.weight.double(), expected.weight, **near)
    torch.testing.assert_close(target.double(), slow, rtol=4 * EPS, atol=1e3 * LR * error)
    for one, other in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4 * error, atol=4 * error)
    assert torch.equal(parameters.step, expected.step)
    for row in (parameters.weight, parameters.m, parameters.v, target):
        assert (row[:, : arena.prunable][~parameters.mask] == 0).all()


@pytest.mark.long
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
def test_updates_equal_float64(density, pruned):
    compare(density, configured(1, 133), pruned=pruned)
    compare(density, configured(4, 32, max_norm=0.5), pruned=pruned)


@pytest.mark.long
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 40), max_size=3),
    tickets=st.integers(0, 3),
    batch=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    actions=st.integers(1, 7),
    **KINDS,
)
def test_any_network_and_batch(batch, density, **shape):
    compare(density, configured(1, batch), **shape)


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.usefixtures("tensors_on_a_gpu")
def test_updates_of_the_gpu():
    compare(0.5, configured(2, 20), "triton", tickets=2, hidden=(8,))


@pytest.mark.parametrize("batch", [64, 13])
def test_a_ticket_does_not_see_its_batch_and_calls_may_be_cut(batch, monkeypatch):
    arena, parameters, target, replay, key, lr = problem(0.3, tickets=7, actions=3)

    def run(tickets, calls):
        mine, slow = Parameters(*(t[tickets].clone() for t in parameters)), target[tickets].clone()
        data = Transitions(*(field[tickets] for field in replay)), STORED
        for first, updates in calls:
            config = configured(updates, batch)
            sac_update_(
                mine, arena, slow, *data, key[tickets], first, lr[tickets], config, density=0.3
            )
        return (*mine, slow)

    together = run(slice(None), [(0, 6)])
    for one, other in zip(run(slice(None), [(0, 2), (2, 4)]), together, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(transitions, "MOST_SAMPLES", 128)
    for ticket in (0, 6):
        for one, other in zip(run(slice(ticket, ticket + 1), [(0, 6)]), together, strict=True):
            assert torch.equal(one[0], other[ticket])
    assert run(slice(0, 0), [(0, 1)])[0].shape == (0, arena.size)


def test_two_updates_are_what_torch_alone_makes_of_them():
    """A ticket as modules of torch, with torch's distributions and an Adam for each part."""
    arena, parameters, target, replay, key, lr = problem(1.0, tickets=1, hidden=(16,))

    def module(net, rows):
        sizes = net.sizes
        made = torch.nn.Sequential(
            torch.nn.Linear(sizes[0], 16), torch.nn.ReLU(), torch.nn.Linear(16, sizes[2])
        )
        layers = (part for layer in net.layers(rows) for part in layer)
        for parameter, part in zip(made.parameters(), layers, strict=True):
            parameter.data.copy_(part[0])
        return made

    parameters = parameters._replace(
        m=torch.zeros_like(parameters.m),
        v=torch.zeros_like(parameters.v),
        step=torch.zeros_like(parameters.step),
    )
    actor = module(arena.actor, parameters.weight)
    critics = [module(net, parameters.weight) for net in arena.critics]
    slow = [module(net, target) for net in arena.critics]
    log_alpha = parameters.weight[0, arena.temperature].clone().requires_grad_()
    parts = [list(actor.parameters()), [p for q in critics for p in q.parameters()], [log_alpha]]
    optimisers = [torch.optim.Adam(part, LR) for part in parts]
    config = configured(2, 50)
    sac_update_(parameters, arena, target, replay, STORED, key, 3, lr, config)

    def policy(obs, noise):
        mean, log_std = actor(obs).chunk(2, -1)
        law = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        law = torch.distributions.TransformedDistribution(
            law, torch.distributions.transforms.TanhTransform(cache_size=1)
        )
        action = (mean + log_std.exp() * noise).tanh()
        return action, law.log_prob(action).sum(-1)

    for step in (3, 4):
        index = integers(key, 50, STORED, stream=Stream.MINIBATCH, step=step)[0]
        obs, action, reward, discount, next_obs = (field[0, index] for field in replay)
        next_obs = next_obs.nan_to_num()  # where the discount is zero
        noise = normal(key, 2 * 50 * 2, stream=Stream.UPDATE_ACTION, step=step).view(2, 50, 2)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            following, logp = policy(next_obs, noise[0])
            lower = torch.min(*(q(torch.cat([next_obs, following], 1)) for q in slow)).squeeze(1)
            wanted = reward + discount * (lower - alpha * logp)
        errors = [q(torch.cat([obs, action], 1)).squeeze(1) - wanted for q in critics]
        critic_loss = 0.5 * sum(error.square().mean() for error in errors)
        own, logp = policy(obs, noise[1])
        lower = torch.min(*(q(torch.cat([obs, own], 1)) for q in critics)).squeeze(1)
        actor_loss = (alpha * logp - lower).mean()
        temperature_loss = -log_alpha * (logp.detach().mean() + config.target_entropy)
        losses = (actor_loss, critic_loss, temperature_loss)
        for part, loss in zip(parts, losses, strict=True):
            grads = torch.autograd.grad(loss, part, retain_graph=True)
            for parameter, grad in zip(part, grads, strict=True):
                parameter.grad = grad
        for optimiser in optimisers:
            optimiser.step()
        for q, online in zip(slow, critics, strict=True):
            for one, other in zip(q.parameters(), online.parameters(), strict=True):
                one.data.lerp_(other.data, config.tau)
    rows = [parameters.weight] * 3 + [target] * 2
    nets, modules = (*arena.nets, *arena.critics), (actor, *critics, *slow)
    for row, net, made in zip(rows, nets, modules, strict=True):
        layers = [part for layer in net.layers(row) for part in layer]
        for parameter, part in zip(made.parameters(), layers, strict=True):
            torch.testing.assert_close(parameter.data, part[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_alpha.detach(), parameters.weight[0, arena.temperature])


def test_a_diverged_ticket_is_nan_and_spares_the_others():
    arena, parameters, target, replay, key, lr = problem(0.5)
    alone, slow = copy.deepcopy(parameters), target.clone()
    config = configured(2, 16)
    sac_update_(alone, arena, slow, replay, STORED, key, 0, lr, config, density=0.5)
    parameters.weight[1, arena.prunable :] = torch.nan
    sac_update_(parameters, arena, target, replay, STORED, key, 0, lr, config, density=0.5)
    assert parameters.weight[1].isnan().any()
    assert torch.equal(parameters.weight[[0, 2]], alone.weight[[0, 2]])


@pytest.mark.parametrize("mean", [0.0, 3.0, -30.0])
@pytest.mark.parametrize("log_std", [-25.0, -1.0, 5.0])
def test_squashed_actions_and_their_density(mean, log_std):
    """Of float64's change of variables, also where the slope is the smallest of numbers."""
    noise = torch.linspace(-3, 3, 7).reshape(1, 7, 1)
    head = torch.tensor([mean, log_std]).expand(1, 7, 2).contiguous()
    action, logp = squashed.sample(head, noise)
    scale = math.exp(min(max(log_std, -20.0), 2.0))
    raw = mean + scale * noise.double()
    log_slope = -2 * (raw.abs() + (1 + (-2 * raw.abs()).exp()).log() - math.log(2))
    density = torch.distributions.Normal(0.0, 1.0).log_prob(noise.double())
    expected = (density - math.log(scale) - log_slope).squeeze(-1)
    torch.testing.assert_close(action.double(), raw.tanh(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-4)


def test_refuses_what_it_cannot_do():
    arena, parameters, target, replay, key, lr = problem(1.0)
    config = configured(1, 4)

    def call(arena=arena, target=target, replay=replay, stored=STORED, parameters=parameters):
        sac_update_(parameters, arena, target, replay, stored, key, 0, lr, config)

    with pytest.raises(ValueError, match=r"stored must be in \[1, 90\], the length of reward, got"):
        call(stored=CAPACITY + 1)
    with pytest.raises(ValueError, match=r"action must have shape \(3, 90, 2\), got"):
        call(replay=replay._replace(action=replay.action[..., :1]))
    with pytest.raises(ValueError, match="next_obs must have shape"):
        call(replay=replay._replace(next_obs=replay.next_obs[..., :4]))
    with pytest.raises(TypeError, match="reward must be float32"):
        call(replay=replay._replace(reward=replay.reward.double()))
    with pytest.raises(ValueError, match="weight must not share memory with target"):
        call(target=parameters.weight)
    with pytest.raises(ValueError, match="arena must be squashed and have critics, got squashed=F"):
        call(arena=Arena.build((5, 4), (7, 1), continuous=True))
    with pytest.raises(ValueError, match="arena must be squashed and have critics, got critic=Non"):
        call(arena=Arena.build((5, 4), squashed=True))
    with pytest.raises(ValueError, match=r"critic must map 5 features and 2 numbers.*got \(5, 1\)"):
        call(arena=Arena.build((5, 4), (5, 1), squashed=True))
    with pytest.raises(ValueError, match="squashed needs an even number of outputs"):
        Arena.build((5, 3), squashed=True)
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\], got 0"):
        SACConfig(1, 1, -1.0, tau=0)
    assert "sac_update_: cpu/" in str(plan(arena, torch.device("cpu"), density=0.1))
