"""The table of dense gates: made of the stored rows, in its place in the README."""

import polars as pl
import pytest

from experiments.dense_gates import Gate, row, with_table


@pytest.fixture
def cells():
    return pl.DataFrame(
        {
            "algo": ["ppo", "ppo", "bc", "bc"],
            "return_final": [500.0, 470.0, 480.0, 480.0],
            "random_return": [20.0] * 4,
            "commit": ["abc"] * 4,
            "processor": ["a machine"] * 4,
        }
    )


def test_the_worst_seed_and_the_clones_share_decide(cells):
    found = row(Gate("CartPole-v1", 470.0), cells, 500.0)
    assert found == ("CartPole-v1", "485.0", "470.0", "470", "500.0", "480.0", "95.8%", "passed")
    assert row(Gate("CartPole-v1", 475.0), cells, 500.0)[-1] == "FAILED"
    assert row(Gate("CartPole-v1", 470.0), cells, 520.0)[-1] == "FAILED"


def test_the_table_stands_between_its_marks(cells):
    text = "before\n<!-- dense_gates:begin -->\nold\n<!-- dense_gates:end -->\nafter\n"
    rows = [row(Gate("CartPole-v1", 470.0), cells, 500.0)]
    found = with_table(text, rows, cells)
    assert found.startswith("before\n<!-- dense_gates:begin -->\n| environment | PPO |")
    assert found.endswith("Trained by commit abc on a machine.\n<!-- dense_gates:end -->\nafter\n")
    assert "old" not in found
    assert with_table(found, rows, cells) == found
    with pytest.raises(ValueError, match="the README must hold <!-- dense_gates:begin -->"):
        with_table("nothing", rows, cells)
