"""Where tests of kernels put their tensors."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def tensors_on_a_gpu() -> Iterator[None]:
    """Tensors made without a device are on the GPU, if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
