"""Compiled kernels where nothing can be written, and what becomes of a cache that is damaged.

A file stands where a folder should: unlike permissions, that stops the superuser too.
"""

import importlib.util
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from sparse_tickets.kernels import compiling
from sparse_tickets.kernels.caching import cache_folder, keep_triton_cache
from sparse_tickets.kernels.compiling import njit, on_compile

ROOT = Path(__file__).resolve().parents[2]
KERNEL = """
from sparse_tickets.kernels.compiling import njit

@njit(cache=True)
def double(x):
    return 2 * x
"""
# The same function with other constants, as kernels are made for each network.
ADDITIONS = """
from sparse_tickets.kernels.compiling import njit

def addition(n):
    @njit(cache=True)
    def add(x):
        return x + n
    return add
"""


@pytest.fixture
def barred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No home, and another folder for temporary files, which is returned."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return temporary


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """Import a module with a kernel as a new process would."""
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "kernel.py").write_text(KERNEL)

    def load() -> ModuleType:
        monkeypatch.setattr(compiling, "_started", time.time_ns())
        spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@contextmanager
def compilations(expected: int) -> Iterator[None]:
    seen: list[str | None] = []
    with on_compile(seen.append):
        yield
    assert len([name for name in seen if name]) == expected


def kept(tmp_path: Path, suffix: str) -> Path:
    (path,) = (tmp_path / "module" / "__pycache__").glob(f"*{suffix}")
    return path


IMPORT = """
import pkgutil
from importlib import import_module
import sparse_tickets.kernels
for module in pkgutil.walk_packages(sparse_tickets.kernels.__path__, "sparse_tickets.kernels."):
    if not module.name.endswith("gpu"):
        import_module(module.name)
"""
USE = """
import torch
from sparse_tickets.kernels import bits
from sparse_tickets.kernels.compiling import on_compile
with on_compile(lambda name: name and print(name)):
    bits(torch.tensor([3]), 4, stream=1, step=0)
"""


@pytest.mark.long
def test_the_library_needs_no_folder_of_its_own(tmp_path: Path, barred: Path) -> None:
    site = tmp_path / "site"
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparse_tickets", site / "sparse_tickets", ignore=caches)
    for folder in [site, *site.rglob("*/")]:
        (folder / "__pycache__").touch()

    def run(code: str) -> tuple[str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=site,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "Warning" in line]

    output, (warning,) = run(IMPORT + USE)
    assert "bits" in output
    folder = barred / f"sparse_tickets-{os.getuid()}"
    assert f"kept in {folder}, since {tmp_path}/home/.cache/sparse_tickets cannot" in warning
    assert folder.stat().st_mode & 0o077 == 0
    output, (warning,) = run(USE)
    assert not output, "compiled twice"


def test_without_any_folder_each_process_compiles(
    tmp_path: Path, barred: Path, load: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "home" / "none"))
    (tmp_path / "module" / "__pycache__").touch()
    with pytest.warns(RuntimeWarning, match="is not kept"):
        first = load()
    for module in (first, load()):
        with compilations(1):
            assert module.double(3) == 6


def test_the_user_cache_comes_before_a_temporary_one(
    tmp_path: Path, barred: Path, load: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "module" / "__pycache__").touch()
    with compilations(1):
        assert load().double(3) == 6
    with compilations(0):
        assert load().double(3) == 6
    assert list((tmp_path / "cache" / "sparse_tickets" / "numba").rglob("*.nbc"))
    assert not list(barred.iterdir())


def test_a_user_without_a_home_gets_no_folder_named_tilde(
    barred: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # What `expanduser` leaves where neither HOME nor the list of users knows one.
    monkeypatch.setenv("HOME", "~")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert cache_folder().parent == barred
    assert not (tmp_path / "~").exists()


def test_a_temporary_folder_that_others_can_write_is_not_used(barred: Path) -> None:
    folder = barred / f"sparse_tickets-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="is not kept"):
        assert barred not in cache_folder().parents


FACTORY = """
import numpy as np
from sparse_tickets.kernels.compiling import njit

def make(rises):
    @njit
    def run(x, n):
        for i in range(n):
            order = np.argsort(np.sin(x * i))  # of a size that no compiler inlines
            for j in order:
                x[j] += 1.0 if rises else -1.0
        return x
    return run

raised, lowered = make(True), make(False)

@njit(cache=True)
def up(n):
    return raised(raised(raised(np.ones(4), n), n), n)

@njit(cache=True)
def down(n):
    return lowered(lowered(lowered(np.ones(4), n), n), n)
"""


@pytest.mark.long
def test_kernels_of_two_processes_do_not_call_each_others_functions(tmp_path: Path) -> None:
    """Functions of one factory have one name, and Numba numbers them anew in each process."""
    (tmp_path / "factory.py").write_text(FACTORY)

    def run(*names: str) -> list[str]:
        code = "import sys, factory; [print(getattr(factory, n)(2)[0]) for n in sys.argv[1:]]"
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            capture_output=True, text=True, cwd=tmp_path, check=True,
        )  # fmt: skip
        return done.stdout.split()

    up, down = run("up"), run("down")
    assert up != down
    assert run("up", "down") == up + down
    assert run("down", "up") == down + up


HELPERS = {
    "__init__.py": "",
    "callers/__init__.py": "",
    "callers/caller.py": """
from sparse_tickets.kernels.compiling import njit
from ..helper import (
    double,
)

@njit(cache=True)
def quadruple(x):
    return double(double(x))
""",
    "helper.py": """
from sparse_tickets.kernels.compiling import njit
from .constants import TWO

@njit(inline="always")
def double(x):
    return TWO * x
""",
    "constants.py": "TWO = 2",
}


def write_helpers(folder: Path) -> Path:
    """A package of a kernel, its helper and the helper's constant."""
    package = folder / "package"
    (package / "callers").mkdir(parents=True)
    for name, text in HELPERS.items():
        (package / name).write_text(text)
    return package


@pytest.mark.long
def test_what_a_kernel_imports_is_part_of_its_stamp(tmp_path: Path) -> None:
    """A helper is compiled into its caller, whose own file did not change."""
    package = write_helpers(tmp_path)
    code = """
from package.callers.caller import quadruple
result = quadruple(1)
print(result, sum(quadruple.stats.cache_hits.values()))
"""

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        return done.stdout.strip()

    assert run() == "4 0"
    assert run() == "4 1"
    (package / "constants.py").write_text("TWO = 3")
    assert run() == "9 0"


@pytest.mark.long
def test_what_changes_under_a_running_process_is_not_kept(tmp_path: Path) -> None:
    """It has what it imported before, and its files would be taken for those of the new sources."""
    write_helpers(tmp_path)
    code = """
import sys
from pathlib import Path
import package.helper
if len(sys.argv) > 1:
    Path("package/constants.py").write_text("TWO = 3")
from package.callers.caller import quadruple
result = quadruple(1)
print(result, sum(quadruple.stats.cache_hits.values()))
"""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, cwd=tmp_path, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert run("changes a source that it has imported") == "4 0"
    assert run() == "9 0"
    assert run() == "9 1"


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "text"])
def test_a_damaged_file_is_compiled_again(
    tmp_path: Path, load: Callable[[], ModuleType], suffix: str, damage: str
) -> None:
    load().double(3)
    file = kept(tmp_path, suffix)
    whole = file.read_bytes()
    damaged = {"half": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "text": b"not it"}
    file.write_bytes(damaged.get(damage, b""))
    module = load()
    with pytest.warns(RuntimeWarning, match="compiling again what is damaged in"), compilations(1):
        assert module.double(3) == 6
    with compilations(0):
        assert load().double(3) == 6


def test_what_no_process_would_find_again_is_refused() -> None:
    """Numba files a function by what it closes over, and kernels have other names each time."""
    inner = njit(lambda x: 2 * x)

    def twice(x):
        return inner(x)

    assert njit(twice)(3) == 6
    with pytest.raises(TypeError, match="twice must not be cached: it closes over kernels"):
        njit(cache=True)(twice)


def test_kernels_that_two_processes_filed_under_one_name_are_told_apart(
    tmp_path: Path, load: Callable[[], ModuleType]
) -> None:
    """Each begins with an empty index, and the one's file may end under the other's entry."""
    (tmp_path / "module" / "kernel.py").write_text(ADDITIONS)
    load().addition(1)(1)
    index = kept(tmp_path, ".nbi")
    first = index.read_bytes()
    index.unlink()
    load().addition(2)(1)
    index.write_bytes(first)
    with compilations(1):
        assert load().addition(1)(1) == 2
    with compilations(0):
        assert load().addition(1)(1) == 2


@pytest.mark.parametrize("home", ["sparse_tickets.kernels.compiling", "nowhere"])
def test_what_other_sources_left_is_compiled_again_without_a_word(
    tmp_path: Path, load: Callable[[], ModuleType], home: str
) -> None:
    """A class that a kernel is given was renamed since: what pickle kept of it cannot be read."""
    load().double(3)
    file = kept(tmp_path, ".nbi")
    with file.open("rb") as index:
        version = pickle.load(index)
    file.write_bytes(pickle.dumps(version) + f"c{home}\nGone\n.".encode())
    module = load()
    with compilations(1):
        assert module.double(3) == 6
    with compilations(0):
        assert load().double(3) == 6


def test_a_damaged_file_that_cannot_be_replaced_is_compiled_again(
    tmp_path: Path, load: Callable[[], ModuleType]
) -> None:
    load().double(3)
    kept(tmp_path, ".nbi").write_bytes(b"")
    module = load()
    with full(), pytest.warns(RuntimeWarning, match="compiling again"), compilations(1):
        assert module.double(3) == 6


def test_a_full_disk_costs_nothing_but_the_cache(
    tmp_path: Path, load: Callable[[], ModuleType]
) -> None:
    module = load()
    with full(), pytest.warns(RuntimeWarning, match="cannot be kept in") as seen:
        assert (module.double(3), module.double(3.0)) == (6, 6.0)
    assert len(seen) == 1
    assert not list((tmp_path / "module" / "__pycache__").glob("*.nbc*"))


@contextmanager
def full() -> Iterator[None]:
    """No file of this process can grow; Python ignores the signal and raises OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_triton_keeps_its_cache_where_it_can(barred: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    # So that it is gone after this test.
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        keep_triton_cache()
    assert Path(os.environ["TRITON_CACHE_DIR"]) == cache_folder() / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
