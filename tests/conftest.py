"""Shared set-up: without a GPU, Triton kernels run in the interpreter on CPU tensors."""

import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Read when torch is loaded: idle threads of one worker must not spin on the other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Must be in place before any @triton.jit function is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Policies run as users' do once all is compiled.
os.environ.setdefault("SPARSE_TICKETS_NATIVE", "wait")

# For benchmarks and experiments; at the end, so that `kernels` shadows no package of that name.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="each test with the first of its parameters, and none that is marked long",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("long") is None:
            first.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[each for each in items if each not in first.values()])
    items[:] = first.values()


@pytest.fixture(autouse=True, scope="session")
def interpreted_kernels_are_watched() -> Iterator[None]:
    """Every launch in the interpreter may fail for what a GPU would not forgive."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from sanitizer import watched

    with watched():
        yield


@pytest.fixture(autouse=True, scope="module")
def environments() -> Iterator[None]:
    """What a module registers is gone after it: registration is for good."""
    from sparse_tickets.envs.registry import _registry

    known = dict(_registry)
    yield
    _registry.clear()
    _registry.update(known)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take longer than a small sweep."""
    monkeypatch.setattr("sparse_tickets.analysis.report.save", lambda figure, path: (path,))


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed source of random inputs."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Work this small is slower on two threads, much slower beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """Ops run by their references."""
    from sparse_tickets.kernels import use_backend

    with use_backend("reference"):
        yield


@pytest.fixture
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test leaves in the temporary folder, by other processes too, goes with it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def poisoned_memory(one_thread: None) -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
