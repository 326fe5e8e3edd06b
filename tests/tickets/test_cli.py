"""The command line: help, errors, dry runs, reports on what is there, export, interruption."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib import metadata

import pytest
import torch
from rich.console import Console

from sparse_tickets import cli
from sparse_tickets.algos import evaluation
from sparse_tickets.analysis.report import stamp
from sparse_tickets.cli import main
from sparse_tickets.provenance import processor
from sparse_tickets.sweep import progress
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results

BUDGET = ["--ppo.steps", "512", "--ppo.horizon", "32", "--evaluation.points", "2"]
FEW = ["--evaluation.episodes", "3", "--evaluation.final-episodes", "4"]
STUDENTS = ["--bc.experts", "1", "--bc.expert-gate", "0"]
TINY = ["--seeds", "2", "--levels", "3", "--hidden", "8", "8", *BUDGET, *FEW, *STUDENTS]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests must not change its units."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["sweep", *TINY, "--out", str(out)]) == 0
    return out


def installed():
    return os.path.join(os.path.dirname(sys.executable), "sparse-tickets")


def helped(command, capsys, monkeypatch, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_help_wraps_and_explains_every_option(command, capsys, monkeypatch):
    text = helped(command, capsys, monkeypatch)
    assert text.startswith(f"usage: sparse-tickets {command}")
    assert max(map(len, text.splitlines())) <= 80
    # Every box entry says something before its default.
    for option in re.findall(r"│ +(--[a-z.-]+)", text):
        after = re.sub(r"[│\s]+", " ", text.split(f" {option} ", 1)[1]).strip()
        assert re.match(r"(\S+ )*?[A-Za-z]{3,}", after), option
    assert "--no-dry-run" not in text
    # Below 80 columns it still wraps.
    narrow = helped(command, capsys, monkeypatch, width=60)
    assert sum(len(line) > 60 for line in narrow.splitlines()) <= 3


def test_help_of_sweep_has_every_field_and_the_environments_own_defaults(capsys, monkeypatch):
    text = helped("sweep", capsys, monkeypatch, width=100)
    options = ["--out", "--dry-run", "--overwrite", "--plugin", "--device"]
    for name, value in Sweep().to_dict().items():
        if name == "observations":
            continue
        fields = [f"{name}.{part}" for part in value] if isinstance(value, dict) else [name]
        options += [f"--{field.replace('_', '-')}" for field in fields]
    options[options.index("--ppo.clip-value")] = "--ppo.no-clip-value"
    assert not [option for option in options if f" {option} " not in text.replace("\n", " ")]
    assert "(default: 500000)" in text
    with pytest.raises(SystemExit):
        main(["sweep", "--env", "Pendulum-v1", "--help"])
    assert "(default: 400000)" in capsys.readouterr().out


def test_without_a_command_all_commands_are_listed(capsys):
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in ("sweep", "report", "show", "verify"))


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert "no command 'train', there are: sweep, report, show, transfer, verify" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "CartPool-v1"], "env must be one of Acrobot-v1, CartPole-v1, "),
        (["--conditions", "mask/weihgts"], "condition must be one of mask/weights"),
        (["--algos", "td3"], "algos must be among ppo, dqn, sac, bc"),
        (["--criterion", "size"], "criterion must be one of 1:4, 2:4, fan-in"),
        (["--rate", "1.5"], "rate must be in (0, 1), got 1.5"),
        (["--rate", "nan"], "rate must be finite, got nan"),
        (["--seeds", "-1"], "seeds must be in [1, 1,000,000], got -1"),
        (["--seeds", "2.5"], "invalid literal for int"),
        (["--ppo.learning-rate", "nan"], "ppo.learning_rate must be finite, got nan"),
        (["--evaluation.points", "0"], "evaluation.points must be in [1, 100,000], got 0"),
        (["--device", "cuda:99"], "device must be one torch has here"),
        (["--plugin", "nowhere.py"], "--plugin must be a Python file, got nowhere.py"),
    ],
)
def test_wrong_settings_are_one_line_and_write_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    try:
        status = main(["sweep", *arguments, "--out", str(out)])
    except SystemExit as exit_:  # tyro refuses what the dataclass refuses in its own box
        status = exit_.code
    assert status == 2
    shown = re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))
    assert message in shown
    assert "Traceback" not in shown
    assert not out.exists()


def test_a_dry_run_says_cells_time_and_disk_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["sweep", *TINY, "--dry-run", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in ("cells", "agent-steps", "training", "evaluation", "disk", "ppo", "bc", "in all"):
        assert word in text
    # 2 dense, then 2 levels of 4 conditions for 2 seeds; for each of two algorithms.
    assert re.search(r"in all +│? +36 ", text)
    assert re.search(r"\d+:\d\d:\d\d", text)
    assert re.search(r"[\d.]+ MB", text)
    assert not out.exists()


@pytest.mark.parametrize("env", ["CartPole-v1", "FrozenLake-v1"])
def test_a_dry_run_plays_no_evaluation_and_does_not_grow_with_the_budget(env, capsys, monkeypatch):
    """The answer for a study of a century comes as fast as that for a minute's, numbers whole."""

    def played(*args, **settings):
        raise AssertionError("a dry run must not evaluate")

    monkeypatch.setattr(evaluation, "evaluate", played)
    size = ["--levels", "100000", "--seeds", "3", "--hidden", "8", "--ppo.horizon", "2048"]
    size += ["--ppo.steps", "900000", "--evaluation.points", "100"]
    begin = time.process_time()
    assert main(["sweep", "--env", env, "--algos", "ppo", *size, "--dry-run", "--out", "x"]) == 0
    # Kernels compile within; it was 18 minutes.
    assert time.process_time() - begin < 60
    text = capsys.readouterr().out
    # 3 dense, then 99,999 levels of 4 conditions for 3 seeds, each of 109 iterations.
    cells = 3 + 99_999 * 12
    assert f" {cells:,} " in text
    assert f" {cells * 109 * 4 * 2048:,} " in text
    assert "…" not in text


@pytest.mark.long
def test_sweep_prints_the_table_and_writes_the_figures(finished, capsys):
    assert main(["sweep", *TINY, "--out", str(finished)]) == 0  # all there: at once
    text = capsys.readouterr().out
    assert "mask/weights" in text
    assert "random/re-init" in text
    for metric in ("return_final", "return_final_sampled", "return_auc", "return_initial"):
        assert f"{metric}: IQM over seeds" in " ".join(text.split())
        assert f"{metric}: IQM over seeds" in (finished / "table.md").read_text()
    files = re.findall(r"\S+\.(?:md|png)", text)
    assert len(files) == 5
    assert all(os.path.getsize(file) > 0 for file in files)


@pytest.mark.parametrize("levels", [1, 2])
def test_report_on_an_unfinished_run(levels, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    for unit in Store(out).units():
        if unit.algo == "bc" or unit.level >= levels:
            shutil.rmtree(out / "units" / unit.name)
    assert main(["report", str(out)]) == 0
    text = capsys.readouterr().out
    assert "ppo" in text
    assert len(load_results(out)) == (2 if levels == 1 else 10)


@pytest.mark.long
def test_residual_networks_in_a_sweep(tmp_path, capsys):
    out = tmp_path / "run"
    sizes = ["--architecture", "residual", "--hidden", "8", "16", "--seeds", "1", "--levels", "2"]
    assert main(["sweep", *sizes, *BUDGET, *FEW, *STUDENTS, "--out", str(out)]) == 0
    frame = load_results(out)
    assert set(frame["algo"]) == {"ppo", "bc"}
    assert frame["dormant_share"].is_between(0, 1).all()
    ticket = Store(out).read_tickets(Store(out).units()[0])[0]
    assert (ticket.architecture, ticket.sizes) == ("residual", (4, 8, 16, 8, 2))
    assert main(["show", str(out)]) == 0
    assert main(["sweep", "--architecture", "residual", "--hidden", "--out", "x"]) == 2
    assert "hidden must name the width of residual networks" in "".join(capsys.readouterr())


def test_report_metrics_and_missing_runs(finished, tmp_path, capsys):
    assert main(["report", str(finished), "--metric", "return_best"]) == 0
    assert "return_best" in capsys.readouterr().out
    assert main(["report", str(finished), "--metric", "loss"]) == 2
    assert "metric must be one of" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "holds no run" in capsys.readouterr().err
    Store.open(tmp_path / "empty", Sweep().to_dict())
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "no finished unit yet" in capsys.readouterr().err


def test_small_budgets_are_stamped(finished):
    assert stamp(Sweep.from_dict(Store(finished).spec)) == "toy budget"
    assert stamp(protocol("CartPole-v1")) is None


def exported(file):
    """The policy in a file that ``show --export`` wrote, as a user would rebuild it."""
    tensors = torch.load(file, weights_only=True)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(),
        torch.nn.Linear(8, 2),
    )  # fmt: skip
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    return lambda raw: net((raw - tensors["offset"]) / tensors["scale"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "level"), [([], 2), (["--level", "1"], 1), (["--level", "0"], 0)]
)
def test_the_exported_policy_is_plain_tensors_and_acts_like_the_ticket(
    options, level, finished, tmp_path, capsys
):
    file = tmp_path / "policy.pt"
    arguments = ["--algo", "bc", "--seed", "1", *options, "--export", str(file)]
    assert main(["show", str(finished), *arguments]) == 0
    shown = capsys.readouterr().out
    assert f"level-{level:02d}" in shown
    policy = exported(file)
    store = Store(finished)
    (ticket,) = [
        ticket
        for unit in store.units()
        for ticket in store.read_tickets(unit)
        if (unit.algo, unit.level, ticket.seed) == ("bc", level, 1)
        and ticket.condition in ("dense", "mask/weights")
    ]
    raw = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    scaled = (raw - torch.tensor(ticket.offset)) / torch.tensor(ticket.scale)
    hidden = scaled
    for layer, (weight, bias) in enumerate(ticket.arena.actor.layers(ticket.final[None])):
        hidden = hidden @ weight[0].T + bias[0]
        hidden = hidden.tanh() if layer < 2 else hidden
    with torch.no_grad():
        torch.testing.assert_close(policy(raw), hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(policy(raw).argmax(1), hidden.argmax(1))
    assert len(set(policy(raw).argmax(1).tolist())) == 2


def test_the_exported_policy_earns_the_stored_return_in_gymnasium(finished, tmp_path):
    import gymnasium

    file = tmp_path / "policy.pt"
    assert main(["show", str(finished), "--export", str(file)]) == 0
    policy = exported(file)
    rows = load_results(finished).filter(
        algo="ppo", condition="mask/weights", seed=0, level=2, controls="own"
    )
    env, returns = gymnasium.make("CartPole-v1"), []
    for episode in range(20):
        obs, _ = env.reset(seed=episode)
        total, done = 0.0, False
        while not done:
            with torch.no_grad():
                action = int(policy(torch.from_numpy(obs)).argmax())
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        returns.append(total)
    env.close()
    mean, deviation = torch.tensor(returns).mean(), torch.tensor(returns).std()
    stored = rows["return_final"][0]  # of four episodes
    assert abs(mean - stored) <= 6 * max(deviation, 1) / 2


def test_an_export_of_another_kind_is_refused_before_anything_is_drawn(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "figures")
    assert main(["show", str(out), "--export", str(tmp_path / "policy.pth")]) == 2
    assert "must end in .pt, .safetensors, .onnx" in " ".join(capsys.readouterr().err.split())
    assert not (out / "figures").exists()


def test_show_says_what_there_is(finished, tmp_path, capsys):
    assert main(["show", str(finished), "--seed", "7"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "no finished ppo ticket of mask/weights (own controls), seed 7" in error
    assert "finished algos: bc, ppo" in error
    assert "seeds 0 to 1" in error


@pytest.mark.long
def test_overwrite_on_the_command_line(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    other = ["sweep", *TINY, "--algos", "ppo", "--levels", "1", "--out", str(out)]
    assert main(other) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "holds another run" in error
    assert "levels is 3 there, 1 here" in error
    assert "--overwrite" in error
    assert main([*other, "--overwrite"]) == 0
    assert len(load_results(out)) == 2


def test_options_are_read_in_both_spellings():
    arguments = ["--out", "x", "--plugin", "a.py", "b.py", "--env=Acrobot-v1", "--seeds", "3"]
    assert cli._option(arguments, "--plugin") == ["a.py", "b.py"]
    assert cli._option(arguments, "--env") == ["Acrobot-v1"]
    assert cli._option(arguments, "--levels") == []


@pytest.fixture
def interruptible():
    """SIGINT as Python sets it up; a job started in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_safe_moment_and_the_second_does_not(number):
    console = Console(quiet=True)
    before = signal.getsignal(number)
    with cli._held_signals(console) as check:
        check()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt) as stopped:
            check()
    assert stopped.value.status == 128 + number
    with cli._held_signals(console):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stopped:
            signal.raise_signal(number)
    assert stopped.value.status == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_cleanly_and_says_how_to_resume(number, tmp_path):
    out = tmp_path / "run"
    long = ["--env", "CartPole-v1", "--algos", "ppo", "--seeds", "2", "--levels", "40"]
    child = subprocess.Popen(
        [installed(), "sweep", *long, *BUDGET, *FEW, "--hidden", "8", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("units/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    text, _ = child.communicate(timeout=60)
    assert "stopping after this iteration" in text
    assert child.returncode == 128 + number, text
    plain = " ".join(text.split())
    assert "stopped. Finished units are safe in" in plain
    assert "run the same command again to resume" in plain
    assert "Traceback" not in text
    assert {entry.suffix for entry in (out / "units").iterdir()} == {""}  # no lock, no leftover
    store = Store(out)
    assert all(store.has(unit) for unit in store.units())


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_BETWEEN_LINES_S", 0.2)
    out = io.StringIO()
    spec = Sweep(algos=("ppo",), levels=1, seeds=1)
    with progress.SweepProgress(spec, Console(file=out, width=40)) as shown:
        for _ in range(2):
            for _ in range(3):
                shown.advance("ppo level 0 of [bold]mine", spec.train_steps("ppo", 0) // 8)
            time.sleep(0.25)
        shown.advance("ppo level 0", 0)
    # Old versions of rich end with an empty line.
    lines = out.getvalue().rstrip("\n").splitlines()
    assert lines[0] == " 12%  ppo level 0 of [bold]mine"
    assert [line.split()[0] for line in lines] == ["12%", "50%", "75%"]
    assert re.fullmatch(r" 75%  ppo level 0, [\d,]+k steps/s, 0:00:0\d left", lines[2])


def test_ctrl_c_in_other_commands_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_print_report", interrupted)
    assert main(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "stopped."


@pytest.mark.long
def test_a_reader_that_has_seen_enough_is_no_error():
    """As in ``sparse-tickets sweep --help | head``."""
    command = [installed(), "--version"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 128 + signal.SIGPIPE


def test_version_names_what_numbers_depend_on(capsys):
    assert main(["--version"]) == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["sparse-tickets"].startswith(metadata.version("sparse-tickets"))
    assert {name: lines[name] for name in ("torch", "numba", "numpy", "gymnasium")} == {
        name: metadata.version(name) for name in ("torch", "numba", "numpy", "gymnasium")
    }
    assert "triton" in lines
    assert lines["processor"] == processor()


@pytest.mark.long
@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.slow) for e in ("latin-1", "cp1252"))]
)
def test_output_survives_narrow_terminals(encoding, finished):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for arguments in (["report", str(finished), "--metric", "return_auc"], ["sweep", "--help"]):
        done = subprocess.run(
            [installed(), *arguments], capture_output=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode(encoding)


def test_a_warning_is_one_line(monkeypatch):
    said = []

    def warned(*_):
        given = UserWarning("\x1b[33mthis environment names no time limit\x1b[0m")
        said.append(warnings.formatwarning(given, UserWarning, "ours.py", 7))
        return 0

    monkeypatch.setitem(cli._COMMANDS, "report", ("", warned))
    before = warnings.formatwarning
    assert main(["report"]) == 0
    assert said == ["warning: this environment names no time limit\n"]
    assert warnings.formatwarning is before


def test_brackets_are_no_markup(tmp_path, capsys):
    out = tmp_path / "[bold]run[2]"
    assert main(["report", str(out)]) == 1
    assert "[bold]run[2]" in "".join(capsys.readouterr().err.split())
