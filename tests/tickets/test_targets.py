"""Target networks have the online network's masks, whoever prunes and however they are updated."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_tickets import Pruner, SparseLinear, sparsify_
from sparse_tickets.sequential import SparseSequential
from sparse_tickets.targets import tie_masks_

# Networks as small as these lose an output at such densities.
pytestmark = pytest.mark.filterwarnings("ignore::sparse_tickets.convert.SparsifyWarning")


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def networks() -> tuple[nn.Sequential, nn.Sequential]:
    """An online network, half pruned, and a target that was dense when it was copied."""
    online, target = build(), build()
    target.load_state_dict(online.state_dict())
    sparsify_(online, 0.5)
    tie_masks_(target, online)
    return online, target


def polyak_(target: nn.Module, online: nn.Module, tau: float) -> None:
    """As Stable-Baselines3 does it, out of autograd's sight."""
    with torch.no_grad():
        for t, p in zip(target.parameters(), online.parameters(), strict=True):
            t.data.mul_(1 - tau)
            torch.add(t.data, p.data, alpha=tau, out=t.data)


def answer(network: nn.Sequential, x: Tensor) -> Tensor:
    """By the masks, in plain torch."""
    first, _, last = network
    hidden = nn.functional.linear(x, first.weight * first.mask, first.bias).relu()
    return nn.functional.linear(hidden, last.weight * last.mask, last.bias)


def test_target_becomes_sparse_on_its_own_parameters():
    online, target = sparsify_(build(), 0.5), build()
    weights = [target[0].weight, target[2].weight]
    assert tie_masks_(target, online) is target
    for index, weight in zip((0, 2), weights, strict=True):
        assert target[index].weight is weight
        assert target[index].mask is online[index].mask
        assert not weight[~online[index].mask].any()
        assert weight[online[index].mask].all()


def test_a_module_of_both_is_pruned_by_the_online_weights(networks):
    online, target = networks
    torch.nn.init.normal_(target[0].weight)
    expected = sparsify_(copy.deepcopy(online), 0.2)
    sparsify_(nn.ModuleList([online, target]), 0.2)
    for index in (0, 2):
        assert torch.equal(online[index].mask, expected[index].mask)
        assert torch.equal(online[index].weight, expected[index].weight)
        assert target[index].mask is online[index].mask
        assert not target[index].weight[~target[index].mask].any()


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_pruner_of_both_asks_the_online_network_alone(networks, method):
    online, target = networks
    twin = copy.deepcopy(online)
    pruners = [Pruner(module, method, 0.3, 20) for module in (nn.ModuleList(networks), twin)]
    for _ in range(20):
        x = torch.randn(8, 6)
        for module, pruner in zip((online, twin), pruners, strict=True):
            module.zero_grad()
            (module(x) - target(x).detach()).square().sum().backward()
            pruner.step()
    assert torch.equal(online[0].mask, twin[0].mask)
    assert torch.equal(online[2].mask, twin[2].mask)
    assert target[0].mask is online[0].mask
    assert pruners[0].density == pytest.approx(0.3, abs=0.01)


def test_target_runs_in_one_call_as_the_online_network_does(networks):
    online, target = networks
    assert type(target) is type(online) is SparseSequential
    assert target.plan(batch=8) == online.plan(batch=8)
    x = torch.randn(8, 6)
    torch.testing.assert_close(target(x), answer(target, x))


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_pruning_the_online_network_prunes_the_target(networks, batch):
    online, target = networks
    x = torch.randn(batch, 6)
    target(x)
    sparsify_(online, 0.2)
    with torch.no_grad():
        torch.testing.assert_close(target(x), answer(target, x))
    tie_masks_(target, online)
    assert not target[0].weight[~online[0].mask].any()


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_polyak_updates_carry_no_pruned_weight(networks, batch):
    online, target = networks
    x = torch.randn(batch, 6)
    for density in (0.4, 0.2, 0.1):
        nn.init.normal_(online[0].weight)
        sparsify_(online, density)
        tie_masks_(target, online)
        for _ in range(3):
            polyak_(target, online, 0.1)
            with torch.no_grad():
                torch.testing.assert_close(target(x), answer(target, x))
        assert not target[0].weight[~online[0].mask].any()
        assert not target[2].weight[~online[2].mask].any()


def test_polyak_of_weights_that_the_target_still_holds_is_left_out(networks):
    online, target = networks
    online[0].prune_(0.05)
    polyak_(target, online, 0.01)
    x = torch.randn(8, 6)
    assert target[0].weight.data[~online[0].mask].any()
    with torch.no_grad():
        torch.testing.assert_close(target(x), answer(target, x))
        torch.testing.assert_close(target(x[:1]), answer(target, x[:1]))


def test_ties_survive_deepcopy_and_hard_copies(networks):
    pair = copy.deepcopy(nn.ModuleList(networks))
    assert pair[0][0].mask is pair[1][0].mask
    online, target = networks
    sparsify_(online, 0.1)
    target.load_state_dict(online.state_dict())
    assert target[0].mask is online[0].mask
    assert torch.equal(target[0].weight, online[0].weight)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Sequential(nn.Linear(6, 16)), "named '2' as online does, got nothing"),
        (
            nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)),
            r"\(3, 16\).*got Linear of shape \(4, 16\)",
        ),
        (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Tanh()), "got Tanh"),
    ],
)
def test_other_architectures_are_refused_before_anything_changes(target, message):
    online = sparsify_(build(), 0.5)
    with pytest.raises(ValueError, match=message):
        tie_masks_(target, online)
    assert not any(isinstance(layer, SparseLinear) for layer in target.modules())


def test_nothing_to_tie_is_refused():
    with pytest.raises(ValueError, match="sparsify_ it first"):
        tie_masks_(build(), build())
    with pytest.raises(ValueError, match="sparse in target alone"):
        tie_masks_(sparsify_(build(), 0.5), build())
