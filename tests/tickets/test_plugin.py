"""What docs/extending.md shows works as printed: each file through a tiny sweep and its report."""

import re
import sys
from pathlib import Path

import pytest
import torch

from sparse_tickets.algos import bc
from sparse_tickets.algos.registry import ALGORITHMS, find_algorithm, register_algorithm
from sparse_tickets.analysis.figures import return_figure
from sparse_tickets.cli import main
from sparse_tickets.conditions import CONDITIONS
from sparse_tickets.envs import env_spec
from sparse_tickets.envs.registry import _registry
from sparse_tickets.prune import CRITERIA
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results, spec_hash

pytestmark = pytest.mark.usefixtures("undrawn")

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
SMALL = ["--seeds", "1", "--levels", "3", "--hidden", "8"]
SHORT = ["--ppo.steps", "256", "--ppo.horizon", "32", "--evaluation.points", "1"]
FEW = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "3"]
TINY = ["--algos", "ppo", *SMALL, *SHORT, *FEW]


@pytest.fixture(autouse=True)
def _registries():
    """Plugins register for good: take back what a test registered."""
    registries = (ALGORITHMS, CONDITIONS, CRITERIA, _registry)
    copies, modules = [dict(registry) for registry in registries], set(sys.modules)
    yield
    for registry, copied in zip(registries, copies, strict=True):
        registry.clear()
        registry.update(copied)
    for name in set(sys.modules) - modules:
        if name.endswith(".py"):
            del sys.modules[name]


def sweep(name, tmp_path, *options):
    """Run the doc's file, with the options the doc's command line gives, at a tiny budget."""
    file = tmp_path / name
    file.write_text(FILES[name])
    command = re.search(rf"sparse-tickets sweep --plugin {name} (.*) --out", TEXT)[1].split()
    out = tmp_path / "run"
    arguments = ["sweep", "--plugin", str(file), *command, *TINY, *options, "--out", str(out)]
    assert main(arguments) == 0
    return out, file


def test_every_example_is_at_most_twenty_lines():
    assert sorted(FILES) == ["large_same_sign.py", "mask_sign.py", "slow_ppo.py", "stay.py"]
    assert TEXT.count("```python") == len(FILES)
    for name, text in FILES.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) <= 20, name


@pytest.mark.long
def test_an_environment_of_ones_own(tmp_path):
    out, file = sweep(
        "stay.py", tmp_path, "--algos", "ppo", "bc", "--bc.experts", "1", "--bc.expert-gate", "0"
    )
    results = load_results(out)
    assert set(results["env"]) == {"Stay"}
    assert set(results["algo"]) == {"ppo", "bc"}
    spec = env_spec("Stay")
    assert 2 < spec.random_return < 15
    assert set(results["random_return"]) == {spec.random_return}
    assert results["return_final"].is_between(0, 20).all()
    assert Store(out).spec["observations"] == {
        "offset": list(spec.offset),
        "scale": list(spec.scale),
    }
    assert main(["verify", str(out), "--cells", "1", "--plugin", str(file)]) == 0


@pytest.mark.long
def test_a_criterion_of_ones_own(tmp_path):
    out, _ = sweep("large_same_sign.py", tmp_path)
    tickets = {
        (ticket.condition, ticket.level): ticket
        for unit in Store(out).units()
        for ticket in Store(out).read_tickets(unit)
    }
    dense, ticket = tickets["dense", 0], tickets["mask/weights", 1]
    final, initial = (row[: len(ticket.mask)] for row in (dense.final, dense.initial))
    scores = final.abs() * (final * initial).sign()
    assert scores[ticket.mask].min() >= scores[~ticket.mask].max()


@pytest.mark.long
def test_a_condition_of_ones_own(tmp_path, capsys):
    out, file = sweep("mask_sign.py", tmp_path)
    capsys.readouterr()
    assert main(["report", str(out), "--plugin", str(file)]) == 0
    assert "mask/sign" in capsys.readouterr().out
    store = Store(out)
    tickets = [t for unit in store.units() for t in store.read_tickets(unit)]
    signed = [ticket for ticket in tickets if ticket.condition == "mask/sign"]
    assert [ticket.level for ticket in signed] == [1, 2]
    for ticket in signed:
        net = ticket.arena.actor
        for layer in range(net.depth):
            weight = net.weight(ticket.rewind[None], layer)
            initial = net.weight(ticket.initial[None], layer)
            torch.testing.assert_close(weight, initial.sign() / net.sizes[layer] ** 0.5)


@pytest.mark.long
def test_an_algorithm_of_ones_own(tmp_path, capsys):
    plain = spec_hash(Sweep().to_dict())
    options = ["--algos", "ppo", "slow_ppo", "--settings.slow-ppo.share", "0", "--levels", "2"]
    out, file = sweep("slow_ppo.py", tmp_path, *options)
    assert spec_hash(Sweep().to_dict()) == plain  # which does not train it
    store = Store(out)
    assert store.spec["settings"] == {"slow_ppo": {"share": 0.0}}
    assert Sweep.from_dict(store.spec).to_dict() == store.spec
    moved = {"ppo": [], "slow_ppo": []}
    for unit in store.units():
        for ticket in store.read_tickets(unit):
            moved[unit.algo].append(not torch.equal(ticket.final, ticket.rewind))
    assert all(moved["ppo"])
    assert len(moved["slow_ppo"]) == len(moved["ppo"])
    assert not any(moved["slow_ppo"])
    titles = [panel.get_title(loc="left") for panel in return_figure(load_results(out)).axes]
    assert titles == ["PPO", "slow PPO"]
    again = ["sweep", "--plugin", str(file), *TINY, *options, "--out", str(out)]
    assert main([*again, "--dry-run"]) == 0
    assert "slow_ppo" in capsys.readouterr().out
    before = load_results(out)
    assert main(again) == 0
    assert load_results(out).equals(before)
    assert main(["verify", str(out), "--cells", "4", "--plugin", str(file)]) == 0


class _CloningAgain:
    """Cloning under another name: what a sweep does for one algorithm that imitates, it does."""

    name, title, settings, has_critic, imitates = "again", "again", bc.BC, False, True
    train, iteration, plan = bc.ALGORITHM.train, bc.ALGORITHM.iteration, bc.ALGORITHM.plan


def test_an_imitating_algorithm_of_ones_own_shares_the_demonstrations(tmp_path):
    register_algorithm(_CloningAgain())
    out = tmp_path / "run"
    few = ["--algos", "bc", "again", "--levels", "1", "--bc.experts", "1", "--bc.expert-gate", "0"]
    arguments = ["sweep", *TINY, *few, "--out", str(out)]
    assert main(arguments) == 0
    store = Store(out)
    inputs = [store.inputs(unit) for unit in store.units()]
    assert [unit.algo for unit in store.units()] == ["again", "bc"]
    assert inputs[0] == inputs[1]
    assert list(inputs[0]) == ["demonstrations"]
    with pytest.raises(ValueError, match="given to train by behavioural cloning, got None"):
        find_algorithm("again").train(None, None, "", None, None, None, {})


def test_an_algorithm_is_new_known_and_has_settings_of_its_kind():
    with pytest.raises(ValueError, match="name must be new, got 'again'; registered: ppo, dqn, s"):
        register_algorithm(_CloningAgain()) and register_algorithm(_CloningAgain())
    with pytest.raises(ValueError, match="algorithm must be one of ppo, dqn, sac, bc, again, g"):
        find_algorithm("td3")
    with pytest.raises(ValueError, match=r"of your own algorithms \(again\), got 'td3'"):
        Sweep(settings={"td3": None})
    with pytest.raises(TypeError, match=r"settings\['again'\] must be a BC, got 3"):
        Sweep(settings={"again": 3})


def test_a_run_needs_its_plugin(tmp_path, capsys):
    out, _ = sweep("mask_sign.py", tmp_path, "--levels", "2")
    del CONDITIONS["mask/sign"]
    assert main(["report", str(out)]) == 2
    assert "condition must be one of" in capsys.readouterr().err


def test_plugins_of_one_name_in_two_folders_are_both_loaded(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        text = f"register_criterion('from-{folder}')(lambda weight, initial, arena: weight)"
        text = f"from sparse_tickets import register_criterion\n{text}\n"
        (tmp_path / folder / "mine.py").write_text(text)
    files = [str(tmp_path / folder / "mine.py") for folder in "ab"]
    assert main(["report", str(tmp_path), "--plugin", *files]) == 1  # there is no run
    assert {"from-a", "from-b"} <= set(CRITERIA)


def test_a_broken_plugin_shows_where(tmp_path, capsys):
    missing = tmp_path / "missing.py"
    assert main(["report", str(tmp_path), "--plugin", str(missing)]) == 2
    assert f"--plugin must be a Python file, got {missing}" in capsys.readouterr().err
    file = tmp_path / "broken.py"
    for text, said in (
        ("\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("\ndef f(:\n", "SyntaxError: invalid syntax"),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", "RuntimeError: inconsistent tensor"),
        ("\nraise ValueError('no [bold] colour')\n", "error: no [bold] colour"),
    ):
        file.write_text(text)
        assert main(["report", str(tmp_path), "--plugin", str(file)]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert f"({file}, line 2)" in error
        assert error.count("\n") == 1
    file.write_text("from sparse_tickets import register_criterion\n")
    assert main(["report", str(tmp_path), "--plugin", str(file)]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_a_plugin_that_fails_in_a_sweep_shows_where(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sparse_tickets import register_criterion\n"
        "@register_criterion('broken')\n"
        "def broken(weight, initial, arena):\n"
        "    return {}['scores']\n"
    )
    options = ["--plugin", str(file), *TINY, "--algos", "ppo", "--criterion", "broken"]
    assert main(["sweep", *options, "--out", str(tmp_path / "run")]) == 1
    assert f"error: KeyError: 'scores' ({file}, line 4)" in capsys.readouterr().err
