"""`linear` on the CPU: every format against float64, and networks kept per mask."""

import gc
import multiprocessing
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.linear import cpu, reference
from sparse_tickets.kernels.policy.layout import FEW
from sparse_tickets.kernels.vector import LANES
from sparse_tickets.linear import SparseLinear

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def forced_sparse() -> Iterator[None]:
    """Every ticket runs as a network, however little there is to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_LEAST_WORK", 0)
        patch.setattr(cpu, "DENSE_FROM", 2.0)
        yield


def inputs(
    tickets: int, batch: int, out: int, inp: int, density: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x, weight, mask, bias, dy``; the first row of each ticket is all pruned."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tickets, out, inp, generator=generator) < density
    mask[:, :1] = False
    x = torch.randn(tickets, batch, inp, generator=generator)
    weight = torch.randn(tickets, out, inp, generator=generator).masked_fill(~mask, 0)
    bias = torch.randn(tickets, out, generator=generator)
    dy = torch.randn(tickets, batch, out, generator=generator)
    return x, weight, mask, bias, dy


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Within the rounding bound of a sum of ``terms`` products of this summed magnitude."""
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs()
    assert (error <= (terms + 2) * EPS * magnitude).all()


def check(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dy: Tensor, together: bool
) -> None:
    """Forward and all gradients in the sparse format of each mask, against float64."""
    batch, out, inp = x.shape[1], *weight.shape[1:]
    with forced_sparse():
        y = cpu.forward(x, weight, mask, bias)
        if together:
            dx, dw, db = cpu.backward(dy, x, weight, mask)
        else:
            dx, dw, db = cpu.dx(dy, weight, mask), cpu.dw(dy, x, mask), dy.sum(1)
    x, weight, dy = x.double(), weight.double(), dy.double()
    bias = None if bias is None else bias.double()
    positive = None if bias is None else bias.abs()
    assert_close(
        y,
        reference.linear(x, weight, mask, bias),
        reference.linear(x.abs(), weight.abs(), mask, positive),
        inp + 1,
    )
    assert_close(
        dx,
        reference.linear_dx(dy, weight, mask),
        reference.linear_dx(dy.abs(), weight.abs(), mask),
        out,
    )
    assert_close(
        dw,
        reference.linear_dw(dy, x, mask),
        reference.linear_dw(dy.abs(), x.abs(), mask),
        batch,
    )
    assert_close(db, dy.sum(1), dy.abs().sum(1), batch)
    assert not dw[~mask].any()


sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 48, 100])


@pytest.mark.long
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tickets=st.integers(1, 3),
    batch=st.sampled_from([1, 2, LANES - 1, LANES, LANES + 1, FEW, 64, 200]),
    out=sizes,
    inp=sizes,
    density=st.sampled_from([0.0, 0.03, 0.3, 0.9]),
    bias=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compressed(tickets, batch, out, inp, density, bias, together, seed) -> None:
    x, weight, mask, offset, dy = inputs(tickets, batch, out, inp, density, seed)
    check(x, weight, mask, offset if bias else None, dy, together)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    check(*inputs(*shape, 0.5, 0), together=True)


@pytest.mark.parametrize("together", [True, False])
def test_operands_that_lie_anyhow(together: bool) -> None:
    """Strided, negative views, and a mask that is a view of another tensor's memory."""
    x, weight, mask, bias, dy = inputs(2, 40, 33, 20, 0.3, 0)
    x, dy = torch._neg_view(x), dy.transpose(0, 1).contiguous().transpose(0, 1)
    weight, mask = weight.mT.contiguous().mT, torch.stack([mask, ~mask], 3)[..., 0]
    check(x, weight, mask, bias.t().contiguous().t(), dy, together)


def test_formats_mixed_in_one_population() -> None:
    """A dense ticket and a sparse one; each as it is alone."""
    x, weight, mask, bias, dy = inputs(3, 2048, 64, 48, 0.1, 0)
    mask[0] = True
    weight = torch.randn(mask.shape) * mask
    together = [cpu.forward(x, weight, mask, bias), *cpu.backward(dy, x, weight, mask)]
    for p in range(3):
        one = slice(p, p + 1)
        alone = [
            cpu.forward(x[one], weight[one], mask[one].clone(), bias[one]),
            *cpu.backward(dy[one], x[one], weight[one], mask[one].clone()),
        ]
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[one], part)
    formats = [
        cpu.plan(64, 48, 2048, float(each.float().mean()), torch.float32).format for each in mask
    ]
    assert formats == ["dense+mask", "csr", "csr"]
    assert [each is None for each in cpu._known.find(mask)[0].tickets] == [True, False, False]


def test_little_work_is_torch_s() -> None:
    assert cpu.plan(64, 48, 100, 0.1, torch.float32).format == "dense+mask"
    assert cpu.plan(256, 256, 64, 0.1, torch.float64).format == "dense+mask"
    assert cpu.plan(256, 256, 64, 0.1, torch.float32).format == "csr"


def test_threads_do_not_change_a_bit() -> None:
    x, weight, mask, bias, dy = inputs(1, 1000, 96, 160, 0.3, 0)

    def results() -> list[Tensor]:
        with forced_sparse():
            return [cpu.forward(x, weight, mask, bias), *cpu.backward(dy, x, weight, mask)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        two = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# Networks kept per mask


@pytest.mark.parametrize("tickets", [1, 2])
@pytest.mark.parametrize("unseen", [False, True])
def test_a_written_mask_is_seen(tickets: int, unseen: bool) -> None:
    x, weight, mask, bias, _ = inputs(tickets, 70, 40, 48, 0.2, 0)
    with forced_sparse():
        cpu.forward(x, weight, mask, bias)
        (mask.data if unseen else mask)[0, 5:20] = True
        weight = torch.randn(mask.shape) * mask
        y = cpu.forward(x, weight, mask, bias)
    torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))


@pytest.mark.long
def test_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 calls, with masks that come, are written and go."""
    monkeypatch.setattr(cpu, "_LEAST_WORK", 0)
    x, weight, mask, _, _ = inputs(1, 16, 32, 32, 0.1, 0)

    def work(calls: int) -> None:
        for call in range(calls):
            cpu.forward(x, weight, mask, None)
            if call % 20 == 0:
                mask.logical_not_().logical_not_()
                cpu.forward(x, weight, mask.clone(), None)

    work(200)
    gc.collect()
    known = len(cpu._known)
    tracemalloc.start()
    try:
        work(200)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        work(10_000)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(cpu._known) <= known
    assert after - before < 50_000


def test_threads_may_call_at_once() -> None:
    problems = [inputs(1, 1100, 64, 64, 0.2, seed) for seed in range(4)]

    def results(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
        return [cpu.forward(x, weight, mask, bias), *cpu.backward(dy, x, weight, mask)]

    expected = [results(*problem) for problem in problems]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            actual = results(*problems[index])
            if not all(map(torch.equal, actual, expected[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.long
def test_spawned_process() -> None:
    problem = inputs(1, 1100, 64, 64, 0.2, 0)[:4]
    expected = cpu.forward(*problem)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        actual = pool.submit(cpu.forward, *problem).result(timeout=60)
        assert torch.equal(actual, expected)


# One row


def test_acting_reads_the_weight_where_it_lies() -> None:
    layer = SparseLinear(64, 48).prune_(0.2)
    x = torch.randn(1, 64)
    with torch.no_grad():
        layer(x)
        assert layer._prepared._compiled is not None
        # As soft target updates do, which no version counter sees.
        layer.weight.data.mul_(0.5)
        layer.bias.data.add_(1)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.prune_(0.1)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        strided = torch.randn(64, 2).t()[:1]
        torch.testing.assert_close(layer(strided), F.linear(strided, layer.weight, layer.bias))
        with use_backend("reference"):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.double()
        assert layer(x.double()).dtype == torch.float64
