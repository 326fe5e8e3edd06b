"""Shared set-up: without a GPU, Triton kernels run in the interpreter on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Must be in place before any @triton.jit function is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same formats on every machine, and nothing written to the user's cache.
os.environ.setdefault("SPARSE_TICKETS_CROSSOVER", "fixed")


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed source of random inputs."""
    return torch.Generator().manual_seed(0)
