"""`linear` on the CPU: every format against float64, the crossover table, and cached patterns."""

import gc
import json
import multiprocessing
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.linear import (
    cpu,
    crossover,
    linear,
    patterns,
    plan_for,
    reference,
)
from sparse_tickets.kernels.linear.panels import PANEL
from sparse_tickets.kernels.vector import LANES
from sparse_tickets.linear import SparseLinear

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    tickets: int, batch: int, out: int, inp: int, density: float, block: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x, weight, mask, bias, dy``; the first row (of blocks) of each ticket is all pruned."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tickets, -(-out // block), -(-inp // block))
    mask = torch.rand(shape, generator=generator) < density
    mask[:, :1] = False
    mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :out, :inp].contiguous()
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
    with crossover.forced_format("sparse"):
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
    batch=st.sampled_from([1, 2, LANES - 1, LANES, LANES + 1, PANEL - 1, PANEL, 3 * PANEL + 5]),
    out=sizes,
    inp=sizes,
    density=st.sampled_from([0.0, 0.03, 0.3, 0.9]),
    bias=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compressed(tickets, batch, out, inp, density, bias, together, seed) -> None:
    x, weight, mask, offset, dy = inputs(tickets, batch, out, inp, density, 1, seed)
    check(x, weight, mask, offset if bias else None, dy, together)


@pytest.mark.long
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tickets=st.integers(1, 3),
    batch=st.sampled_from([1, 5, 16, 70, 300]),
    block=st.sampled_from(patterns.BLOCKS),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.3, 0.7]),
    bias=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_blocked(tickets, batch, block, rows, columns, density, bias, together, seed) -> None:
    x, weight, mask, offset, dy = inputs(
        tickets, batch, rows * block, columns * block, density, block, seed
    )
    assert (patterns.find_pattern(mask).block >= block).all()
    check(x, weight, mask, offset if bias else None, dy, together)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    check(*inputs(*shape, 0.5, 1, 0), together=True)


def test_formats_mixed_in_one_population(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense, a blocked and an unstructured ticket; each as it is alone."""
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "fixed")
    x, weight, mask, bias, dy = inputs(3, 80, 64, 48, 0.1, 1, 0)
    mask[0] = True
    mask[1] = False
    mask[1, 16:32, :16] = True
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
    formats = [plan_for(mask[p], 80, torch.float32).format for p in range(3)]
    assert formats == ["dense", "blocked-16", "csr"]


@pytest.mark.parametrize("block", [1, 16])
def test_threads_do_not_change_a_bit(block: int) -> None:
    x, weight, mask, bias, dy = inputs(1, 1000, 96, 160, 0.3, block, 0)

    def results() -> list[Tensor]:
        with crossover.forced_format("sparse"):
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


# Cached patterns


def test_a_written_mask_is_seen() -> None:
    x, weight, mask, bias, _ = inputs(1, 70, 40, 48, 0.2, 1, 0)
    with crossover.forced_format("sparse"):
        cpu.forward(x, weight, mask, bias)
        mask[0, 5:20] = True
        weight = torch.randn(mask.shape) * mask
        y = cpu.forward(x, weight, mask, bias)
    torch.testing.assert_close(y, reference.linear(x, weight, mask, bias))


@pytest.mark.long
def test_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 calls, with masks that come, are written and go."""
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "1")
    x, weight, mask, _, _ = inputs(1, 16, 32, 32, 0.1, 1, 0)

    def work(calls: int) -> None:
        for call in range(calls):
            cpu.forward(x, weight, mask, None)
            if call % 20 == 0:
                mask.logical_not_().logical_not_()
                cpu.forward(x, weight, mask.clone(), None)

    work(200)
    gc.collect()
    known = len(patterns._known)
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
    assert len(patterns._known) <= known
    assert after - before < 50_000


def test_threads_may_call_at_once() -> None:
    problems = [inputs(1, 300, 64, 64, 0.2, block, seed) for seed, block in enumerate([1, 16] * 2)]

    def results(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
        with crossover.forced_format("sparse"):
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
def test_spawned_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "fixed")
    problem = inputs(1, 300, 64, 64, 0.2, 1, 0)[:4]
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


# The crossover


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measure, into a table of this test's own."""
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "measure")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(crossover, "_SECONDS", 0.005)
    monkeypatch.setattr(crossover, "_table", {})
    monkeypatch.setattr(crossover, "_SMALLEST_WORK", 0)
    return crossover.cache_file()


def test_little_work_is_dense_unmeasured(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "measure")
    choice = crossover.choose("csr", "forward", 48, 64, 100, 0.1)
    assert not choice.sparse
    assert "too little work" in choice.reason


def test_measured_once_and_kept(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = crossover.choose("csr", "forward", 48, 64, 100, 0.1)
    assert "measured at this shape" in choice.reason
    stored = json.loads(table.read_text())
    assert list(stored["seconds"]) == ["csr 48x64 batch 128"]

    def refuse(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(crossover, "_measure", refuse)
    assert crossover.choose("csr", "forward", 48, 64, 128, 0.1) == choice
    crossover._table.clear()
    assert crossover.choose("csr", "forward", 48, 64, 65, 0.1).sparse == choice.sparse


def test_measuring_leaves_the_caller_alone(table: Path) -> None:
    """Met first in training, under autocast off and on, with the generator undisturbed."""
    x, weight, mask, bias, dy = inputs(1, 64, 48, 64, 0.1, 1, 0)
    leaf = weight.requires_grad_()
    state = torch.get_rng_state()
    linear(x, leaf, mask, bias).backward(dy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(leaf.grad, reference.linear_dw(dy, x, mask), atol=1e-4, rtol=1e-4)
    assert table.exists()


def fake_times(dense: float) -> dict:
    times = crossover._Times(dense, 1.0, 5.0)
    return {"forward": times, "training": times}


def test_choice_follows_the_measurement(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_measure", lambda *args: fake_times(2.0))
    sparse = crossover.choose("csr", "forward", 64, 64, 64, 0.05)
    assert sparse == (True, "forward 2x dense measured at this shape and density 0.05")
    dense = crossover.choose("csr", "forward", 64, 64, 64, 0.9)
    assert not dense.sparse
    assert dense.reason.startswith("csr would lose: forward 0.")


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"version": 1}', '{"version": 0, "seconds": {}}',
     '{"version": 1, "seconds": {"csr 48x64 batch 128": {"forward": [1, 2], "training": []}}}',
     '{"version": 1, "seconds": {"csr 48x64 batch 128": 5}}', "\x00\xff"],
)  # fmt: skip
def test_a_damaged_table_is_measured_again(
    table: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(crossover, "_measure", lambda *args: fake_times(2.0))
    table.write_bytes(damage.encode("latin-1"))
    assert crossover.choose("csr", "forward", 48, 64, 100, 0.05).sparse
    assert "csr 48x64 batch 128" in json.loads(table.read_text())["seconds"]
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_a_table_that_cannot_be_written_is_kept_in_memory(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.parent.rmdir()
    table.parent.write_text("a file, not a folder")
    calls = []
    monkeypatch.setattr(crossover, "_measure", lambda *args: calls.append(1) or fake_times(2.0))
    for _ in range(2):
        assert crossover.choose("csr", "forward", 48, 64, 100, 0.05).sparse
    assert calls == [1]


def test_setting_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("fast", "1.5", "nan"):
        monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", wrong)
        with pytest.raises(ValueError, match="must be measure, fixed or a density"):
            crossover.choose("csr", "forward", 64, 64, 64, 0.05)
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "0.4")
    assert crossover.choose("csr", "forward", 64, 64, 1, 0.39).sparse
    assert not crossover.choose("csr", "forward", 64, 64, 1, 0.4).sparse


def test_plan_names_blocks() -> None:
    mask = torch.zeros(128, 64, dtype=torch.bool)
    for size in patterns.BLOCKS:
        mask.zero_()[:size, :size] = True
        layer = SparseLinear(64, 128, mask=mask)
        assert layer.plan(batch=256).format == f"blocked-{size}"
        assert layer.plan(batch=256, training=True).format == f"blocked-{size}"
