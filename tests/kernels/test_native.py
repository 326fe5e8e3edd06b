"""The node of autograd in C++: how it comes to be there, and what it does with memory."""

import gc
import re
import threading
import weakref

import pytest
import torch
from torch import nn

from sparse_tickets import sparsify_
from sparse_tickets.kernels.policy import native


def make() -> nn.Sequential:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 300))
    return sparsify_(policy, density=0.1)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process where nothing was asked for, with nothing compiled."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "_started", False)
    monkeypatch.setattr(native, "_status", "not asked for")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "compiler", "reason"),
    [
        ("off", "c++", "SPARSE_TICKETS_NATIVE is off"),
        ("wait", "no-such-compiler", "no-such-compiler failed, see .*log"),
        ("wait", "false", "false failed, see .*log"),
        ("wait", "true", "no compiled node of autograd"),
    ],
)
def test_python_steps_in(anew, monkeypatch, setting, compiler, reason):
    monkeypatch.setenv(native.SETTING, setting)
    monkeypatch.setenv("CXX", compiler)
    policy = make()
    policy(torch.ones(5, 4)).sum().backward()
    assert policy[0].weight.grad is not None
    assert native.module is None
    (plan,) = policy.plan(5)
    assert plan.backend == "cpu"
    assert re.search(f"in one call in Python: .*{reason}", plan.reason)


def test_a_source_that_changed_under_the_process_is_not_compiled(anew, monkeypatch):
    monkeypatch.setattr(native, "has_changed", lambda file: file.name == "steps.h")
    native.start()
    assert native.module is None
    assert native.status() == "in Python: its source has changed since this process began"


def test_unknown_setting(anew, monkeypatch):
    monkeypatch.setenv(native.SETTING, "always")
    with pytest.raises(ValueError, match="must be background, wait or off, got 'always'"):
        make()(torch.ones(5, 4))


@pytest.mark.slow
def test_compiled_in_the_background(anew, monkeypatch):
    monkeypatch.setenv(native.SETTING, "background")
    policy, x = make(), torch.ones(5, 4)
    before = policy(x)
    assert "being compiled" in native.status()
    for thread in threading.enumerate():
        if thread.name == native.THREAD:
            thread.join()
    assert native.status() == "in C++"
    assert policy(x).grad_fn.name() == "NetworkBackward" != before.grad_fn.name()
    assert torch.equal(policy(x), before)
    assert not list((anew / "native").glob("*.so.*"))


def test_large_gradients_use_the_memory_of_those_before():
    policy, x = make(), torch.ones(5, 4)

    def step() -> int:
        policy.zero_grad()
        policy(x).sum().backward()
        return policy[2].weight.grad.data_ptr()

    assert len({step() for _ in range(6)}) <= 2
    held = policy[2].weight.grad
    before = held.clone()
    policy.zero_grad()
    policy(3 * x).sum().backward()
    assert torch.equal(held, before)


def test_what_the_backward_pass_reads_outlives_the_policy():
    policy, dy = make(), torch.ones(5, 300)
    output, parameters = policy(torch.ones(5, 4)), list(policy.parameters())
    expected = torch.autograd.grad(output, parameters, dy, retain_graph=True)
    del policy
    gc.collect()
    found = torch.autograd.grad(output, parameters, dy)
    assert all(map(torch.equal, found, expected))


def test_a_policy_is_collected():
    policy = make()
    policy(torch.ones(5, 4)).sum().backward()
    weak = weakref.ref(policy[0])
    del policy
    gc.collect()
    assert weak() is None
