"""Large results' memory: used again when free, never while anything still looks at it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_tickets.kernels.linear import linear
from sparse_tickets.kernels.policy import reused_memory


@pytest.fixture(autouse=True)
def nothing_kept():
    reused_memory._buffers.clear()
    yield
    reused_memory._buffers.clear()


def test_memory_is_used_again_once_free() -> None:
    first = reused_memory.empty(300, 400)
    place = first.data_ptr()
    assert place % 64 == 0
    del first
    again = reused_memory.empty(400, 300)
    assert again.data_ptr() == place
    assert again.shape == (400, 300)
    assert again.dtype == torch.float32


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[5:7],
        lambda tensor: tensor.detach().T,
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.from_dlpack(tensor),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.zeros(1).set_(tensor),
    ],
)
def test_memory_that_something_looks_at_is_left_alone(look) -> None:
    tensor = reused_memory.empty(300, 400)
    place, seen = tensor.data_ptr(), look(tensor)
    del tensor
    assert reused_memory.empty(300, 400).data_ptr() != place
    del seen
    assert place in {reused_memory.empty(300, 400).data_ptr() for _ in range(2)}


def test_autograd_s_saved_results_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 256, generator=generator)
    mask = torch.rand(1, 256, 256, generator=generator) < 0.05
    weight = (torch.randn(1, 256, 256, generator=generator) * mask).requires_grad_()

    def run(*, hold: bool) -> torch.Tensor:
        hidden = linear(x, weight, mask).tanh()
        others = [linear(x, weight, mask) for _ in range(4)] if hold else []
        output = linear(hidden, weight, mask).square()
        del hidden, others
        if hold:
            linear(2 * x, weight.detach(), mask)
        return torch.autograd.grad(output.sum(), weight)[0]

    assert torch.equal(run(hold=False), run(hold=True))


def test_little_is_kept() -> None:
    held = [reused_memory.empty(1 << 20) for _ in range(40)]
    assert sum(buffer.size for buffer in reused_memory._buffers) <= reused_memory._MOST_ELEMENTS
    assert len({tensor.data_ptr() for tensor in held}) == 40
    small, huge = reused_memory.empty(3, 5), reused_memory.empty(reused_memory._MOST_ELEMENTS + 1)
    assert not any(
        t.data_ptr() == b.ctypes.data for t in (small, huge) for b in reused_memory._buffers
    )
    assert reused_memory.empty(0, 7).shape == (0, 7)


def test_threads_get_memory_of_their_own() -> None:
    def work(number: int) -> bool:
        for _ in range(200):
            tensor = reused_memory.empty(1 << 16)
            tensor.fill_(number)
            if not bool((tensor == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
