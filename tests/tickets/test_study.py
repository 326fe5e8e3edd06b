"""Studies: one file, several sweeps, validated as a whole, one report."""

import polars as pl
import pytest

from sparse_tickets.cli import main
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.store import load_results
from sparse_tickets.sweep.study import load_study

STUDY = """
seeds = 2
levels = 2
algos = ["ppo"]
conditions = ["mask/weights"]
ppo = {steps = 256, horizon = 16}
evaluation = {points = 1, episodes = 1, final_episodes = 2}

[[sweep]]
name = "pole"
env = "CartPole-v1"
hidden = [4]

[[sweep]]
name = "swing"
env = "Acrobot-v1"
hidden = [4]
ppo.learning_rate = 1e-4

[[sweep]]
name = "wide"
[sweep.grid]
hidden = [[8], [8, 4]]
criterion = ["magnitude", "movement"]
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def test_settings_of_one_before_those_of_all_before_the_protocol(file):
    study = load_study(file(STUDY))
    assert list(study) == [
        "pole",
        "swing",
        "wide-hidden-8-criterion-magnitude",
        "wide-hidden-8-criterion-movement",
        "wide-hidden-8x4-criterion-magnitude",
        "wide-hidden-8x4-criterion-movement",
    ]
    swing = study["swing"]
    assert (swing.env, swing.seeds, swing.hidden) == ("Acrobot-v1", 2, (4,))
    assert swing.ppo.learning_rate == 1e-4
    assert swing.ppo.steps == 256
    assert swing.ppo.gamma == protocol("Acrobot-v1").ppo.gamma
    assert study["wide-hidden-8x4-criterion-movement"].hidden == (8, 4)
    assert study["wide-hidden-8-criterion-movement"].criterion == "movement"


def test_every_problem_is_named_and_nothing_is_written(file, tmp_path, capsys):
    path = file(
        """
        [[sweep]]
        name = "a"
        env = "CartPool-v1"
        [[sweep]]
        name = "b"
        ppo.learning = 1
        [[sweep]]
        name = "../c"
        [[sweep]]
        name = "d"
        seeds = 2.5
        [[sweep]]
        name = "e"
        grid.hidden = 3
        [[sweep]]
        name = "f"
        evaluation = 3
        [[sweep]]
        name = "g"
        [[sweep]]
        name = "g"
        [[sweep]]
        name = "h"
        env = 1
        """
    )
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for said in (
        "sweep a: env must be one of",
        "sweep b: ppo.learning is no setting, there are: steps",
        "sweep 3: name must be letters",
        "sweep d: seeds must be",
        "sweep e: grid.hidden must be a list of values, got 3",
        "sweep f: evaluation must be a table of settings, got 3",
        "sweep g: there are two of this name",
        "sweep h: env must be a string, got 1",
    ):
        assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[sweep]", "sweep = 3", "sweep = []", "= 3", "\x00", f"x = {'[' * 100_000}"]
)
def test_what_is_no_study(text, file, tmp_path, capsys):
    assert main(["study", str(file(text)), "--out", str(tmp_path / "out")]) == 2
    assert "study.toml" in capsys.readouterr().err
    assert main(["study", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "study must be a TOML file" in capsys.readouterr().err


def test_a_dry_run_adds_up(file, tmp_path, capsys):
    assert main(["study", str(file(STUDY)), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if "│" in line
    }
    assert cells["pole"] == "4"
    assert cells["in all"] == "24"
    assert not (tmp_path / "out").exists()


def test_one_report_over_all_and_the_same_again(file, tmp_path, capsys):
    out = tmp_path / "out"
    short = STUDY.partition('[[sweep]]\nname = "wide"')[0]
    path = file(short + '[[sweep]]\nname = "other"\nhidden = [5]\n')
    assert main(["study", str(path), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in ("pole", "swing", "other"))
    frame = pl.read_parquet(out / "results.parquet")
    assert frame["sweep"].unique().sort().to_list() == ["other", "pole", "swing"]
    for name in ("pole", "swing", "other"):
        rows = frame.filter(sweep=name).drop("sweep")
        assert rows.select(load_results(out / name).columns).equals(load_results(out / name))
    assert "| pole |" in (out / "table.md").read_text()
    before = (out / "results.parquet").read_bytes()
    assert main(["study", str(path), "--out", str(out)]) == 0
    assert (out / "results.parquet").read_bytes() == before


def test_too_few_experts_of_one_sweep_do_not_stop_the_others(file, tmp_path, capsys):
    short = STUDY.partition('[[sweep]]\nname = "swing"')[0]
    lost = '[[sweep]]\nname = "lost"\nalgos = ["ppo", "bc"]\nhidden = [4]\n'
    path = file(lost.join(short.split('[[sweep]]\nname = "pole"')[:1]) + lost
                + "bc = {experts = 1, expert_gate = 1e9}\n"
                + '[[sweep]]\nname = "pole"\nhidden = [4]\n')  # fmt: skip
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "error: lost: " in said.err
    assert set(pl.read_parquet(tmp_path / "out" / "results.parquet")["sweep"]) == {"lost", "pole"}
