"""Tests of what only an NVIDIA GPU shows: all are marked ``gpu``, and skipped without one."""

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder; the hook sees those of other folders too."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def device() -> torch.device:
    """The GPU."""
    return torch.device("cuda")


@pytest.fixture
def no_waiting():
    """Any wait of the host for the device raises: it would break CUDA graphs."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
