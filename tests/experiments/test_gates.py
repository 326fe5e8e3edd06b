"""Gates of trainers: a row per seed, in place of those of the same task."""

from dataclasses import replace

import polars as pl
import pytest

from experiments import gates
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.sac import SAC
from sparse_tickets.sweep.protocols import protocol


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
    fresh = ["dqn", "CartPole-v1", "--first-seed", "4", "--seeds", "2", "--loss"]
    assert gates.main([*fresh, "huber"]) == 0
    assert gates.main([*fresh, "squared"]) == 0
    rows = pl.read_parquet(gates.RESULTS)
    assert rows["algo"].to_list() == ["dqn"] * 4 + ["sac"] * 5 + ["dqn"] * 4
    assert rows["seed"].to_list() == [*range(4), *range(5), 4, 5, 4, 5]
    assert rows["loss"].to_list() == ["huber"] * 4 + [None] * 5 + ["huber"] * 2 + ["squared"] * 2
    assert rows.filter(seed=5)["return_final"].n_unique() == 2
    assert (rows.filter(algo="sac")["return_final"] < -200).all()
    assert not rows["commit"].is_null().any()


def test_what_has_no_gate_is_refused(capsys):
    with pytest.raises(SystemExit):
        gates.main(["td3"])
    assert "invalid choice: 'td3'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"among Hopper-v5, .*Maze-v0, got Pendulum-v1"):
        gates.main(["ppo", "Pendulum-v1"])
    with pytest.raises(ValueError, match="loss is for dqn alone, got squared for sac"):
        gates.main(["sac", "--loss", "squared"])
