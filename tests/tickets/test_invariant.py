"""Pruned weights are zero, whoever writes to them."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import (
    OPTIMIZERS,
    PATHS,
    assert_zero_off_mask,
    dense_twin,
    pruned_layer,
    train,
    written_meanwhile,
)
from torch import nn

import sparse_tickets.kernels.linear.layer as implementation
from sparse_tickets import hooks
from sparse_tickets.kernels.policy import layout
from sparse_tickets.linear import SparseLinear

pytestmark = pytest.mark.usefixtures("looks")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_invariant_under_optimizer(name):
    """Pruning in the middle leaves moments and gradients that would move pruned weights."""
    torch.manual_seed(0)
    layer = SparseLinear(6, 5)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for density in (1.0, 0.6, 0.2, 0.0):
        layer.prune_(density)
        assert_zero_off_mask(layer, optimizer)
        for _ in range(3):
            train(layer, optimizer, steps=1)
            assert_zero_off_mask(layer, optimizer)


def test_matches_masked_dense_training():
    """Kept weights train as if the others did not exist."""
    layer = pruned_layer().double()
    twin = dense_twin(layer).double()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "mask"})
    twin.weight.register_hook(lambda g: g * layer.mask)
    ours = torch.optim.Adam(layer.parameters(), lr=0.1)
    theirs = torch.optim.Adam(twin.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randn(7, 6, dtype=torch.float64)
        for module, optimizer in ((layer, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight)
    torch.testing.assert_close(layer.bias, twin.bias)


def test_two_layers_on_one_weight_are_zero_off_both_masks():
    dense = nn.Linear(6, 5)
    a = SparseLinear.from_linear(dense, torch.rand(5, 6) < 0.5)
    b = SparseLinear.from_linear(dense, torch.rand(5, 6) < 0.5)
    optimizer = torch.optim.AdamW(dense.parameters(), weight_decay=0.5)
    optimizer.zero_grad()
    (a(torch.ones(6)) + b(torch.ones(6))).sum().backward()
    optimizer.step()
    assert not dense.weight[~(a.mask & b.mask)].any()


def test_hook_learns_a_mask_that_the_user_wrote():
    layer = pruned_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    train(layer, optimizer)
    layer.mask[0] = False
    train(layer, optimizer, steps=1)
    assert_zero_off_mask(layer, optimizer)


MOVES = {
    "nothing": lambda layer, optimizer: None,
    "weight": lambda layer, optimizer: setattr(layer.weight, "data", layer.weight.detach().clone()),
    "weight turned": lambda layer, optimizer: setattr(
        layer.weight, "data", layer.weight.detach().t().contiguous().t()
    ),
    "Parameter": lambda layer, optimizer: (
        setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        optimizer.add_param_group({"params": [layer.weight]}),
    ),
    "mask": lambda layer, optimizer: setattr(layer, "mask", layer.mask.clone()),
    "mask's data": lambda layer, optimizer: setattr(layer.mask, "data", layer.mask.clone()),
    "state": lambda layer, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "dtype": lambda layer, optimizer: layer.double().float(),
}


@pytest.mark.parametrize("name", MOVES)
def test_hook_sees_what_moved_since_the_last_step(name):
    layer = pruned_layer()
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer)
    MOVES[name](layer, optimizer)
    layer.mask.data[:2] = False
    train(layer, optimizer)
    # Momentum of what the mask no longer keeps, and what somebody wrote.
    optimizer.state[layer.weight]["exp_avg"].fill_(1.0)
    layer.weight.data.fill_(1.0)
    optimizer.step()
    assert_zero_off_mask(layer, optimizer)


def test_weight_of_a_layer_that_is_gone_is_free():
    layer = pruned_layer()
    weight = layer.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    train(layer, optimizer)
    del layer
    gc.collect()
    weight.data.fill_(1.0)
    optimizer.step()
    assert weight.all()


def test_hook_leaves_other_parameters_and_optimizers_alone():
    layer = pruned_layer()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = layer.weight._version
    other(torch.ones(3)).sum().backward()
    optimizer.step()
    assert layer.weight._version == before
    assert optimizer not in hooks.stepped_optimizers()


def test_layers_and_optimizers_are_not_kept_alive():
    layer = pruned_layer()
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer, steps=1)
    references = weakref.ref(layer), weakref.ref(optimizer)
    del layer, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_one_hook_for_all_layers():
    from torch.optim.optimizer import _global_optimizer_post_hooks as registered

    SparseLinear(2, 2), SparseLinear(2, 2), copy.deepcopy(SparseLinear(2, 2))
    assert list(registered.values()).count(hooks._after_any_step) == 1


def test_zero_even_where_the_pruned_entry_is_not_finite():
    layer = pruned_layer()
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    layer.apply_mask_()
    assert not layer.weight[~layer.mask].any()


WRITERS = {
    "state_dict": lambda layer: layer.state_dict(),
    "apply_mask_": lambda layer: layer.apply_mask_(),
    "prune_": lambda layer: layer.prune_(0.3),
    "set_mask_": lambda layer: layer.set_mask_(layer.mask.clone()),
    "load_state_dict": lambda layer: layer.load_state_dict(
        nn.Linear(6, 5).state_dict(), strict=False
    ),
    "from_linear": SparseLinear.from_linear,
}


READERS = {
    "density": lambda layer: layer.density,
    "sparsity": lambda layer: layer.sparsity,
    "plan": lambda layer: layer.plan(batch=4),
    "forward": lambda layer: layer(torch.ones(3, 6)),
    "repr": repr,
}


@pytest.mark.parametrize("name", WRITERS)
def test_public_calls_after_reinitialisation(name):
    layer = pruned_layer()
    nn.init.orthogonal_(layer.weight)
    WRITERS[name](layer)
    assert_zero_off_mask(layer)
    layer.weight.data.normal_()
    WRITERS[name](layer)
    assert_zero_off_mask(layer)


@pytest.mark.parametrize("name", READERS)
def test_reading_writes_nothing(name):
    layer = pruned_layer()
    layer.weight.data.normal_()
    before, version = layer.weight.detach().clone(), layer.weight._version
    READERS[name](layer)
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version


def test_forward_after_reinitialisation_is_right_and_does_not_write():
    layer = pruned_layer()
    x = torch.randn(3, 6)
    nn.init.orthogonal_(layer.weight)
    weight = layer.weight.detach().clone()
    version = layer.weight._version
    first, second = layer(x), layer(2 * x)
    torch.testing.assert_close(first, F.linear(x, weight * layer.mask, layer.bias))
    assert layer.weight._version == version
    assert torch.equal(layer.weight, weight)
    (first + second).sum().backward()
    assert not layer.weight.grad[~layer.mask].any()


@pytest.mark.parametrize("how", ["assign data", "replace", "user writes mask", "to"])
def test_forward_notices(how):
    layer = pruned_layer()
    x = torch.randn(3, 6)
    if how == "assign data":
        layer.weight.data = torch.randn(5, 6)
    elif how == "replace":
        layer.weight = nn.Parameter(torch.randn(5, 6))
    elif how == "user writes mask":
        layer.mask.logical_and_(torch.rand(5, 6) < 0.5)
    else:
        layer, x = layer.double(), x.double()
        layer.weight.data.add_(0)
    want = F.linear(x, layer.weight * layer.mask, layer.bias)
    torch.testing.assert_close(layer(x), want)


def test_clean_forward_takes_the_weight_itself(monkeypatch):
    """In a training loop no masked copy is made, by whatever way."""
    copies = []
    monkeypatch.setattr(implementation, "keep", lambda *addresses: copies.append(addresses))
    for inputs, outputs, density in PATHS.values():
        for most in (layout._LONE_DENSE, 0):
            monkeypatch.setattr(layout, "_LONE_DENSE", most)
            layer = SparseLinear(inputs, outputs).prune_(density)
            optimizer = torch.optim.Adam(layer.parameters())
            for _ in range(3):
                layer(torch.randn(32, inputs)).sum().backward()
                optimizer.step()
    assert not copies


def copy_t(layer):
    layer.weight.data = layer.weight.data.t()


def recycle(layer):
    """New data, at the very address of the old."""
    at, kept = layer.weight.data_ptr(), layer.weight.data
    new = torch.empty(0).set_(kept.untyped_storage(), 0, kept.shape).normal_()
    layer.weight.data = new
    assert layer.weight.data_ptr() == at


UNANNOUNCED = {
    "polyak": lambda layer: torch.add(
        layer.weight.data, torch.randn(40, 40), out=layer.weight.data
    ),
    "hard copy": lambda layer: layer.weight.data.copy_(torch.randn(40, 40)),
    "init": lambda layer: nn.init.orthogonal_(layer.weight.data),
    "assign": lambda layer: setattr(layer.weight, "data", torch.randn(40, 40)),
    "recycled": recycle,
    "transposed": copy_t,
    "numpy": lambda layer: layer.weight.detach().numpy().fill(0.5),
    "mask through data": lambda layer: layer.mask.data.copy_(torch.rand(40, 40) < 0.5),
    "mask by numpy": lambda layer: layer.mask.numpy().fill(True),
    "not a number": lambda layer: layer.weight.data.masked_fill_(~layer.mask, float("nan")),
    "cast and back": lambda layer: layer.double().float().weight.data.normal_(),
}


@pytest.mark.parametrize("way", ["torch's product", "one call"])
@pytest.mark.parametrize("write", UNANNOUNCED)
def test_a_write_that_nobody_announces(write, way, monkeypatch):
    if way == "torch's product":
        monkeypatch.setattr(layout, "DENSE_FROM", -1)
        monkeypatch.setattr(layout, "_LONE_DENSE", 0)
    torch.manual_seed(0)
    layer = SparseLinear(40, 40).prune_(0.2)
    assert way in layer.plan(batch=8).reason
    for after in (UNANNOUNCED[write], SparseLinear.apply_mask_):
        for batch in (1, 8, 64):
            layer(torch.randn(batch, 40))
        with torch.no_grad():
            layer(torch.randn(1, 40))
        after(layer)
        weight = layer.weight.detach().masked_fill(~layer.mask, 0).requires_grad_()
        for batch in (1, 8, 64):
            x = torch.randn(batch, 40, requires_grad=True)
            expected = F.linear(x, weight, layer.bias)
            output = layer(x)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
            ours = torch.autograd.grad(output.sum(), (x, layer.weight))
            dx, dw = torch.autograd.grad(expected.sum(), (x, weight))
            torch.testing.assert_close(ours[0], dx, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ours[1], dw * layer.mask, atol=1e-5, rtol=1e-4)


def test_a_mask_written_by_another_thread():
    """Each product is of some mask; before, the interpreter crashed."""
    layer = SparseLinear(64, 64)
    with written_meanwhile(layer.mask), torch.no_grad():
        for batch in (1, 16, 64) * 60:
            assert layer(torch.randn(batch, 64)).isfinite().all()
