"""The benchmark of PPO on slow simulators: its table, and what it refuses."""

import pytest
from rich.console import Console

from benchmarks import simulators


def test_ratios_are_of_the_same_round_and_of_the_fastest_simulator():
    rates = {
        "ours, this process": [20.0, 30.0, 60.0],
        "ours, 2 workers": [40.0, 60.0, 80.0],
        "simulator, one process": [50.0, 50.0, 50.0],
        "simulator, 2 processes": [80.0, 100.0, 100.0],
        "SB3, one agent": [10.0, 10.0, 20.0],
        "ours on envpool, 2 threads": [60.0, 80.0, 100.0],
        "envpool, 2 threads": [120.0, 100.0, 200.0],
    }
    record = {"task": {"env": "Hopper-v5"}, "tickets": 16, "rates": rates, "busy": 0.2}
    lines = simulators.table([record]).splitlines()
    assert lines[3] == (
        "| Hopper-v5 | ours, 2 workers, 16 tickets | ~60 | 4.00x (4.00-6.00) | 0.60x (0.50-0.80) |"
    )
    assert lines[5] == "| Hopper-v5 | simulator, 2 processes | ~100 |  |  |"
    assert lines[6] == "| Hopper-v5 | SB3, one agent | ~10 |  | 0.12x (0.10-0.20) |"
    assert lines[7] == (
        "| Hopper-v5 | ours on envpool, 2 threads, 16 tickets | ~80 | 6.00x (5.00-8.00) "
        "| 0.50x (0.50-0.80) |"
    )
    assert lines[8] == "| Hopper-v5 | envpool, 2 threads | ~120 |  |  |"


def test_minibatches_have_sixty_four_samples_and_unknown_tasks_are_refused(tmp_path):
    for task in simulators.TASKS:
        assert task.settings.batch == 64 * task.settings.minibatches
    with pytest.raises(
        ValueError,
        match="only must be part of one of Hopper-v5; LunarLander-v3; CartPole-v1, got 'Walker'",
    ):
        simulators.run_simulators(Console(), 1, "Walker", tmp_path / "found.json")
