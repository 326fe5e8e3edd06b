"""`compact`: smaller networks that compute the same."""

import copy

import pytest
import torch
from converting import random_stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_tickets.compaction import Compact, compact
from sparse_tickets.convert import densify_, sparsify_
from sparse_tickets.linear import SparseLinear


def assert_minimal(small: Compact) -> None:
    """Every unit has a path of weights in and out; every kept input a path out."""
    layers = [layer for layer in small.net if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(layers):
        assert type(layer) is nn.Linear
        support = layer.weight != 0
        if layer.weight.shape[1]:
            assert support.any(0).all()
            assert index == len(layers) - 1 or support.any(1).all()
    assert layers[0].in_features == small.kept_inputs.numel()


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.0, 0.01, 0.03, 0.08, 0.15, 0.4, 1.0]),
    bias=st.booleans(),
    sparse=st.booleans(),
)
def test_compact_equals_the_original(seed, density, bias, sparse):
    module = random_stack(seed, density, bias, sparse)
    small = compact(module)
    for shape in [(9,), (5, 9), (2, 3, 9), (0, 9)]:
        x = torch.randn(shape)
        torch.testing.assert_close(small(x), module(x), rtol=1e-5, atol=1e-5)
    assert_minimal(small)
    if density == 1:
        assert small.kept_inputs.tolist() == list(range(9))


def test_compact_folds_constants_and_drops_what_is_dead():
    """Input 1 is dead, unit 0 constant, unit 1 has no reader: unit 2 alone remains."""
    module = nn.Sequential(
        SparseLinear(3, 3, mask=torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()),
        nn.Tanh(),
        SparseLinear(3, 2, mask=torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()),
    )
    small = compact(module)
    assert small.kept_inputs.tolist() == [0, 2]
    assert [tuple(p.shape) for p in small.net.parameters()] == [(1, 2), (1,), (2, 1), (2,)]
    constant = module[0].bias[0].tanh()
    want = module[2].bias + module[2].weight[:, 0] * constant
    torch.testing.assert_close(small.net[2].bias, want)
    assert "kept_inputs=2/3" in repr(small)


def test_compact_cascades():
    """A unit whose only source is a constant is one too; so is an input read by a dead unit."""
    first = torch.tensor([[1, 0], [0, 0]]).bool()
    second = torch.tensor([[0, 1], [1, 0]]).bool()
    third = torch.tensor([[1, 0]]).bool()
    module = nn.Sequential(
        SparseLinear(2, 2, mask=first),
        nn.Tanh(),
        SparseLinear(2, 2, mask=second),
        nn.Tanh(),
        SparseLinear(2, 1, mask=third),
        nn.Softmax(-1),
    )
    small = compact(module)
    assert small.kept_inputs.numel() == 0
    assert [type(layer) for layer in small.net] == [nn.Linear, nn.Softmax]
    x = torch.randn(4, 2)
    torch.testing.assert_close(small(x), module(x))


def test_compact_with_everything_pruned_without_biases():
    module = sparsify_(nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid()), 0.0)
    torch.testing.assert_close(compact(module)(torch.ones(2, 4)), torch.full((2, 8), 0.5))
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    module[0].weight.data.zero_()
    x = torch.randn(3, 4)
    small = compact(module)
    torch.testing.assert_close(small(x), module(x))
    assert small.net[-1].bias is not None


def test_compact_keeps_a_zero_weight_under_the_mask():
    module = nn.Sequential(SparseLinear(3, 2))
    nn.init.zeros_(module[0].weight)
    assert compact(module).kept_inputs.tolist() == [0, 1, 2]
    assert compact(densify_(module)).kept_inputs.numel() == 0


def test_compact_is_a_copy_that_trains_saves_and_compiles():
    module = random_stack(0, 0.2, bias=True)
    before = copy.deepcopy(module.state_dict())
    small = compact(module)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(5, 9)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    x = torch.randn(5, 9)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x))
    with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., 9\]"):
        small(torch.ones(8))


def test_compact_activation_before_the_first_layer_and_own_activation():
    class Sine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    module = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), Sine(), nn.Linear(6, 2))
    sparsify_(module, 0.15)
    with pytest.raises(TypeError, match="got Sine"):
        compact(module)
    x = torch.randn(5, 6)
    torch.testing.assert_close(compact(module, elementwise=(Sine,))(x), module(x))


def test_compact_errors():
    with pytest.raises(TypeError, match=r"must be an nn\.Sequential, got Linear"):
        compact(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must hold a linear layer"):
        compact(nn.Sequential(nn.Tanh()))
    for module in (nn.LayerNorm(2), nn.Softmax(-1), nn.PReLU(2), nn.Dropout()):
        with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
            compact(nn.Sequential(nn.Linear(2, 2), module, nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="matching widths"):
        compact(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2)))
