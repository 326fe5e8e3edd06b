"""A whole study on the Triton backend, in the interpreter: the reference's masks and weights."""

from __future__ import annotations

import pytest
import torch

from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store

SPEC = Sweep(
    algos=("ppo",),
    conditions=("mask/weights", "random/re-init"),
    seeds=1,
    levels=2,
    rate=0.4,
    hidden=(8, 8),
    ppo=PPO(steps=64, copies=2, horizon=8, epochs=1, minibatches=2),
    evaluation=Evaluation(points=1, episodes=1, final_episodes=1),
)


@pytest.mark.slow
def test_a_study_in_triton_is_the_reference_s(monkeypatch, tmp_path) -> None:
    pytest.importorskip("triton")
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("SPARSE_TICKETS_BACKEND", backend)
        run(SPEC, tmp_path / backend)
        store = Store(tmp_path / backend)
        found[backend] = [ticket for unit in store.units() for ticket in store.read_tickets(unit)]
    assert len(found["triton"]) == 3
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.initial, theirs.initial)
        torch.testing.assert_close(ours.final, theirs.final, rtol=1e-4, atol=1e-5)
