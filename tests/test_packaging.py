"""What users get: the wheel, the sdist, and an import from a folder that is not the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA = {".py", ".typed", ".json", ".cpp", ".h"}


class Built(NamedTuple):
    """A copy of the source tree and what was built from it."""

    source: Path
    wheel: Path
    sdist: Path
    unpacked: Path
    wheel_of_sdist: Path


def run_python(*arguments: str, cwd: Path, **variables: str) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend as a front end would: in a process of its own, in the source tree."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run_python("-c", code, str(out), cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel, the sdist, and the wheel of the sdist, from a copy of the source tree."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    caches = shutil.ignore_patterns("__pycache__", "*.nb[ic]")
    for name in ("kernels", "sparse_tickets"):
        shutil.copytree(ROOT / name, source / name, ignore=caches, symlinks=True)
    wheel = build("wheel", source, folder / "wheel")
    sdist = build("sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Built(source, wheel, sdist, unpacked, build("wheel", unpacked, folder / "wheel-2"))


def library_files(source: Path) -> set[str]:
    """Paths, relative to the repository, of the files the library is made of."""
    return {
        path.relative_to(source).as_posix()
        for name in ("kernels", "sparse_tickets")
        for path in (source / name).rglob("*")
        if path.suffix in DATA
    }


def installed_name(path: str) -> str:
    return f"sparse_tickets/{path}" if path.startswith("kernels/") else path


@pytest.mark.long
def test_wheel_holds_the_library_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    information = f"sparse_tickets-{PROJECT['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sparse_tickets", information}
    modules = {name for name in names if not name.startswith(information)}
    assert modules == {installed_name(path) for path in library_files(built.source)}
    assert "sparse_tickets/py.typed" in modules
    assert f"{information}/licenses/LICENSE" in names


def test_sdist_holds_the_library(built: Built) -> None:
    library = {installed_name(path) for path in library_files(built.source)}
    expected = library | {"pyproject.toml", "README.md", "LICENSE"}
    missing = {path for path in expected if not (built.unpacked / path).is_file()}
    assert not missing


def test_wheel_of_the_sdist_is_the_wheel(built: Built) -> None:
    assert built.wheel.name == built.wheel_of_sdist.name
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(built.wheel_of_sdist) as other:
        assert {i.filename: i.CRC for i in one.infolist() if i.filename.endswith(".py")} == {
            i.filename: i.CRC for i in other.infolist() if i.filename.endswith(".py")
        }
        assert set(one.namelist()) == set(other.namelist())


@pytest.mark.long
def test_installed_wheel_imports_from_anywhere(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="this environment was made without pip")
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", "--target", str(target), str(built.wheel)),
        cwd=elsewhere,
    )
    code = """
import importlib.metadata, json, sys
import sparse_tickets, sparse_tickets.kernels.arena, sparse_tickets.kernels.random
from sparse_tickets.kernels import Arena, use_backend
from sparse_tickets.kernels.linear import linear
Arena.build((4, 64, 2))
(command,) = importlib.metadata.entry_points(group="console_scripts", name="sparse-tickets")
print(json.dumps({
    "files": [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "sparse_tickets"],
    "version": sparse_tickets.__version__,
    "command": command.value,
    "kernels": "kernels" in sys.modules,
}))
"""
    seen = json.loads(run_python("-c", code, cwd=elsewhere, PYTHONPATH=str(target)))
    assert seen["version"] == PROJECT["project"]["version"]
    assert seen["command"] == PROJECT["project"]["scripts"]["sparse-tickets"]
    assert not seen["kernels"]
    strangers = [file for file in seen["files"] if not Path(file).is_relative_to(target)]
    assert not strangers


def test_editable_install_runs_the_repository() -> None:
    # More than one may be found: the editable one, and its egg-info in the repository.
    records = [
        json.loads(found.read_text("direct_url.json") or "{}")
        for found in metadata.distributions(name="sparse-tickets")
    ]
    if not any(record.get("dir_info", {}).get("editable") for record in records):
        pytest.skip("installed from a wheel")
    packages = find_packages(ROOT, **PROJECT["tool"]["setuptools"]["packages"]["find"])
    assert "sparse_tickets.kernels.linear" in packages
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).parent == ROOT / package.replace(".", "/")


def test_the_oldest_versions_allowed_are_those_tested() -> None:
    """`.ci/floors.txt` pins every floor of pyproject.toml; torch is held to a build for the CPU."""
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["bench"]]
    floors = {}
    for requirement in wanted:
        name, floor = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", requirement).groups()
        floors[name] = _release(floor)
    # Neither is needed to use the library, and both are run in their newest version.
    del floors["ruff"], floors["mypy"]
    lines = (ROOT / ".ci" / "floors.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert _release(pins.pop("torch")) >= floors.pop("torch")
    assert {name: _release(pin) for name, pin in pins.items()} == floors


def _release(version: str) -> tuple[int, ...]:
    """Without zeros at its end."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
