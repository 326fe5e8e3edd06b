"""Pruning, updates, draws and returns on a GPU: sizes of real use, no wait for the device."""

import math
from contextlib import contextmanager

import pytest
import torch

from sparse_tickets.kernels import random
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.returns import gae
from sparse_tickets.kernels.update import adam_, rewind_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

# Rows that one program holds, rows of many chunks, and one row of millions.
SHAPES = [(1024, 4480), (60, 70_000), (256, 131_072), (3, 8193), (1, 10_000_001)]


@pytest.fixture
def cuda() -> torch.Generator:
    """A fixed source of random inputs on the GPU."""
    return torch.Generator("cuda").manual_seed(0)


@contextmanager
def without_waiting():
    """Fail where an op waits for the device, which would also break its capture in a graph."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rand(*shape, cuda):
    return torch.rand(shape, generator=cuda, device="cuda")


def randn(*shape, cuda):
    return torch.randn(shape, generator=cuda, device="cuda")


def population(tickets, size, prunable, cuda, density=0.2):
    """Rows whose pruned entries are zero, and a gradient that is NaN where it must not count."""
    mask = rand(tickets, prunable, cuda=cuda) < density
    rows = {"weight": randn(tickets, size, cuda=cuda), "m": randn(tickets, size, cuda=cuda)}
    rows["v"] = rand(tickets, size, cuda=cuda) + 0.01
    grad = randn(tickets, size, cuda=cuda)
    for row in rows.values():
        row[:, :prunable] *= mask
    grad[:, :prunable][~mask] = math.nan
    rows["step"] = torch.arange(tickets, device="cuda")
    rows["lr"] = rand(tickets, cuda=cuda) * 1e-2
    return rows, grad, mask


def in_float64(rows):
    return {n: row.double() if row.is_floating_point() else row.clone() for n, row in rows.items()}


def close(actual, expected, scale=16.0):
    unit = scale * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected.float(), rtol=unit, atol=unit)


@pytest.mark.parametrize("criterion", ["score", "magnitude"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prune(shape, ties, criterion, cuda):
    tickets, prunable = shape
    scores = randn(*shape, cuda=cuda)
    if ties:
        scores = (scores * 4).round()
    mask = rand(*shape, cuda=cuda) < 0.6
    k = torch.randint(0, prunable + 1, (tickets,), generator=cuda, device="cuda")
    k[0] = prunable // 3
    prune(scores, mask, k, criterion=criterion, check=False)
    with without_waiting():
        kept = prune(scores, mask, k, criterion=criterion, check=False)
    with use_backend("reference"):
        assert torch.equal(kept, prune(scores, mask, k, criterion=criterion))
    assert torch.equal(kept.sum(1), torch.minimum(k, mask.sum(1)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
@pytest.mark.parametrize("shape", [(7, 4480), (7, 70_000)], ids=str)
def test_prune_where_all_scores_tie(shape, value):
    scores = torch.full(shape, value, device="cuda")
    mask = torch.ones(shape, dtype=torch.bool, device="cuda")
    mask[3] = False
    kept = prune(scores, mask, shape[1] // 2)
    expected = mask & (torch.arange(shape[1], device="cuda") < shape[1] // 2)
    assert torch.equal(kept, expected)


def test_a_ticket_s_mask_and_update_do_not_depend_on_its_company(cuda):
    rows, grad, mask = population(37, 90_000, 70_000, cuda)
    alone = {name: row[5:6].clone() for name, row in rows.items()}
    kept = prune(rows["weight"][:, :70_000], mask, 9000, criterion="magnitude")
    single = prune(alone["weight"][:, :70_000], mask[5:6], 9000, criterion="magnitude")
    assert torch.equal(kept[5:6], single)
    norm = adam_(grad=grad, mask=mask, **rows)
    assert torch.equal(adam_(grad=grad[5:6], mask=mask[5:6], **alone), norm[5:6])
    for name, row in alone.items():
        assert torch.equal(row, rows[name][5:6])


@pytest.mark.parametrize("shape", [(1024, 8900, 4480), (60, 140_000, 70_000), (1, 3, 2)], ids=str)
def test_adam(shape, cuda):
    rows, grad, mask = population(*shape, cuda)
    exact = in_float64(rows)
    with without_waiting():
        norm = adam_(grad=grad, mask=mask, **rows)
    with use_backend("reference"):
        expected = adam_(grad=grad.double(), mask=mask, **exact)
    close(norm, expected)
    for name in ("weight", "m", "v"):
        close(rows[name], exact[name])
        assert not rows[name][:, : shape[2]][~mask].any()
    assert torch.equal(rows["step"], exact["step"])


def test_rewind(cuda):
    rows, _, mask = population(60, 140_000, 70_000, cuda)
    initial = randn(60, 140_000, cuda=cuda)
    with without_waiting():
        rewind_(rows["weight"], initial, rows["m"], rows["v"], mask, initial_v=initial)
    expected = initial.clone()
    expected[:, :70_000] *= mask
    assert torch.equal(rows["weight"], expected)
    assert torch.equal(rows["v"], expected)
    assert not rows["m"].any()


def test_a_graph_of_adam_and_prune_replays_what_eager_code_does(cuda):
    rows, grad, mask = population(60, 140_000, 70_000, cuda)
    eager = {name: row.clone() for name, row in rows.items()}
    k = torch.full((60,), 9000, device="cuda")

    def step(rows):
        norm = adam_(grad=grad, mask=mask, **rows)
        return norm, prune(rows["weight"][:, :70_000], mask, k, criterion="magnitude", check=False)

    for _ in range(4):
        expected_norm, expected_mask = step(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm, kept = step(rows)
    for _ in range(4):
        graph.replay()
    assert torch.equal(norm, expected_norm)
    assert torch.equal(kept, expected_mask)
    for name, row in eager.items():
        assert torch.equal(rows[name], row)


@pytest.mark.parametrize(
    "draw", [random.bits, random.uniform, random.permutation], ids=lambda draw: draw.__name__
)
def test_a_graph_draws_new_numbers_where_its_step_is_a_tensor(draw):
    key = torch.tensor([5, -7, 2**62])
    on_device, step = key.cuda(), torch.tensor(2**32 - 2, device="cuda")
    draw(on_device, 5000, stream=3, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = draw(on_device, 5000, stream=3, step=step)
        step += 1
    for number in range(2**32 - 2, 2**32 + 2):
        graph.replay()
        assert torch.equal(numbers.cpu(), draw(key, 5000, stream=3, step=number))


def test_draws_equal_the_cpu_s(cuda):
    key = torch.randint(-(2**62), 2**62, (1024,), generator=cuda, device="cuda")
    for draw in (random.bits, random.uniform, random.permutation):
        with without_waiting():
            got = draw(key, 1027, stream=7, step=2**40)
        assert torch.equal(got.cpu(), draw(key.cpu(), 1027, stream=7, step=2**40))
    got = random.normal(key, 1027, stream=7, step=2**40).cpu()
    expected = random.normal(key.cpu(), 1027, stream=7, step=2**40)
    unit = torch.nextafter(expected.abs(), torch.tensor(math.inf)) - expected.abs()
    assert ((got - expected).abs() <= unit + 1e-15).all()
    probs = rand(100_000, 6, cuda=cuda)
    u = rand(100_000, cuda=cuda)
    with without_waiting():
        got = random.categorical(probs, u)
    assert torch.equal(got.cpu(), random.categorical(probs.cpu(), u.cpu()))


@pytest.mark.parametrize("shape", [(1024, 128, 16), (60, 2048, 1), (3, 33, 5)], ids=str)
def test_gae(shape, cuda):
    reward, value, next_value = randn(3, *shape, cuda=cuda).unbind()
    terminated, truncated = (rand(*shape, cuda=cuda) < 0.02 for _ in range(2))
    next_value[terminated] = math.nan
    ends = (terminated, truncated)
    with without_waiting():
        got = gae(reward, value, next_value, *ends, 0.99, 0.95)
    exact = [tensor.double() for tensor in (reward, value, next_value)]
    with use_backend("reference"):
        expected = gae(*exact, *ends, 0.99, 0.95)
    for one, other in zip(got, expected, strict=True):
        # Up to 1 / (1 - 0.99 * 0.95) steps add up.
        close(one, other, scale=64)


def test_other_devices_are_refused(cuda):
    rows, grad, mask = population(2, 6, 4, cuda)
    with pytest.raises(ValueError, match="mask must be on cuda:0, got cpu"):
        adam_(grad=grad, mask=mask.cpu(), **rows)
    with pytest.raises(ValueError, match="grad must be on cuda:0, got cpu"):
        adam_(grad=grad.cpu(), mask=mask, **rows)
    with pytest.raises(ValueError, match="k must be on cuda:0, got cpu"):
        prune(rows["weight"][:, :4], mask, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="step must be on cuda:0, got cpu"):
        random.bits(rows["step"], 3, stream=0, step=torch.tensor(1))
    with pytest.raises(ValueError, match="must not share memory with"):
        adam_(grad=grad.nan_to_num(), mask=mask, **(rows | {"m": rows["weight"]}))
