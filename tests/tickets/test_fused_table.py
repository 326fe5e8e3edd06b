"""What a fused optimiser found out about its tensors, and when it has to find out anew."""

import pytest
import torch
from sparse_layers import pruned_layer, train
from torch import nn

from sparse_tickets import optim
from sparse_tickets.kernels.policy import native


def test_a_table_made_before_there_is_cpp_is_made_again(monkeypatch):
    native.start()
    assert native.module is not None, native.status()
    module, layer = native.module, pruned_layer()
    optimizer = optim.Adam(layer.parameters())
    monkeypatch.setattr(native, "module", None)
    train(layer, optimizer)
    assert optimizer._table.compiled is None
    monkeypatch.setattr(native, "module", module)
    train(layer, optimizer)
    assert optimizer._table.compiled is not None


CHANGES = {
    "gone": lambda state, p: state.pop(p),
    "more of a parameter": lambda state, p: state[p].update(more=torch.zeros(3)),
    "another": lambda state, p: state[p].update(exp_avg=state[p]["exp_avg"].clone()),
    "of one more": lambda state, p: state.update({nn.Parameter(torch.zeros(1)): {"step": p}}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("looks")
def test_state_that_came_or_went_is_seen(change):
    layer = pruned_layer()
    optimizer = optim.Adam(layer.parameters())
    train(layer, optimizer)
    assert optimizer._table.is_valid(optimizer)
    CHANGES[change](optimizer.state, layer.weight)
    assert not optimizer._table.is_valid(optimizer)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("what", ["lr", "betas", "maximize"])
def test_a_number_that_changed_is_taken_up(what):
    ours, theirs = pruned_layer(), pruned_layer()
    mine = optim.Adam(ours.parameters(), lr=0.01)
    peer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for value in ({"lr": 0.02, "betas": (0.5, 0.6), "maximize": True}[what], None):
        for layer, optimizer in ((ours, mine), (theirs, peer)):
            torch.manual_seed(1)
            train(layer, optimizer)
            if value is not None:
                optimizer.param_groups[0][what] = value
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=1e-4)
