"""Whatever is typed after `sparse-tickets`: an answer, or one line that says what is wrong."""

import itertools
import shutil

import pytest
from fuzzing import drawn
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from sparse_tickets.cli import main
from sparse_tickets.sweep import estimate
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.spec import Sweep

TINY = (
    *("--seeds", "1", "--levels", "2", "--hidden", "4", "--algos", "ppo"),
    *("--ppo.steps", "64", "--ppo.horizon", "16", "--evaluation.points", "1"),
    *("--evaluation.episodes", "1", "--evaluation.final-episodes", "1"),
)

numbers = st.sampled_from(
    ["0", "1", "-1", "2", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e-30", "1_0", "٣"]
)
words = st.sampled_from(
    [
        *("", " ", "x", "[/red]", "[bold", "\\", "\x1b[31m", "ä", "🎲", "%s", "{}", "-", "--"),
        *(
            "None",
            "True",
            "mask/weights",
            "random/re-init",
            "ppo",
            "bc",
            "own",
            "ticket",
            "..",
            "/",
        ),
        *("CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "magnitude", "global", "cpu", "cuda"),
        *("meta", "..", "/", "a" * 300),
    ]
)
values = numbers | words | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
FIELDS = [
    f"--{name}.{part}" if isinstance(value, dict) else f"--{name}"
    for name, value in Sweep().to_dict().items()
    for part in (value if isinstance(value, dict) else [None])
]
OPTIONS = {
    "sweep": [
        *(*FIELDS, "--device", "--plugin", "--overwrite", "--help"),
        *("--engine", "--address", "--gpus-per-chunk", "--track"),
    ],
    "report": ["--metric", "--plugin"],
    "show": ["--algo", "--condition", "--controls", "--seed", "--level", "--export", "--plugin"],
    "verify": ["--cells", "--plugin"],
    "bench": ["--width", "--batch", "--device", "--sparsities", "--threads"],
    "inspect": ["--op", "--arch", "--all", "--json"],
}


@st.composite
def arguments(draw, command):
    """Options with values, mostly."""
    typed = []
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), min_size=1, max_size=4)):
        option = option.replace("_", "-") if draw(st.booleans()) else option
        typed += [option, *draw(st.lists(values, max_size=2))]
    return typed


def answers(typed, capsys):
    """The exit status; what cannot be answered says so in words."""
    try:
        status = main(typed)
    except SystemExit as error:
        status = error.code
    out, error = capsys.readouterr()
    assert status in (0, 1, 2), typed
    assert "Traceback" not in out + error, typed
    if status:
        assert (out + error).strip(), typed
    return status


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "run"
    assert main(["sweep", *TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.long
@drawn(15)
@given(typed=arguments("sweep"))
def test_sweep(typed, capsys, monkeypatch, tmp_path):
    """Dry, without the estimate's pilot."""

    def sized(spec):
        return Table(title=f"{spec.cells} {total_steps(spec)}")

    monkeypatch.setattr(estimate, "estimate", sized)
    monkeypatch.chdir(tmp_path)
    answers(["sweep", "--dry-run", "--out", "run", *typed], capsys)
    assert not list(tmp_path.iterdir()), typed


SETTINGS = [*(field.removeprefix("--") for field in FIELDS), "name", "grid", "grid.seeds", "x", ""]
TOML = [
    *("1", "-1", "2.5", "nan", "inf", "true", "1979-05-27", "[]", "[1, 2]", "{}", "{a = 1}", "'"),
    *('""', '"x"', '"[/red]"', '"../x"', '"CartPole-v1"', '["ppo"]', '[["own"]]', "[" * 3000),
]
lines = st.sampled_from(["[[sweep]]", "[sweep]", "[sweep.grid]", "sweep = 3", "name = 'a'"]) | (
    st.builds("{} = {}".format, st.sampled_from(SETTINGS), st.sampled_from(TOML))
)


@drawn(15)
@given(text=st.lists(lines, max_size=6))
def test_study(text, capsys, monkeypatch, tmp_path):
    """Dry, without the estimate's pilot; mostly of sweeps that begin well."""
    monkeypatch.setattr(estimate, "estimate_study", lambda study: Table(title=f"{list(study)}"))
    file = tmp_path / "study.toml"
    for begin in ([], ["[[sweep]]", "name = 'b'"]):
        file.write_text("\n".join([*begin, *text]))
        answers(["study", str(file), "--dry-run", "--out", str(tmp_path / "run")], capsys)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.long
@pytest.mark.parametrize("command", ["report", "show", "verify"])
@drawn(4)
@given(data=st.data())
def test_commands_on_a_run(command, data, finished, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    shutil.copytree(finished, out, dirs_exist_ok=True)
    place = data.draw(st.sampled_from([str(out), "nowhere", "", "run/spec.json", "..", "[/red]"]))
    answers([command, place, *data.draw(arguments(command))], capsys)


@drawn(8)
@given(data=st.data())
def test_commands_that_are_none(data, capsys):
    """Or whose arguments are in the wrong place; nothing that would measure or compile is run."""
    typed = data.draw(st.lists(values, min_size=1, max_size=4))
    answers(typed, capsys)


@pytest.mark.parametrize("command", ["bench", "inspect"])
@drawn(5)
@given(data=st.data())
def test_measuring_commands(command, data, capsys, monkeypatch):
    """As far as their arguments: what they measure is tested elsewhere."""
    reached = itertools.count()

    def measure(*arguments, **settings):
        next(reached)
        raise ValueError("far enough")

    monkeypatch.setattr("sparse_tickets.bench.layer.bench_layer", measure)
    monkeypatch.setattr("sparse_tickets.bench.steps.bench_steps", measure)
    monkeypatch.setattr("sparse_tickets.inspect.inspect", measure)
    answers([command, *data.draw(arguments(command))], capsys)
