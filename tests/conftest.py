"""Shared set-up: without a GPU, Triton kernels run in the interpreter on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Must be in place before any @triton.jit function is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed source of random inputs."""
    return torch.Generator().manual_seed(0)
