"""Gates of trainers: a row per seed, in place of those of the same task."""

import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.sac import SAC
from sparse_tickets.sweep.protocols import protocol

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from experiments import gates  # noqa: E402


def small(env):
    tiny = {"steps": 32, "copies": 2, "horizon": 8, "updates": 1, "minibatch": 8, "warmup": 8}
    return replace(protocol(env), hidden=(8,), dqn=DQN(**tiny), sac=SAC(**tiny))


@pytest.mark.long
def test_a_gate_holds_or_fails_for_each_seed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gates, "RESULTS", tmp_path / "gates.parquet")
    monkeypatch.setattr(gates, "protocol", small)
    monkeypatch.setitem(gates.GATES, "dqn", {"CartPole-v1": 0.0})
    assert gates.main(["dqn"]) == 0
    assert "5 of 5 reach 0" in capsys.readouterr().out
    for _ in range(2):
        assert gates.main(["sac", "Pendulum-v1"]) == 1
    rows = pl.read_parquet(gates.RESULTS)
    assert rows["algo"].to_list() == ["dqn"] * 5 + ["sac"] * 5
    assert rows["seed"].to_list() == [*range(5)] * 2
    assert (rows.filter(algo="sac")["return_final"] < -200).all()
    assert not rows["commit"].is_null().any()
    with pytest.raises(ValueError, match="algorithm must be one of dqn, sac, ppo, got"):
        gates.main(["td3"])
    with pytest.raises(ValueError, match="tasks must be among Pendulum-v1, got Hopper-v5"):
        gates.main(["sac", "Hopper-v5"])
