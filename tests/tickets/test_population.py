"""Populations: named initialisations, independence of the batch, creation and forward."""

import math

import pytest
import torch
from torch import nn

from sparse_tickets.envs import env_spec
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.population import INITIALISATIONS, Population, initialise, policy_arena

ARENA = Arena.build((4, 48, 32, 2), (4, 48, 32, 1))
KEY = torch.tensor([derive_key("population", seed) for seed in range(64)])


@pytest.mark.parametrize(("scheme", "gain"), [("lecun", 1.0), ("kaiming", 2.0)])
def test_normal_initialisations_have_variance_gain_over_fan_in_in_every_layer(scheme, gain):
    flat = initialise(ARENA, KEY, scheme)
    for net in ARENA.nets:
        for layer in range(net.depth):
            weight, inp = net.weight(flat, layer).double(), net.sizes[layer]
            # Six standard errors of a normal sample's mean and variance.
            std, n = math.sqrt(gain / inp), weight.numel()
            assert abs(weight.mean()) < 6 * std / math.sqrt(n)
            assert abs(weight.var() / std**2 - 1) < 6 * math.sqrt(2 / n)
            # Normal, not uniform: the fourth moment is three variances squared.
            assert (weight**4).mean() / std**4 == pytest.approx(3, rel=0.2)


def test_orthogonal_layers_are_orthogonal_with_the_gains_of_ppo():
    flat = initialise(ARENA, KEY, "orthogonal")
    for net, head_gain in ((ARENA.actor, 0.01), (ARENA.critic, 1.0)):
        for layer in range(net.depth):
            weight = net.weight(flat, layer).double()
            gain = head_gain if layer == net.depth - 1 else math.sqrt(2)
            out, inp = net.shape(layer)
            gram = weight.mT @ weight if out >= inp else weight @ weight.mT
            expected = gain**2 * torch.eye(min(out, inp), dtype=torch.float64)
            torch.testing.assert_close(gram, expected.expand_as(gram), rtol=0, atol=1e-5 * gain**2)
    # Both signs occur on the diagonal: the distribution is uniform, not QR's canonical form.
    heads = ARENA.critic.weight(flat, 2)[:, 0, 0]
    assert (heads > 0).any()
    assert (heads < 0).any()


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_biases_start_at_zero_and_tickets_and_layers_differ(scheme):
    flat = initialise(ARENA, KEY, scheme)
    for net in ARENA.nets:
        for layer in range(net.depth):
            assert not net.bias(flat, layer).any()
    assert len(torch.unique(flat, dim=0)) == len(KEY)
    hidden = [net.weight(flat, 1) for net in ARENA.nets]
    assert not torch.equal(*hidden)


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_initial_weights_do_not_depend_on_the_batch(scheme):
    together = initialise(ARENA, KEY, scheme)
    alone = torch.cat([initialise(ARENA, KEY[[index]], scheme) for index in range(5)])
    assert torch.equal(together[:5], alone)
    assert torch.equal(initialise(ARENA, KEY.flip(0), scheme).flip(0), together)


@pytest.mark.long
def test_rescaled_layers_lose_the_same_share_at_every_level():
    """Exchangeable magnitudes: what a layer keeps is hypergeometric around the level's density."""
    arena = Arena.build((4, 64, 32, 2), (4, 64, 32, 1), prune_critic=True)
    key = torch.arange(40)
    total = arena.prunable
    shares = {}
    for scheme in ("rescaled", "lecun"):
        weight = initialise(arena, key, scheme)[:, :total]
        mask = torch.ones_like(weight, dtype=torch.bool)
        for level in range(1, 11):
            kept = round(0.8**level * total)
            mask = prune(weight, mask, kept, criterion="magnitude")
            density = kept / total
            for begin, out, inp in arena.prunable_layers():
                size = out * inp
                share = mask[:, begin : begin + size].float().mean().item()
                spread = (density * (1 - density) / size * (total - size) / (total - 1)) ** 0.5
                shares[scheme, level, begin] = (share - density) / (spread / len(key) ** 0.5)
    assert max(abs(z) for (scheme, *_), z in shares.items() if scheme == "rescaled") < 4.5
    assert max(abs(z) for (scheme, *_), z in shares.items() if scheme == "lecun") > 20


def test_rescaling_leaves_a_relu_network_as_it_was():
    arena = Arena.build((4, 48, 32, 2), activation="relu")
    obs = torch.randn(len(KEY), 6, 4)
    before, after = (
        Population.create(arena, initialise(arena, KEY, scheme)).actor(obs)
        for scheme in ("lecun", "rescaled")
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_every_algorithm_starts_a_seed_with_the_same_actor():
    layouts = [
        Arena.build((4, 48, 32, 2)),
        ARENA,
        Arena.build((4, 48, 32, 2), (4, 48, 32, 1), prune_critic=True),
    ]
    rows = [initialise(arena, KEY) for arena in layouts]
    for layer in range(3):
        first, *others = (
            arena.actor.weight(row, layer) for arena, row in zip(layouts, rows, strict=True)
        )
        assert all(torch.equal(first, other) for other in others)


def test_log_std_starts_where_it_is_told():
    arena = policy_arena(env_spec("Pendulum-v1"), (8,))
    assert (initialise(arena, KEY)[:, arena.log_std :] == 0).all()
    flat = initialise(arena, KEY, log_std=-2.0)
    assert (flat[:, arena.log_std :] == -2).all()
    assert torch.equal(flat[:, : arena.log_std], initialise(arena, KEY)[:, : arena.log_std])


def test_policy_arena_follows_the_spaces():
    arena = policy_arena(env_spec("CartPole-v1"))
    assert arena.actor.sizes == (4, 64, 64, 2)
    assert arena.prunable == 4480
    assert arena.critic.sizes == (4, 64, 64, 1)
    assert arena.log_std is None
    student = policy_arena(env_spec("Pendulum-v1"), (8,), activation="relu", critic=False)
    assert student.critic is None
    assert student.size - student.log_std == 1
    both = policy_arena(env_spec("CartPole-v1"), prune_critic=True)
    assert both.prunable == 4480 + 4 * 64 + 64 * 64 + 64


def test_creation_copies_masks_and_resets_the_optimiser(generator):
    weight = torch.randn(3, ARENA.size, generator=generator)
    mask = torch.rand(3, ARENA.prunable, generator=generator) < 0.3
    before = weight.clone()
    population = Population.create(ARENA, weight, mask, density=0.3)
    parameters = population.parameters
    assert len(population) == 3
    assert torch.equal(weight, before)
    assert torch.equal(parameters.weight[:, : ARENA.prunable], weight[:, : ARENA.prunable] * mask)
    assert torch.equal(parameters.weight[:, ARENA.prunable :], weight[:, ARENA.prunable :])
    assert not parameters.m.any()
    assert not parameters.v.any()
    assert not parameters.step.any()
    parameters.mask.fill_(True)
    assert not mask.all()


def test_forward_is_that_of_plain_torch(generator):
    weight = torch.randn(2, ARENA.size, generator=generator) / 4
    mask = torch.rand(2, ARENA.prunable, generator=generator) < 0.5
    population = Population.create(ARENA, weight, mask, density=0.5)
    obs = torch.randn(2, 7, 4, generator=generator)
    for net, output in ((ARENA.actor, population.actor), (ARENA.critic, population.critic)):
        for ticket in range(2):
            modules = []
            for weights, bias in net.layers(population.parameters.weight):
                linear = nn.Linear(weights.shape[2], weights.shape[1])
                linear.weight.data, linear.bias.data = weights[ticket], bias[ticket]
                modules += [linear, nn.Tanh()]
            expected = nn.Sequential(*modules[:-1])(obs[ticket])
            got = output(obs)[ticket]
            torch.testing.assert_close(got, expected.view_as(got), rtol=1e-5, atol=1e-5)


def test_other_weights_share_everything_else(generator):
    population = Population.create(ARENA, torch.randn(2, ARENA.size, generator=generator))
    other = torch.zeros(2, ARENA.size)
    parameters = population.with_weight(other)
    assert parameters.weight is other
    assert parameters.mask is population.parameters.mask
    assert population.to("cpu").parameters.weight is population.parameters.weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initialise(ARENA, KEY, "xavier"), "scheme must be one of"),
        (lambda: Population.create(ARENA, torch.zeros(2, 3)), "weight must have shape"),
        (
            lambda: Population.create(ARENA, torch.zeros(2, ARENA.size), density=1.5),
            "density must be in",
        ),
        (
            lambda: Population.create(ARENA, torch.zeros(2, ARENA.size), torch.ones(2, 5) > 0),
            "mask must be bool",
        ),
        (
            lambda: Population.create(
                ARENA, torch.zeros(2, ARENA.size), torch.ones(2, ARENA.prunable)
            ),
            "mask must be bool",
        ),
        (lambda: policy_arena(env_spec("CartPole-v1"), (0,)), "at least two sizes >= 1"),
        (lambda: policy_arena(env_spec("CartPole-v1"), activation="sine"), "activation must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_has_no_critic():
    arena = policy_arena(env_spec("CartPole-v1"), (8,), critic=False)
    population = Population.create(arena, initialise(arena, KEY[:1]))
    with pytest.raises(ValueError, match="no critic"):
        population.critic(torch.zeros(1, 1, 4))
