"""Layers, stores and sweeps that several files test."""

import shutil

import pytest
import torch
from converting import ActorCritic
from sparse_layers import PATHS
from stores import SPEC, fill
from sweeping import SPEC as SWEEP

from sparse_tickets.kernels.policy import native
from sparse_tickets.linear import SparseLinear
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.store import Store


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run", SPEC)


@pytest.fixture
def filled(store):
    fill(store)
    return store


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one uninterrupted run; tests must not write to it."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    run(SWEEP, out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(params=PATHS)
def layer(request) -> SparseLinear:
    torch.manual_seed(0)
    inputs, outputs, density = PATHS[request.param]
    return SparseLinear(inputs, outputs).prune_(density)


@pytest.fixture
def policy() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic()


@pytest.fixture
def acting() -> SparseLinear:
    """A frozen layer that has acted, in one call."""
    torch.manual_seed(0)
    layer = SparseLinear(48, 40, mask=torch.rand(40, 48) > 0.8).requires_grad_(False)
    layer(torch.randn(1, 48))
    assert layer._prepared._compiled is not None
    return layer


@pytest.fixture(params=["in C++", "in Python"])
def looks(request, monkeypatch):
    """What looks before a step whether all is as it was."""
    native.start()
    assert native.module is not None, native.status()
    if request.param == "in Python":
        monkeypatch.setattr(native, "module", None)
