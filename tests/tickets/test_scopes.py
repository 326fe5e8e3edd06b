"""Where `sparsify_` prunes by default, by layer and globally."""

import math

import pytest
import torch
from sparse_layers import kept, sparse_layers
from torch import nn

from sparse_tickets.convert import SparsifyWarning, sparsify_
from sparse_tickets.prune import erk_counts


def fresh_policy(inputs: int = 4, outputs: int = 2) -> nn.Module:
    """As PPO implementations initialise it: orthogonal, the action head 100 times smaller."""
    torch.manual_seed(0)
    policy = nn.Module()
    policy.body = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    policy.head = nn.Linear(64, outputs)
    for layer in (policy.body[0], policy.body[2]):
        nn.init.orthogonal_(layer.weight, 2**0.5)
    nn.init.orthogonal_(policy.head.weight, 0.01)
    return policy


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05])
def test_the_default_keeps_every_action_of_a_fresh_policy(density):
    policy = sparsify_(fresh_policy(), density)
    assert kept(policy) == math.floor(density * 4480 + 0.5)
    assert policy.head.mask.any(1).all()
    assert policy.head.density >= density


@pytest.mark.parametrize("density", [0.013, 0.1, 0.33, 0.8, 1.0])
def test_erk_is_exact_and_nested_and_keeps_the_largest_of_each_layer(density):
    policy = fresh_policy()
    sizes = [(0, 64, 4), (0, 64, 64), (0, 2, 64)]
    before = [layer.weight.detach().abs() for layer in (*policy.body[::2], policy.head)]
    sparsify_(policy, 0.9)
    first = [layer.mask.clone() for layer in sparse_layers(policy)]
    sparsify_(policy, density, exclude=[])
    k = math.floor(min(density, 0.9) * 4480 + 0.5)
    assert kept(policy) == k
    for layer, weight, mask, count in zip(
        sparse_layers(policy), before, first, erk_counts(sizes, k), strict=True
    ):
        assert not (layer.mask & ~mask).any()
        assert abs(int(layer.mask.sum()) - count) <= 1
        out = weight[~layer.mask]
        assert not layer.mask.any() or not len(out) or weight[layer.mask].min() >= out.max()


def test_global_scope_names_the_head_that_it_prunes_away():
    with pytest.warns(SparsifyWarning, match="layer 'head' keeps none of its weights.*scope='erk'"):
        sparsify_(fresh_policy(), 0.1, scope="global")


def test_a_dead_row_of_an_output_layer_and_a_broken_path_are_named():
    policy = fresh_policy(outputs=3)
    with torch.no_grad():
        policy.head.weight[1] *= 1e-3
    message = r"rows 1 of output layer 'head' depend on no input"
    with pytest.warns(SparsifyWarning, match=message):
        sparsify_(policy, 0.3, scope="layer")
    chain = nn.Sequential(nn.Linear(2, 2, False), nn.ReLU(), nn.Linear(2, 2, False))
    with torch.no_grad():
        chain[0].weight.copy_(torch.tensor([[1.0, 0.9], [0.0, 0.0]]))
        chain[2].weight.copy_(torch.tensor([[0.0, 0.9], [0.0, 1.0]]))
    with pytest.warns(SparsifyWarning, match="no path reaches through layer '2'"):
        sparsify_(chain, 0.5, scope="layer")


def test_a_residual_block_and_hidden_rows_are_no_cut():
    """Nothing is said of a layer whose inputs are not known, nor of hidden units without inputs."""
    module = nn.Module()
    module.a = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    module.b = nn.Linear(6, 1)
    with torch.no_grad():
        module.a[0].weight[:5] *= 1e-3
        module.a[2].weight[:5] *= 1e-3
        module.b.weight[0, 5] = 1
    sparsify_(module, 0.17, scope="layer")
    assert not module.a[2].mask[:5].any()
